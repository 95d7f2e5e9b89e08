"""BitFit (arXiv 2106.10199) on whole models: the biases alone are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from peftkern._modules import (
    activate,
    adapter_modules,
    outer_modules,
    output_heads,
    places,
    put,
    use_forward_of_linears,
)
from peftkern.adapter_file import TENSORS_NAME, check_pair, matches, read_tensors, write_pair
from peftkern.methods._linear import check_targets
from peftkern.methods._method import Method
from peftkern.nn._adapters import AdapterModule
from peftkern.nn.bias import BiasAdapters, BiasLinear, BiasModule, has_bias
from peftkern.nn.nf4_linear import NF4Linear, _is_sharded
from peftkern.ops._linear import FLOATING

PEFT_TYPE = "BITFIT"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.bias_delta")


class BitFit(Method):
    """Changes of the biases, in fp32. PEFT has no BitFit; the files are in its form, with `<path>.bias_delta` [out]."""

    name = "bitfit"
    module = BiasLinear
    mergeable = True

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        target_modules: str | Iterable[str] = "all",
        exclude_modules: str | Iterable[str] = (),
        add_missing: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Both options name whole parts of paths, as HF PEFT's: "output" is not "output_layernorm", but "output.dense"
        is also BERT's "attention.output.dense", which `exclude_modules` takes out, or a regular expression for whole
        paths.

        Args:
            model: any.
            adapter_name: of the adapter.
            target_modules: modules whose biases are trained; "all" is every module that has one, and every linear layer
                but the output head.
            exclude_modules: modules among these to leave.
            add_missing: linear layers without a bias get one, zero at first; False leaves them.
            dtype: of the changes.
        """
        if dtype not in FLOATING:
            raise TypeError(f"bitfit: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")
        paths = _select(model, _listed(target_modules), _listed(exclude_modules), add_missing)
        _put(model, paths, adapter_name, dtype)

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        tensors = {}
        for path, module in self.modules(model, adapter_name).items():
            (delta,) = module.adapter_parameters(adapter_name)
            if delta.is_meta or _is_sharded(delta):
                raise ValueError(f'save: "{path}": the adapter is on meta or sharded and has no values to save')
            tensors[f"base_model.model.{path}.bias_delta"] = delta
        write_pair(directory, {"peft_type": PEFT_TYPE, "base_model_name_or_path": base_model_name_or_path}, tensors)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == PEFT_TYPE

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        check_pair(directory)
        where, deltas = directory / TENSORS_NAME, {}
        for key, tensor in read_tensors(where).items():
            parts = _KEY.fullmatch(key)
            if parts is None or tensor.dtype not in FLOATING or not torch.isfinite(tensor).all():
                raise ValueError(f'load: {where}: "{key}" is not a module\'s bias_delta, floating point and finite')
            deltas[parts["path"]] = tensor
        if not deltas:
            raise ValueError(f"load: {where} has no tensors")
        for path, tensor in deltas.items():
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f'load: the model has no "{path}"') from error
            _check_biasable("load", path, module)
            size = _bias_size(module)
            if tensor.shape != size:
                raise ValueError(f'load: "{path}": bias_delta must have shape {list(size)}, got {list(tensor.shape)}')
        _put(model, list(deltas), adapter_name, torch.float32)
        with torch.no_grad():
            for path, tensor in deltas.items():
                cast(BiasAdapters, model.get_submodule(path)).adapter_parameters(adapter_name)[0].copy_(tensor)

    def modules(self, model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterModule]:
        return {
            path: module
            for path, module in adapter_modules(model).items()
            if isinstance(module, BiasAdapters) and (adapter_name is None or adapter_name in module.settings)
        }


def _listed(targets: str | Iterable[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, NF4Linear, BiasLinear)


def _select(model: nn.Module, targets: str | list[str], excluded: str | list[str], add_missing: bool) -> list[str]:
    """Paths of the modules whose biases are trained, checked."""
    modules = {path: module for path, module in outer_modules(model) if path}
    if targets == "all":
        heads = output_heads(model)
        chosen = [p for p, m in modules.items() if m not in heads and (_is_linear(m) or _has_bias(m) or _foreign(m))]
    else:
        check_targets("bitfit", modules, targets, "target_modules")
        chosen = [path for path in modules if matches(path, targets)]
    if excluded:
        check_targets("bitfit", modules, excluded, "exclude_modules")
        chosen = [path for path in chosen if not matches(path, excluded)]
    if not add_missing:
        chosen = [path for path in chosen if getattr(modules[path], "bias", None) is not None]
    if not chosen:
        raise ValueError(f"bitfit: {type(model).__name__} has no bias to train")
    for path in chosen:
        _check_biasable("bitfit", path, modules[path])
    return chosen


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, BiasModule) or has_bias(module)


def _foreign(module: nn.Module) -> bool:
    """An adapted layer of another method."""
    return isinstance(module, AdapterModule) and not isinstance(module, BiasAdapters) and hasattr(module, "base_layer")


def _check_biasable(op: str, path: str, module: nn.Module) -> None:
    if isinstance(module, AdapterModule) and not isinstance(module, BiasAdapters):
        raise ValueError(f'{op}: "{path}" has adapters of another method, it is a {type(module).__name__}')
    if not _is_linear(module) and not _has_bias(module):
        raise TypeError(f'{op}: "{path}" must be a linear layer or have a bias, got {type(module).__name__}')


def _bias_size(module: nn.Module) -> torch.Size:
    if _is_linear(module):
        return torch.Size((cast(nn.Linear, module).out_features,))
    return cast(nn.Parameter, module.bias).shape


def _put(model: nn.Module, paths: list[str], adapter_name: str, dtype: torch.dtype) -> None:
    """Adds the adapter, active and alone trainable. Everything was checked."""
    model.requires_grad_(False)
    found = places(model)
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, BiasAdapters):
            module.add_adapter(adapter_name, dtype)
        elif _is_linear(module):
            put(model, found[module], BiasLinear(cast(nn.Linear, module), adapter_name, dtype))
        else:
            put(model, found[module], BiasModule(module, adapter_name, dtype))
    activate(model, adapter_name)
    use_forward_of_linears(model)
