"""FullWeights: every weight of a model trained, as an adapter that can be switched off (full fine-tuning)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn._adapters import AdapterModule
from peftkern.nn._merge import MergeReport, Target


@dataclass(frozen=True)
class FullSettings:
    """One adapter's hyper-parameters.

    Attributes:
        target_modules: which weights, see `peftkern.methods.full`.
    """

    target_modules: str | tuple[str, ...] = "all"


class FullWeights(AdapterModule):
    """Named sets of all weights of a model.

    An adapter is a Parameter for each of the model's weights. The active one's stand in the model's own modules, under
    the plain names: state dicts, optimizers and other libraries see a model that is trained in full. The original
    Parameters wait here meanwhile, and stand there again, bit for bit, while no adapter is active or adapters are
    disabled. So this costs the original weights in memory once more, and each further adapter once more.

    It is a child of the model for the walks over modules; forward is the identity, for models that call all children.

    Args:
        places: name of a weight -> the modules and attributes where the model holds it; they are not registered here.
    """

    settings: dict[str, FullSettings]

    def __init__(self, places: dict[str, list[tuple[nn.Module, str]]]) -> None:
        super().__init__()
        self._places = places
        self._base: dict[str, nn.Parameter] = {name: getattr(*spots[0]) for name, spots in places.items()}
        self._weights: dict[str, dict[str, nn.Parameter]] = {}
        self._standing: str | None = None
        self._is_merged = False

    def add_adapter(self, adapter_name: str, names: Iterable[str], settings: FullSettings) -> None:
        """Adds an adapter with copies of the original weights, frozen until `set_adapter` makes it the active one.

        Raises:
            ValueError: a name that cannot be or is taken.
        """
        self._check_new(adapter_name)
        self._note()
        copies = {name: self._base[name].detach().clone() for name in names}
        self._weights[adapter_name] = {name: nn.Parameter(copy, requires_grad=False) for name, copy in copies.items()}
        self.settings[adapter_name] = settings

    def weights(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Name in the model -> an adapter's weight."""
        self._check_exists("weights", adapter_name)
        self._note()
        return self._weights[adapter_name]

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        return tuple(self.weights(adapter_name).values())

    def set_adapter(self, adapter_name: str | None) -> None:
        if adapter_name != self._active:
            self._is_merged = False
        super().set_adapter(adapter_name)
        self._stand()

    def enable_adapters(self) -> None:
        super().enable_adapters()
        self._stand()

    def disable_adapters(self) -> None:
        super().disable_adapters()
        self._stand()

    @property
    def merged(self) -> bool:
        return self._is_merged

    def merge(self, to: Target = "dense", keep_base: bool = True) -> MergeReport:
        """There is nothing to add up; keep_base=False frees the original weights' memory and deletes the adapter.

        Raises:
            ValueError: `to` is not "dense".
            RuntimeError: no active adapter, already merged, or adapters disabled with keep_base=False.
        """
        if to != "dense":
            raise ValueError(f"FullWeights.merge: to must be 'dense', got {to!r}")
        if self._active is None or self._is_merged:
            raise RuntimeError(f"FullWeights.merge: {'merged already' if self._is_merged else 'no adapter is active'}")
        if not self._enabled and not keep_base:
            raise RuntimeError("FullWeights.merge: adapters are disabled; enable_adapters() before keep_base=False")
        name = self._active
        weights = self.weights(name)
        if keep_base:
            self._is_merged = True
        else:
            self._base |= weights
            self.delete_adapter(name)
        return MergeReport(name, "dense", next(iter(weights.values())).dtype, 0.0, 0.0)

    def unmerge(self) -> None:
        """Undoes `merge`.

        Raises:
            RuntimeError: nothing is merged, or the base was not kept.
        """
        if not self._is_merged:
            raise RuntimeError("FullWeights.unmerge: there is no merged adapter with its base kept")
        self._is_merged = False

    def forward(self, input: Any) -> Any:
        return input

    @property
    def method_name(self) -> str:
        return "full"

    def stored_tensors(self) -> Iterable[Tensor]:
        """All weights, those that stand in the model among them."""
        return [weight for weights in (self._base, *self._weights.values()) for weight in weights.values()]

    def extra_repr(self) -> str:
        return f"weights={len(self._base)}, adapters=({', '.join(self.settings)}), active={self._active}"

    def _tables(self) -> tuple[MutableMapping[str, Any], ...]:
        return (self.settings, self._weights)

    def _note(self) -> None:
        """Takes down the Parameters that stand in the model: `.to`, `to_empty` and others may have put new ones."""
        standing = self._weights[self._standing] if self._standing else {}
        for name, spots in self._places.items():
            table = standing if name in standing else self._base
            table[name] = getattr(*spots[0])

    def _stand(self) -> None:
        """Puts into the model the weights that it should have."""
        self._note()
        self._standing = self._active if self._enabled else None
        now = self._base | (self._weights[self._standing] if self._standing else {})
        for name, spots in self._places.items():
            for module, attribute in spots:
                setattr(module, attribute, now[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullWeights:
        super()._apply(fn, recurse)
        standing = {id(getattr(*spots[0])) for spots in self._places.values()}
        for weights in (self._base, *self._weights.values()):
            for name, waiting in weights.items():
                if id(waiting) in standing:
                    continue
                moved = fn(waiting.data)
                if torch._has_compatible_shallow_copy_type(waiting.data, moved):  # nn.Module's rule: optimizers go on
                    waiting.data = moved
                else:
                    weights[name] = nn.Parameter(moved, waiting.requires_grad)
        return self
