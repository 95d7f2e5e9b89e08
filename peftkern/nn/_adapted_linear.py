"""A frozen linear layer with named adapters that can be merged: what LoRALinear, DoRALinear and IA3Linear share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.nn._adapters import AdapterModule
from peftkern.nn._merge import MergeReport, Target, compute_dtype, merged_linear
from peftkern.nn.nf4_linear import _CALL_HOOKS, NF4Linear
from peftkern.ops._linear import FLOATING, Weight, dense_weight


@dataclass(frozen=True)
class _Merged:
    layer: nn.Linear
    report: MergeReport


def check_base(base: Any, op: str = "LoRALinear") -> None:
    """Raises TypeError unless `base` is exactly an nn.Linear or NF4Linear: a subclass may compute something else."""
    if type(base) not in (nn.Linear, NF4Linear):
        raise TypeError(f"{op}: base must be an nn.Linear or NF4Linear, got {type(base).__name__}")
    if not isinstance(base, NF4Linear) and base.weight.dtype not in FLOATING:
        raise TypeError(f"{op}: base.weight must be {' or '.join(map(str, FLOATING))}, got {base.weight.dtype}")


class AdaptedLinear(AdapterModule):
    """A frozen linear layer and what its adapters make of it.

    The base layer's forward and backward hooks become this layer's (their handles still remove them); hooks registered
    on `base_layer` later do not run, since its forward is part of the fused one.

    Merging keeps the base layer as it is and computes with a merged copy beside it. Therefore `state_dict()` never
    holds merged weights, `unmerge()` is exact, and adapters can be disabled while merged. Gradients of a merged layer
    reach x, not the adapter. `set_adapter`, deleting the merged adapter and `load_state_dict` unmerge.

    Subclasses give `_adapted`, the op call, and `_merged_parts`, the formula of merging.
    """

    def __init__(self, base: nn.Linear) -> None:
        check_base(base, type(self).__name__)
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base_layer: nn.Linear = base
        self._merged: _Merged | None = None
        self.training = base.training

    def _take_over(self, adapter_name: str) -> None:
        """Ends a subclass's __init__, when all its arguments have been checked: only now does the base change."""
        self.set_adapter(adapter_name)
        self.base_layer.requires_grad_(False)
        for name in _CALL_HOOKS:
            setattr(self, name, getattr(self.base_layer, name))

    @property
    def merged(self) -> bool:
        """Whether the active adapter is merged with the base layer kept."""
        return self._merged is not None

    @property
    def merge_report(self) -> MergeReport | None:
        """Of the merge in force."""
        return None if self._merged is None else self._merged.report

    @property
    def merged_layer(self) -> nn.Linear | None:
        """The merged copy beside the base layer."""
        return None if self._merged is None else self._merged.layer

    @property
    def effective_layer(self) -> nn.Linear | None:
        """The plain layer that forward runs; None when it runs base and adapter in one op."""
        if self._enabled and self._merged is not None:
            return self._merged.layer
        return None if self._enabled and self._adapts() else self.base_layer

    @property
    def method_name(self) -> str:
        """With a Q before what has a rank on an NF4 base: "QLoRA r=8"."""
        own = super().method_name
        return f"Q{own}" if isinstance(self.base_layer, NF4Linear) and " r=" in own else own

    def stored_tensors(self) -> Iterable[Tensor]:
        """The merged layer's."""
        return () if self._merged is None else self._merged.layer.state_dict(keep_vars=True).values()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, or the merged one that forward runs on; the adapter is not in it unless merged."""
        return (self.effective_layer or self.base_layer).weight

    @property
    def bias(self) -> nn.Parameter | None:
        return (self.effective_layer or self.base_layer).bias

    @property
    def base_weight(self) -> Weight:
        """The base layer's weight as the linear ops take it."""
        return self.base_layer.nf4 if isinstance(self.base_layer, NF4Linear) else self.base_layer.weight

    def set_adapter(self, adapter_name: str | None) -> None:
        if adapter_name is not None:
            self._check_exists("set_adapter", adapter_name)
        if adapter_name != self._active:
            self._merged = None
        super().set_adapter(adapter_name)

    def forward(self, input: Tensor) -> Tensor:
        layer = self.effective_layer
        if layer is not None:
            return _run_plain(layer, input)
        dtype = self.base_layer.compute_dtype if isinstance(self.base_layer, NF4Linear) else None
        return self._adapted(input) if dtype is None else self._adapted(input.to(dtype)).to(input.dtype)

    def _adapts(self) -> bool:
        """Whether there is an adapter to compute with."""
        return self._active is not None

    def _adapted(self, x: Tensor) -> Tensor:
        """Base and active adapter in one op."""
        raise NotImplementedError

    def _merged_parts(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, nn.Parameter | None]:
        """The merged weight and bias.

        Args:
            adapter_name: which adapter.
            weight: the base weight [out, in] in the dtype that merging computes in; may be written over.
        """
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, to: Target = "dense", keep_base: bool = True) -> MergeReport:
        """Computes the weight that base and active adapter amount to in fp32, rounds it once and runs on that alone.

        Args:
            to: "dense", in the base weight's dtype (for NF4 the dtype it was quantised from); "nf4" quantises again,
                which loses most of an adapter that is small against W: see `MergeReport.delta_error`.
            keep_base: keep the base layer, so that `unmerge()` is exact. False puts the merged layer in its place and
                deletes the adapter: there is no way back, and training may go on with a new adapter on top.

        Raises:
            ValueError: the merged weight has NaN or infinity, or `to` is not possible on this base.
            RuntimeError: no active adapter, already merged, adapters disabled with keep_base=False, or a meta weight.
        """
        name = self._check_mergeable(to, keep_base)
        base = self.base_layer
        wide = dense_weight(self.base_weight, compute_dtype(base))
        with torch.autocast(wide.device.type, enabled=False):
            exact, bias = self._merged_parts(name, wide.clone())
        layer, report = merged_linear(base, wide, exact, bias, name, to)
        if keep_base:
            self._merged = _Merged(layer, report)
        else:
            self.delete_adapter(name)
            self.base_layer = layer
        return report

    def unmerge(self) -> None:
        """Drops the merged weight: base layer and adapter run as before the merge, bit for bit.

        Raises:
            RuntimeError: nothing is merged, or the base was not kept.
        """
        if self._merged is None:
            raise RuntimeError(
                f"{type(self).__name__}.unmerge: there is no merged adapter with its base kept "
                "(merge(keep_base=False) frees it)"
            )
        self._merged = None

    def _check_mergeable(self, to: Any, keep_base: bool) -> str:
        """The name of the adapter to merge."""
        what = f"{type(self).__name__}.merge"
        if to not in ("dense", "nf4"):
            raise ValueError(f"{what}: to must be 'dense' or 'nf4', got {to!r}")
        if to == "nf4" and not isinstance(self.base_layer, NF4Linear):
            raise ValueError(f"{what}: to='nf4' needs an NF4Linear base, got a dense one")
        if self._active is None:
            raise RuntimeError(f"{what}: no adapter is active; see set_adapter")
        if self._merged is not None:
            raise RuntimeError(f"{what}: adapter {self._active!r} is merged already; unmerge() first")
        if not self._enabled and not keep_base:
            raise RuntimeError(f"{what}: adapters are disabled; enable_adapters() before keep_base=False")
        if self.weight.is_meta:
            raise RuntimeError(f"{what}: the weight is on the meta device")
        return self._active

    def _state_words(self) -> str:
        """For extra_repr."""
        return "".join(f", {word}" for word, on in (("merged", self.merged), ("disabled", not self._enabled)) if on)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged.layer._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self._merged = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _run_plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer without its hooks, which are the AdaptedLinear's; x of any dtype, as the linear ops take it."""
    if isinstance(layer, NF4Linear) or x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return layer.forward(x)
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias).to(x.dtype)
