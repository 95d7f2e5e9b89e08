"""Whole models: quantise the linear layers, put adapters on them, and write and read those as HF PEFT does."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import nn

from peftkern._modules import check_model, outer_modules, output_heads, places, put, unwrapped, use_forward_of_linears
from peftkern.adapter_file import AdapterFile, matches, read_adapter, targets_for, write_adapter
from peftkern.nn._adapted_linear import check_base
from peftkern.nn._low_rank_linear import LoRASettings, check_adapter
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear, _is_sharded
from peftkern.ops._linear import FLOATING
from peftkern.ops.nf4_quantize import BLOCK_SIZES

ALL_LINEAR = "all-linear"
# Exact types: a subclass may read its weight elsewhere, as nn.MultiheadAttention's out_proj does.
ADAPTABLE = (nn.Linear, NF4Linear, LoRALinear)

# A layer and its settings-to-be, by the layer's path.
Plan = dict[str, LoRASettings]


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
    if wrapped := lora_layers(model):
        raise ValueError(f'quantize: "{next(iter(wrapped))}" has adapters already; quantize before add_lora')
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


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    use_rslora: bool = False,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Wraps linear layers in LoRALinear (LoRA, arXiv 2106.09685), in place, and freezes all other parameters.

    A second call with another `adapter_name` adds that adapter beside the first. The new adapter is the active one;
    layers that do not have it run without any.

    Args:
        model: any module that holds nn.Linear or NF4Linear (exactly these), or LoRALinear.
        rank, alpha, dropout, use_rslora: see `LoRASettings`.
        target_modules: as HF PEFT: ends of paths ("q_proj", "mlp.up_proj"), a regular expression for whole paths, or
            "all-linear", which is all but the output head.
        adapter_name: of the adapter.
        dtype: of A and B, fp32 or what activations will have.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a target that matches nothing or a module that is not linear, a setting, name or dtype
            that cannot be, or a layer that has this adapter already. Nothing has changed then.
    """
    check_model("add_lora", model)
    settings = LoRASettings(rank, alpha, dropout, use_rslora)
    check_adapter("add_lora", adapter_name, dtype)
    plan = {path: settings for path in _select(model, target_modules)}
    for path in plan:
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALinear) and adapter_name in layer.settings:
            raise ValueError(f'add_lora: "{path}" has an adapter {adapter_name!r} already')
    _install(model, plan, adapter_name, dtype)
    return model


def _select(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Paths of the layers to adapt."""
    modules = {path: module for path, module in outer_modules(model) if path}
    if target_modules == ALL_LINEAR:
        heads = output_heads(model)
        chosen = [path for path, module in modules.items() if type(module) in ADAPTABLE and module not in heads]
        if not chosen:
            raise ValueError(f"add_lora: {type(model).__name__} has no linear layer besides its output head")
        return chosen
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(matches(path, targets if target is targets else [target]) for path in modules):
            raise ValueError(f"add_lora: target_modules {target!r} matches no module")
    chosen = [path for path in modules if matches(path, targets)]
    if not chosen:
        raise ValueError("add_lora: target_modules is empty")
    for path in chosen:
        _adaptable("add_lora", path, modules[path])
    return chosen


def _adaptable(op: str, path: str, module: nn.Module) -> nn.Linear | LoRALinear:
    """`module`, checked to be one that can have an adapter."""
    if isinstance(module, LoRALinear):
        return module
    try:
        check_base(module)
    except TypeError as error:
        raise TypeError(f'{op}: "{path}": {error}') from error
    return cast(nn.Linear, module)


def _install(model: nn.Module, plan: Plan, adapter_name: str, dtype: torch.dtype) -> None:
    """Adds the adapter where `plan` says, active and alone trainable. Everything was checked."""
    model.requires_grad_(False)
    found = places(model)
    for path, settings in plan.items():
        layer = model.get_submodule(path)
        if isinstance(layer, LoRALinear):
            layer.add_adapter(adapter_name, **asdict(settings), dtype=dtype)
        else:
            linear = cast(nn.Linear, layer)
            wrapped = LoRALinear(linear, **asdict(settings), adapter_name=adapter_name, dtype=dtype)
            put(model, found[layer], wrapped)
    _activate(model, adapter_name)
    use_forward_of_linears(model)


def _activate(model: nn.Module, adapter_name: str) -> None:
    for layer in lora_layers(model).values():
        layer.set_adapter(adapter_name if adapter_name in layer.settings else None)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes one adapter as HF PEFT does: `adapter_config.json` and `adapter_model.safetensors`, whole or not at all.

    `peft.PeftModel.from_pretrained(base_model, directory)` reads it. A scaling that was changed by hand is not saved.

    Args:
        model: with LoRALinear layers.
        directory: made if missing; files there are replaced.
        adapter_name: which adapter; the files do not hold its name.
        base_model_name_or_path: recorded for PEFT.

    Raises:
        ValueError: no layer has this adapter, its weights are on meta, or dropout or use_rslora differ between layers.
        OSError: the files cannot be written.
        ImportError: safetensors is not installed.
    """
    model = unwrapped(model)
    layers = {path: layer for path, layer in lora_layers(model).items() if path and adapter_name in layer.settings}
    if not layers:
        raise ValueError(f"save_adapter: the model holds no LoRALinear with an adapter {adapter_name!r}")
    factors = {path: layer.factors(adapter_name) for path, layer in layers.items()}
    for path, pair in factors.items():
        if any(factor.is_meta or _is_sharded(factor) for factor in pair):
            raise ValueError(f'save_adapter: "{path}": the adapter is on meta or sharded and has no values to save')
    settings = {path: layer.settings[adapter_name] for path, layer in layers.items()}
    targets = targets_for(layers, (path for path, _ in outer_modules(model) if path))
    write_adapter(Path(directory), AdapterFile(dict(factors), settings, targets, base_model_name_or_path))


def load_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Reads an adapter that HF PEFT or `save_adapter` wrote, in place; it becomes active and trainable.

    Onto a model without this adapter it does what `add_lora` does, with fp32 factors. Onto one that has it with the
    same settings the values are copied into the parameters there, so that an optimizer goes on with them.

    Args:
        model: the base model, with or without LoRALinear layers.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: the name it gets.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: a file is corrupt, incomplete, not LoRA or uses a PEFT option that is not supported; it
            does not fit the model or the adapter of that name. Nothing has changed then.
        ImportError: safetensors is not installed.
    """
    check_model("load_adapter", model)
    given, model = model, unwrapped(model)
    check_adapter("load_adapter", adapter_name, torch.float32)
    file = read_adapter(Path(directory))
    for path in file.factors:
        _check_fits(model, path, file)
    _check_complete(model, file)
    existing = {path: layer for path, layer in lora_layers(model).items() if adapter_name in layer.settings}
    if existing:
        theirs = {path: layer.settings[adapter_name] for path, layer in existing.items()}
        if theirs != file.settings:
            path = next(p for p in (*theirs, *file.settings) if theirs.get(p) != file.settings.get(p))
            raise ValueError(
                f'load_adapter: the model has another adapter {adapter_name!r}: "{path}" is {theirs.get(path)} there '
                f"and {file.settings.get(path)} in {directory}"
            )
        _activate(model, adapter_name)
    else:
        _install(model, file.settings, adapter_name, torch.float32)
    with torch.no_grad():
        for path, pair in file.factors.items():
            layer = cast(LoRALinear, model.get_submodule(path))
            if layer.merged:
                layer.unmerge()
            for own, read in zip(layer.factors(adapter_name), pair):
                own.copy_(read)
    return given


def _check_fits(model: nn.Module, path: str, file: AdapterFile) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f'load_adapter: the model has no "{path}"') from error
    layer = _adaptable("load_adapter", path, module)
    if layer.weight.is_meta:
        raise ValueError(f'load_adapter: "{path}" is on the meta device; load the base model first')
    rank = file.settings[path].rank
    wanted = [[rank, layer.in_features], [layer.out_features, rank]]
    got = [list(factor.shape) for factor in file.factors[path]]
    if got != wanted:
        raise ValueError(f'load_adapter: "{path}": lora_A and lora_B must have shapes {wanted}, got {got}')


def _check_complete(model: nn.Module, file: AdapterFile) -> None:
    """The file has tensors for all the linear layers that its config names."""
    if file.target_modules is None:
        return
    for path, module in outer_modules(model):
        if type(module) in ADAPTABLE and path not in file.factors and matches(path, file.target_modules):
            raise ValueError(f'load_adapter: the file is incomplete: its config names "{path}", its tensors do not')
