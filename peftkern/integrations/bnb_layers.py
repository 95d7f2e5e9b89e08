"""bitsandbytes' Linear4bit layers as NF4Linear layers and back, on the same bytes.

An NF4Linear has the fused backward that bitsandbytes' autograd function, whatever its kernels, cannot have: it decodes
the whole weight. bitsandbytes is imported by `to_bnb` alone; a model that holds its layers has imported it already.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern._modules import adapter_modules, check_model, places, put
from peftkern.integrations.bitsandbytes import bnb_entries, check_parts
from peftkern.nf4 import NF4Weight
from peftkern.nn.nf4_linear import _CALL_HOOKS, NF4Linear
from peftkern.ops.nf4_quantize import BLOCK_SIZES, NESTED_BLOCK_SIZE

_PARTS = ("weight", "absmax", "nested_absmax", "nested_quant_map", "offset")


def from_bnb(model: nn.Module) -> nn.Module:
    """Every bitsandbytes Linear4bit with an NF4 weight becomes an NF4Linear on the same storage, in place.

    For training: the backward is fused too. FP4 and 8-bit layers stay. transformers' `save_pretrained` goes on writing
    a bitsandbytes checkpoint. bitsandbytes' eval forward on AVX-512-BF16 repacks a layer and rounds its scales to bf16,
    unless our backend keeps it from that; such a layer is unpacked, with a warning.

    Args:
        model: any module, a single Linear4bit too; on one device, before adapters are added.

    Returns:
        The same model; for a single Linear4bit the new layer.

    Raises:
        TypeError, ValueError: no layer to convert, one that is not quantised yet, adapters, or an unknown block size.
            Nothing has changed then.
    """
    _check("from_bnb", model)
    library = sys.modules.get("bitsandbytes")
    kind = None if library is None else library.nn.Linear4bit
    found = {path: module for path, module in model.named_modules() if kind is not None and isinstance(module, kind)}
    layers = {path: layer for path, layer in found.items() if layer.weight.quant_type == "nf4"}
    if not layers:
        raise ValueError(f"from_bnb: {type(model).__name__} has no Linear4bit of bitsandbytes with an NF4 weight")
    for path, layer in layers.items():
        _check_layer("from_bnb", path, layer)
        if getattr(layer.weight, "quant_state", None) is None:
            raise ValueError(f'from_bnb: "{path}" is not quantised yet; move it to a device first')
    return _convert(model, layers, _nf4_linear, to_bnb=False)


def to_bnb(model: nn.Module) -> nn.Module:
    """Every NF4Linear becomes a bitsandbytes Linear4bit on the same storage, in place: the way back of `from_bnb`.

    Args:
        model: any module, a single NF4Linear too; without adapters.

    Returns:
        The same model; for a single NF4Linear the new layer.

    Raises:
        ImportError: bitsandbytes is not installed.
        TypeError, ValueError: no layer to convert, adapters, or a weight quantised from float64, which bitsandbytes
            does not know. Nothing has changed then.
    """
    _check("to_bnb", model)
    import bitsandbytes  # noqa: F401 -- before anything changes

    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not layers:
        raise ValueError(f"to_bnb: {type(model).__name__} has no NF4Linear")
    for path, layer in layers.items():
        _check_layer("to_bnb", path, layer)
        if layer.weight_dtype == torch.float64:
            raise TypeError(f'to_bnb: "{path}" must stand for fp32, bf16 or fp16, got {layer.weight_dtype}')
        if layer.weight.is_meta:
            raise ValueError(f'to_bnb: "{path}" is on the meta device, it has no bytes')
    return _convert(model, layers, _linear4bit, to_bnb=True)


def _check(op: str, model: Any) -> None:
    check_model(op, model)
    if adapted := adapter_modules(model):
        raise ValueError(f'{op}: "{next(iter(adapted))}" has adapters; convert before adding them')


def _check_layer(op: str, path: str, layer: Any) -> None:
    if "forward" in vars(layer):
        raise ValueError(f'{op}: "{path}" has another forward, as accelerate gives to a model on several devices')


def _convert(
    model: nn.Module, layers: dict[str, Any], made_of: Callable[[str, Any], nn.Linear], *, to_bnb: bool
) -> nn.Module:
    made = {layer: made_of(path, layer) for path, layer in layers.items()}
    for layer, new in made.items():
        new.bias = layer.bias
        new.training = layer.training
        for name in _CALL_HOOKS:
            setattr(new, name, getattr(layer, name))
    if model in made:
        return made[model]
    found = places(model)
    for layer, new in made.items():
        put(model, found[layer], new)
    if getattr(model, "hf_quantizer", None) is not None:
        _change_quantizer(model, to_bnb)
    return model


def _change_quantizer(model: Any, to_bnb: bool) -> None:
    """Has transformers save a model that it loaded as what it has become."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    from peftkern.integrations.transformers import NF4Config

    config = model.hf_quantizer.quantization_config
    config = BitsAndBytesConfig(**NF4Config.to_bnb(config)) if to_bnb else NF4Config.from_bnb(config.to_dict())
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.is_loaded_in_4bit = to_bnb  # by this PEFT tells bitsandbytes' layers


def _nf4_linear(path: str, layer: Any) -> NF4Linear:
    codes, state = layer.weight.data, layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = _unpacked(path, codes, state)
    nested_absmax = nested_quant_map = offset = None
    if state.nested:
        nested_absmax, nested_quant_map, offset = state.state2.absmax, state.state2.code, state.offset
        if state.state2.blocksize != NESTED_BLOCK_SIZE:
            raise ValueError(f'from_bnb: "{path}" must have nested blocks of {NESTED_BLOCK_SIZE}')
    if state.blocksize not in BLOCK_SIZES:
        raise ValueError(f'from_bnb: "{path}" must have a block size of {BLOCK_SIZES}, got {state.blocksize}')
    # quant_storage: the same bytes in wider elements.
    codes = codes.detach().view(torch.uint8).reshape(-1, 1)
    shape = torch.Size(state.shape)
    q = NF4Weight(codes, state.absmax, nested_absmax, nested_quant_map, offset, shape, state.dtype, state.blocksize)
    check_parts(q, {name: f"{path}.{name}" for name in _PARTS})
    # Until its first call a Linear4bit without one has fp32 or nothing here; then it takes x's dtype, as None does.
    compute_dtype = layer.compute_dtype if layer.compute_type_is_set else None
    new = NF4Linear(
        shape[1],
        shape[0],
        bias=False,
        device="meta",
        dtype=state.dtype,
        block_size=state.blocksize,
        double_quant=state.nested,
        compute_dtype=compute_dtype,
    )
    new._assign(q)
    return new


def _unpacked(path: str, codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The codes and flat scales of a layer that bitsandbytes has repacked; the layer itself stays as it is."""
    import bitsandbytes.functional

    warnings.warn(f'from_bnb: bitsandbytes has rounded the scales of "{path}" to bf16', stacklevel=5)
    state = copy.copy(state)
    state.original_nested = False  # else it would quantise the scales once more
    codes, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return codes, state


def _linear4bit(path: str, layer: NF4Linear) -> nn.Linear:
    import bitsandbytes.nn

    new = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=layer.compute_dtype,
        compress_statistics=layer.double_quant,
        quant_type="nf4",
        device="meta",
    )
    entries = bnb_entries(layer.nf4)
    codes = entries.pop("weight")
    new.weight = bitsandbytes.nn.Params4bit.from_prequantized(codes.detach(), entries, device=codes.device, module=new)
    return new
