"""Whole models: their linear layers as 4-bit ones."""

from collections.abc import Sequence

import torch
from torch import nn

from peftkern._modules import adapter_modules, check_model, output_heads, places, put, use_forward_of_linears
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear, _is_sharded
from peftkern.ops._linear import FLOATING
from peftkern.ops.nf4_quantize import BLOCK_SIZES


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> layer; a layer that the model holds more than once by its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def quantize(
    model: nn.Module,
    skip: str | Sequence[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
) -> nn.Module:
    """Swaps every nn.Linear for an NF4Linear (QLoRA, arXiv 2305.14314), in place, one layer at a time.

    Only exact nn.Linear modules, not subclasses. The output head (`lm_head`, transformers' output embeddings, linears
    tied to an embedding) stays dense; swap it by `NF4Linear.from_linear`. dtype, device, hooks, biases and the training
    flag are kept.

    Args:
        model: any module that holds linear layers; with adapters, quantise before adding them.
        skip: further layers to leave, each named by consecutive parts of its path: "layers.0", "down_proj".
        block_size, double_quant: see `nf4_quantize`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: no layer to swap, a skip name that no nn.Linear has, a wrong block size, a
            weight that is not floating point, not finite or sharded. Nothing has changed then.
    """
    check_model("quantize", model)
    if adapted := adapter_modules(model):
        raise ValueError(f'quantize: "{next(iter(adapted))}" has adapters already; quantize before add_lora and tune')
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"quantize: block_size must be one of {BLOCK_SIZES}, got {block_size}")
    linears = {path: module for path, module in model.named_modules() if path and type(module) is nn.Linear}
    patterns = [skip] if isinstance(skip, str) else list(skip or ())
    for pattern in patterns:
        if not any(_has_part(path, pattern) for path in linears):
            raise ValueError(f"quantize: skip={pattern!r} matches no nn.Linear")
    heads = output_heads(model)
    chosen = {
        path: linear
        for path, linear in linears.items()
        if linear not in heads and not any(_has_part(path, pattern) for pattern in patterns)
    }
    if not chosen:
        raise ValueError(f"quantize: {type(model).__name__} has no nn.Linear to swap besides its output head and skip")
    for path, linear in chosen.items():
        _check_quantizable(path, linear)
    found = places(model)
    for linear in chosen.values():
        put(model, found[linear], NF4Linear.from_linear(linear, block_size, double_quant))
    use_forward_of_linears(model)
    return model


def _has_part(path: str, part: str) -> bool:
    """Whether `part` is a run of whole components of `path`."""
    return f".{part}." in f".{path}."


def _check_quantizable(path: str, linear: nn.Linear) -> None:
    weight = linear.weight
    if weight.dtype not in FLOATING:
        raise TypeError(f'quantize: "{path}.weight" must be {" or ".join(map(str, FLOATING))}, got {weight.dtype}')
    if _is_sharded(weight):
        raise RuntimeError(f'quantize: "{path}.weight" is sharded; quantize before sharding')
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f'quantize: "{path}.weight" must be finite, got NaN or infinity')
