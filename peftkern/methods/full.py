"""Full fine-tuning on whole models: the baseline of every comparison, with the interface of the other methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern._modules import activate, adapter_modules
from peftkern.adapter_file import CONFIG_NAME, TENSORS_NAME, check_pair, matches, read_config, read_tensors, write_pair
from peftkern.methods._method import Method
from peftkern.nn.full_weights import FullSettings, FullWeights
from peftkern.nn.nf4_linear import _is_sharded

CHILD = "full_weights"
PEFT_TYPE = "FULL"
_WRAPPED = ".base_layer."


class Full(Method):
    """Trains every floating-point parameter, in the model's dtype; 4-bit weights have none and stay.

    The file has the trained weights under the plain model's names, without wrappers of other methods. Running
    statistics and other buffers are not the adapter's.
    """

    name = "full"
    module = FullWeights
    mergeable = True

    def install(self, model: nn.Module, adapter_name: str, target_modules: str | Iterable[str] = "all") -> None:
        """See `Method.install`.

        Args:
            model: any.
            adapter_name: of the adapter.
            target_modules: ends of paths, or a regular expression for whole paths, of the parameters to train or of
                modules around them; "all" for every one.
        """
        targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
        names = self._names(self.name, model, targets)
        self._put(model, adapter_name, names, FullSettings(targets))

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        module = self._child(model)
        tensors = {_plain(name): weight for name, weight in module.weights(adapter_name).items()}
        for name, tensor in tensors.items():
            if tensor.is_meta or _is_sharded(tensor):
                raise ValueError(f'save: "{name}" is on meta or sharded and has no values to save')
        targets = module.settings[adapter_name].target_modules
        config = {
            "peft_type": PEFT_TYPE,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "base_model_name_or_path": base_model_name_or_path,
        }
        write_pair(directory, config, tensors)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == PEFT_TYPE

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        check_pair(directory)
        targets = read_config(directory / CONFIG_NAME).get("target_modules", "all")
        if not isinstance(targets, str) and not (
            isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        ):
            raise ValueError(f"load: target_modules must be a str or a list of them, got {targets!r}")
        targets = targets if isinstance(targets, str) else tuple(targets)
        tensors = read_tensors(directory / TENSORS_NAME)
        parameters = _parameters(model)
        names = self._names("load", model, targets)
        own = {_plain(name): name for name in names}
        for name in sorted(own.keys() ^ tensors.keys()):
            lacks = "the file has no" if name in own else "the model has no"
            raise ValueError(f'load: {directory / TENSORS_NAME}: {lacks} "{name}"')
        for plain, name in own.items():
            _check_fits(plain, tensors[plain], parameters[name][0])
        self._put(model, adapter_name, names, FullSettings(targets))
        with torch.no_grad():
            for plain, name in own.items():
                self._child(model).weights(adapter_name)[name].copy_(tensors[plain])

    def _child(self, model: nn.Module) -> FullWeights:
        return cast(FullWeights, getattr(model, CHILD))

    def _names(self, op: str, model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
        """The parameters that `targets` means."""
        names = list(_parameters(model))
        if targets != "all":
            wanted = targets if isinstance(targets, str) else list(targets)
            for target in [wanted] if isinstance(wanted, str) else wanted:
                if not any(_is_inside(name, wanted if target is wanted else [target]) for name in names):
                    raise ValueError(f"{op}: target_modules {target!r} matches no module with parameters")
            names = [name for name in names if _is_inside(name, wanted)]
        if not names:
            raise ValueError(f"{op}: {type(model).__name__} has no floating-point parameter to train")
        return names

    def _put(self, model: nn.Module, adapter_name: str, names: list[str], settings: FullSettings) -> None:
        activate(model, None)
        model.requires_grad_(False)
        if not isinstance(getattr(model, CHILD, None), FullWeights):
            model.add_module(CHILD, FullWeights({name: spots for name, (_, spots) in _parameters(model).items()}))
        self._child(model).add_adapter(adapter_name, names, settings)
        activate(model, adapter_name)


def _targets(config: Mapping[str, Any]) -> str | tuple[str, ...]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"load: target_modules must be a str or a list of them, got {targets!r}")
    return tuple(targets)


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Name -> floating-point parameter of the model itself, not of an adapter, and every place that holds it."""
    modules = adapter_modules(model).values()
    adapters = {
        id(parameter)
        for module in modules
        if not isinstance(module, FullWeights)
        for name in module.settings
        for parameter in module.adapter_parameters(name)
    }
    found: dict[int, tuple[str, nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and id(parameter) not in adapters:
            path, _, attribute = name.rpartition(".")
            spots = found.setdefault(id(parameter), (name, parameter, []))[2]
            spots.append((model.get_submodule(path), attribute))
    return {name: (parameter, spots) for name, parameter, spots in found.values()}


def _is_inside(name: str, targets: str | list[str]) -> bool:
    """Whether the parameter, or a module around it, is what `targets` means."""
    parts = _plain(name).split(".")
    return any(matches(".".join(parts[:length]), targets) for length in range(1, len(parts) + 1))


def _plain(name: str) -> str:
    """A parameter's name in a model without the wrappers of other methods."""
    return name.replace(_WRAPPED, ".")


def _check_fits(name: str, tensor: Tensor, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise ValueError(f'load: "{name}" is on the meta device; load the base model first')
    if not tensor.is_floating_point() or tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f'load: "{name}" must be finite, floating point and {list(parameter.shape)}, got {got}')
