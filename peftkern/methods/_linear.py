"""What methods that wrap linear layers share: which layers, and putting the wrappers in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, cast

from torch import nn

from peftkern._modules import activate, outer_modules, output_heads, places, put, use_forward_of_linears
from peftkern.adapter_file import matches
from peftkern.methods._method import Method, did_you_mean
from peftkern.nn._adapted_linear import AdaptedLinear, check_base
from peftkern.nn._adapters import AdapterModule
from peftkern.nn.nf4_linear import NF4Linear

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that "all-linear" means. A subclass of nn.Linear may read its weight elsewhere, as
    nn.MultiheadAttention's out_proj does."""
    return type(module) in (nn.Linear, NF4Linear) or isinstance(module, AdaptedLinear)


def check_targets(op: str, paths: Collection[str], targets: str | list[str], what: str) -> None:
    """Raises ValueError unless each target, or the regular expression, matches one of the paths."""
    for target in [targets] if isinstance(targets, str) else targets:
        if not any(matches(path, targets if target is targets else [target]) for path in paths):
            raise ValueError(f"{op}: {what} {target!r} matches no module{did_you_mean(target, ends_of(paths))}")


def ends_of(paths: Iterable[str]) -> set[str]:
    """The last components of paths."""
    return {path.rpartition(".")[2] for path in paths}


def select(op: str, model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """Paths that `target_modules` means: ends of paths, a regular expression for whole paths, or "all-linear".

    Raises:
        ValueError: a target matches no module.
    """
    modules = {path: module for path, module in outer_modules(model) if path}
    if target_modules == ALL_LINEAR:
        heads = output_heads(model)
        chosen = [path for path, module in modules.items() if is_linear(module) and module not in heads]
        if not chosen:
            raise ValueError(f"{op}: {type(model).__name__} has no linear layer besides its output head")
        return chosen
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    check_targets(op, modules, targets, "target_modules")
    chosen = [path for path in modules if matches(path, targets)]
    if not chosen:
        raise ValueError(f"{op}: target_modules is empty")
    return chosen


class LinearMethod(Method):
    """A method whose module wraps one linear layer.

    The module's constructor is `module(base, **settings, adapter_name=..., dtype=...)` and its method
    `add_adapter(adapter_name, **settings, dtype=...)`, where settings are the fields of its dataclass.
    """

    module: ClassVar[type[AdaptedLinear]]

    def select(self, op: str, model: nn.Module, target_modules: str | Iterable[str], adapter_name: str) -> list[str]:
        """Paths of the layers to adapt, checked.

        Raises:
            TypeError, ValueError: a target that matches nothing, a module that cannot have such an adapter or has it.
        """
        chosen = select(op, model, target_modules)
        for path in chosen:
            layer = self.adaptable(op, path, model.get_submodule(path))
            if isinstance(layer, self.module) and adapter_name in layer.settings:
                raise ValueError(f'{op}: "{path}" has an adapter {adapter_name!r} already')
        return chosen

    def adaptable(self, op: str, path: str, module: nn.Module) -> nn.Linear | AdaptedLinear:
        """`module`, checked to be one that can have an adapter of this method.

        Raises:
            TypeError: it is no linear layer.
            ValueError: it has adapters of another method.
        """
        if type(module) is self.module:
            return module
        if isinstance(module, AdapterModule):
            raise ValueError(f'{op}: "{path}" has adapters of another method, it is a {type(module).__name__}')
        try:
            check_base(module, self.module.__name__)
        except TypeError as error:
            raise TypeError(f'{op}: "{path}": {error}') from error
        return cast(nn.Linear, module)

    def put(self, model: nn.Module, plan: Mapping[str, Any], adapter_name: str, **options: Any) -> None:
        """Adds the adapter with each path's settings, active and alone trainable. Everything was checked."""
        model.requires_grad_(False)
        found = places(model)
        for path, settings in plan.items():
            layer = model.get_submodule(path)
            own = {**asdict(settings), **options}
            if isinstance(layer, self.module):
                cast(Any, layer).add_adapter(adapter_name, **own)
            else:
                wrapped = cast(Any, self.module)(layer, **own, adapter_name=adapter_name)
                put(model, found[layer], wrapped)
        activate(model, adapter_name)
        use_forward_of_linears(model)
