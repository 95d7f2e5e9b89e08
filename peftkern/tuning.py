"""The one interface: every method on whole models, by its name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern._modules import activate, adapter_modules, adapter_names, check_model, places, put, unwrapped
from peftkern.adapter_file import CONFIG_NAME, read_config
from peftkern.methods import METHODS
from peftkern.methods._linear import ALL_LINEAR
from peftkern.methods._method import Method, did_you_mean
from peftkern.nn._adapters import AdapterModule, check_name
from peftkern.nn._merge import MergeReport, Target
from peftkern.nn.full_weights import FullWeights


def tune(model: nn.Module, method: str, adapter_name: str = "default", **options: Any) -> nn.Module:
    """Adds an adapter of any method, in place, and freezes everything else. It is active; `set_adapter` switches.

    Adapters of one method share its modules; those of different methods stand beside each other in one model, as long
    as they do not want the same layer.

    Args:
        model: any module that holds what the method adapts.
        method: a name in `peftkern.methods.METHODS`, as "lora"; docs/methods.md has them all.
        adapter_name: a name that no adapter in the model has.
        options: the method's own, as rank=8.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a method, an option, a name or a target that does not exist or cannot be. Nothing has
            changed then.
    """
    check_model("tune", model)
    chosen = _method("tune", method)
    check_name("tune", adapter_name)
    chosen.check_options("tune", options)
    inner = unwrapped(model)
    if adapter_name in adapter_names(inner):
        raise ValueError(f"tune: the model has an adapter {adapter_name!r} already; delete_adapter removes it")
    chosen.install(inner, adapter_name, **options)
    return model


def save(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes one adapter, whole or not at all: as HF PEFT does where PEFT has the method.

    Args:
        model: with the adapter, active or not.
        directory: made if missing; files there are replaced.
        adapter_name: which adapter; the files do not hold its name.
        base_model_name_or_path: recorded for PEFT.

    Raises:
        ValueError: no such adapter, or it has no values to save.
        OSError: the files cannot be written.
        ImportError: safetensors is not installed.
    """
    check_model("save", model)
    inner = unwrapped(model)
    _check_exists("save", inner, adapter_name)
    owner = next((method for method in METHODS.values() if method.modules(inner, adapter_name)), None)
    if owner is None:
        raise ValueError(f"save: adapter {adapter_name!r} is of no method in peftkern.methods.METHODS")
    owner.save(inner, Path(directory), adapter_name, base_model_name_or_path)


def load(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Reads an adapter that `save` or HF PEFT wrote, in place; it becomes active and alone trainable.

    Args:
        model: the base model, with or without other adapters.
        directory: holds `adapter_config.json`, which says the method, and the weights.
        adapter_name: the name it gets.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: a file is corrupt, incomplete, of an unknown method or of another model, or the name is
            taken. Nothing has changed then.
        ImportError: safetensors is not installed.
    """
    check_model("load", model)
    check_name("load", adapter_name)
    inner, directory = unwrapped(model), Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"load: {directory} has no {CONFIG_NAME}")
    config = read_config(directory / CONFIG_NAME)
    method = next((method for method in METHODS.values() if method.reads(config)), None)
    if method is None:
        raise ValueError(f"load: {directory / CONFIG_NAME}: no method reads peft_type {config['peft_type']!r}")
    taken = [path for path, module in adapter_modules(inner).items() if adapter_name in module.settings]
    if taken and not (method.overwrites and set(taken) <= method.modules(inner, adapter_name).keys()):
        raise ValueError(f"load: the model has an adapter {adapter_name!r} already; delete_adapter removes it")
    method.load(inner, directory, adapter_name)
    return model


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Makes one adapter active and trainable, of whatever method, and freezes the others; None leaves the base alone.

    Args:
        adapter_name: which one.

    Raises:
        ValueError: no such adapter.
    """
    check_model("set_adapter", model)
    if adapter_name is not None:
        _check_exists("set_adapter", model, adapter_name)
    activate(model, adapter_name)


def enable_adapters(model: nn.Module) -> None:
    """Undoes `disable_adapters`."""
    check_model("enable_adapters", model)
    for module in adapter_modules(model).values():
        module.enable_adapters()


def disable_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    """Makes the model compute what the base alone does, bit for bit, until `enable_adapters` or the end of a `with`.

    Nothing is deleted or frozen.

    Returns:
        For `with peftkern.disable_adapters(model):`; leaving it enables what was enabled before.
    """
    check_model("disable_adapters", model)
    undo = ExitStack()
    for module in adapter_modules(model).values():
        if module.enabled:
            module.disable_adapters()
            undo.callback(module.enable_adapters)
    return undo


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes one adapter.

    If it was the active one, none is active afterwards. A layer whose last adapter it was is again the plain one it had
    been.

    Args:
        adapter_name: which one.

    Raises:
        ValueError: no such adapter.
    """
    check_model("delete_adapter", model)
    _check_exists("delete_adapter", model, adapter_name)
    for module in adapter_modules(model).values():
        if adapter_name in module.settings:
            module.delete_adapter(adapter_name)
    _remove_empty(model)


def merge(model: nn.Module, to: Target = "dense", keep_base: bool = True) -> dict[str, MergeReport]:
    """Computes with merged weights instead of base and active adapter, so that the adapter costs nothing.

    Args:
        to: "dense", in the base weight's dtype, or "nf4", which quantises again and loses most of a small adapter.
        keep_base: keep the base weights, so that `unmerge` is exact; False makes the merge final and deletes the
            adapter, and layers without another are plain ones again.

    Returns:
        Path of each layer -> what rounding the merged weight cost.

    Raises:
        ValueError: the active adapter's method cannot be merged, or a merged weight is not finite.
        RuntimeError: no adapter is active, or it is merged already.
    """
    check_model("merge", model)
    active = {path: module for path, module in adapter_modules(model).items() if module.active_adapter is not None}
    if not active:
        raise RuntimeError("merge: no adapter is active; see set_adapter")
    for path, module in active.items():
        if not hasattr(module, "merge"):
            raise ValueError(
                f'merge: {_method_of(module)} cannot be merged: what "{path or type(module).__name__}" does is no '
                "change of a weight"
            )
    reports: dict[str, MergeReport] = {}
    try:
        for path, module in active.items():
            reports[path] = _merging(module).merge(to, keep_base)
    except (ValueError, RuntimeError):
        if keep_base:
            for path in reports:
                _merging(active[path]).unmerge()
        raise
    if not keep_base:
        _remove_empty(model)
    return reports


def unmerge(model: nn.Module) -> None:
    """Drops merged weights: the model computes as before `merge`, bit for bit.

    Raises:
        RuntimeError: nothing is merged, or the base was not kept.
    """
    check_model("unmerge", model)
    merged = [module for module in adapter_modules(model).values() if getattr(module, "merged", False)]
    if not merged:
        raise RuntimeError("unmerge: nothing is merged with its base kept (merge(keep_base=False) frees it)")
    for module in merged:
        _merging(module).unmerge()


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
    METHODS["lora"].install(model, adapter_name, rank, alpha, dropout, target_modules, use_rslora, dtype)
    return model


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes one LoRA adapter as HF PEFT does, whole or not at all (`save` does so for every method).

    `adapter_config.json` and `adapter_model.safetensors`: `peft.PeftModel.from_pretrained(base_model, directory)`
    reads it. A scaling that was changed by hand is not saved.

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
    METHODS["lora"].save(unwrapped(model), Path(directory), adapter_name, base_model_name_or_path)


def load_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Reads a LoRA adapter that HF PEFT or `save_adapter` wrote, in place (`load` does so for every method).

    It becomes active and trainable. Onto a model without this adapter it does what `add_lora` does, with fp32
    factors. Onto one that has it with the
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
    METHODS["lora"].load(unwrapped(model), Path(directory), adapter_name)
    return model


def _method(op: str, name: Any) -> Method:
    if not isinstance(name, str):
        raise TypeError(f"{op}: method must be a str, got {type(name).__name__}")
    if name not in METHODS:
        raise ValueError(f"{op}: no method {name!r}{did_you_mean(name, METHODS)}; there is {', '.join(METHODS)}")
    return METHODS[name]


def _method_of(module: AdapterModule) -> str:
    """The name of the first method that has such modules."""
    names = (name for name, method in METHODS.items() if method.modules(module))
    return next(names, type(module).__name__)


def _check_exists(op: str, model: nn.Module, adapter_name: str) -> None:
    names = adapter_names(model)
    if adapter_name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"{op}: no adapter {adapter_name!r}{did_you_mean(adapter_name, names)}; there is {known}")


def _remove_empty(model: nn.Module) -> None:
    """Puts the base in the place of each module that has no adapter left."""
    found = places(model)
    for module in adapter_modules(model).values():
        if module.settings or found[module] == [""]:
            continue
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            put(model, found[module], base)
        elif isinstance(module, FullWeights):
            for path in found[module]:
                parent, _, attribute = path.rpartition(".")
                delattr(model.get_submodule(parent), attribute)


def _merging(module: AdapterModule) -> Any:
    """A module that was found to have `merge` and `unmerge`."""
    return module
