"""LoRALinear: a frozen linear layer with low-rank adapters (LoRA, arXiv 2106.09685), over `ops.lora_linear`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.nn._merge import MergeReport, Target, compute_dtype, merged_linear
from peftkern.nn.nf4_linear import _CALL_HOOKS, NF4Linear
from peftkern.ops._linear import FLOATING, Weight
from peftkern.ops.lora_linear import lora_linear


@dataclass(frozen=True)
class LoRASettings:
    """One adapter's hyper-parameters.

    Attributes:
        rank: columns of B and rows of A, positive.
        alpha: the low-rank product is scaled by alpha / rank.
        dropout: probability of dropping an element of x on the low-rank path in training.
        use_rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int:
            raise TypeError(f"LoRA: rank must be an int, got {self.rank!r}")
        if self.rank < 1:
            raise ValueError(f"LoRA: rank must be positive, got {self.rank}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"LoRA: {name} must be a number, got {value!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"LoRA: alpha must be finite, got {self.alpha}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"LoRA: dropout must be from 0 to 1, got {self.dropout}")
        if type(self.use_rslora) is not bool:
            raise TypeError(f"LoRA: use_rslora must be a bool, got {self.use_rslora!r}")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class _Merged:
    layer: nn.Linear
    report: MergeReport


def check_adapter(name: Any, dtype: Any) -> None:
    """Raises ValueError or TypeError unless an adapter can have this name and dtype."""
    # hasattr: torch's containers refuse the names of their own methods.
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"LoRALinear: adapter_name must be a name without '.' that nn.ModuleDict takes, got {name!r}")
    if dtype not in FLOATING:
        raise TypeError(f"LoRALinear: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")


def check_base(base: Any) -> None:
    """Raises TypeError unless `base` is exactly an nn.Linear or NF4Linear: a subclass may compute something else."""
    if type(base) not in (nn.Linear, NF4Linear):
        raise TypeError(f"LoRALinear: base must be an nn.Linear or NF4Linear, got {type(base).__name__}")
    if not isinstance(base, NF4Linear) and base.weight.dtype not in FLOATING:
        raise TypeError(f"LoRALinear: base.weight must be {' or '.join(map(str, FLOATING))}, got {base.weight.dtype}")


class LoRALinear(nn.Module):
    """`y = x W^T + bias + scaling * (dropout(x) A^T) B^T` with W and bias frozen (LoRA, arXiv 2106.09685, equation 3).

    State-dict names are HF PEFT's: `base_layer.*`, `lora_A.<name>.weight` [rank, in] and `lora_B.<name>.weight`
    [out, rank]. A starts as nn.Linear's weight does, B at zero. One adapter is active, and trainable, at a time;
    without one, or with adapters disabled, the layer computes what the base layer does, bit for bit.

    The base layer's forward and backward hooks become this layer's (their handles still remove them); hooks registered
    on `base_layer` later do not run, since its forward is part of the fused one.

    Merging keeps the base layer as it is and computes with a merged copy beside it. Therefore `state_dict()` never
    holds merged weights, `unmerge()` is exact, and adapters can be disabled while merged. Gradients of a merged layer
    reach x, not the adapter. `set_adapter`, deleting the merged adapter and `load_state_dict` unmerge.

    Args:
        base: exactly an nn.Linear or NF4Linear; it becomes `base_layer` and loses its gradients.
        rank, alpha, dropout, use_rslora: of the first adapter, see `LoRASettings`.
        adapter_name: of the first adapter, which is active.
        dtype: of A and B, fp32 or what x will have.

    Attributes:
        settings: adapter name -> LoRASettings.
        scaling: adapter name -> float or 0-d tensor; starts as the settings say, read at every call.

    Raises:
        TypeError, ValueError: a base, setting, name or dtype that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x, A and B.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_base(base)
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base_layer: nn.Linear = base
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.settings: dict[str, LoRASettings] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self._active: str | None = None
        self._enabled = True
        self._merged: _Merged | None = None
        self.add_adapter(adapter_name, rank, alpha, dropout, use_rslora, dtype)
        self.set_adapter(adapter_name)
        base.requires_grad_(False)
        self.training = base.training
        for name in _CALL_HOOKS:
            setattr(self, name, getattr(base, name))

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def enabled(self) -> bool:
        return self._enabled

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
        """The merged copy beside the base layer; shares its bias."""
        return None if self._merged is None else self._merged.layer

    @property
    def effective_layer(self) -> nn.Linear | None:
        """The plain layer that forward runs; None when it runs base and adapter in one `lora_linear`."""
        if self._enabled and self._merged is not None:
            return self._merged.layer
        return None if self._enabled and self._active is not None else self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, or the merged one that forward runs on; the adapter is not in it unless merged."""
        return (self.effective_layer or self.base_layer).weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(A [rank, in], B [out, rank]) of an adapter."""
        self._check_exists("factors", adapter_name)
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return cast(nn.Parameter, a), cast(nn.Parameter, b)

    def add_adapter(
        self,
        adapter_name: str,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds an adapter on the base layer's device, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        check_adapter(adapter_name, dtype)
        settings = LoRASettings(rank, alpha, dropout, use_rslora)
        if adapter_name in self.settings:
            raise ValueError(f"LoRALinear.add_adapter: adapter {adapter_name!r} exists already")
        options: dict[str, Any] = {"dtype": dtype, "device": self.base_layer.weight.device}
        a, b = torch.empty(rank, self.in_features, **options), torch.empty(self.out_features, rank, **options)
        # Not nn.Linear: what replaces or re-initialises every nn.Linear of a model must pass these by.
        self.lora_A[adapter_name] = nn.ParameterDict({"weight": nn.Parameter(a, requires_grad=False)})
        self.lora_B[adapter_name] = nn.ParameterDict({"weight": nn.Parameter(b, requires_grad=False)})
        self.settings[adapter_name] = settings
        self.scaling[adapter_name] = settings.scaling
        self._reset(adapter_name)

    def set_adapter(self, adapter_name: str | None) -> None:
        """Makes one adapter active and trainable and freezes the others; None leaves the base layer alone. Unmerges.

        Raises:
            ValueError: no such adapter.
        """
        if adapter_name is not None:
            self._check_exists("set_adapter", adapter_name)
        if adapter_name != self._active:
            self._merged = None
        self._active = adapter_name
        for name in self.settings:
            for factor in self.factors(name):
                factor.requires_grad_(name == adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the active one, none is active afterwards.

        Raises:
            ValueError: no such adapter.
        """
        self._check_exists("delete_adapter", adapter_name)
        if adapter_name == self._active:
            self.set_adapter(None)
        for table in (self.lora_A, self.lora_B, self.settings, self.scaling):
            del table[adapter_name]

    def enable_adapters(self) -> None:
        """Undoes `disable_adapters`; a merge made before is in force again."""
        self._enabled = True

    def disable_adapters(self) -> None:
        """Computes with the base layer alone, also while merged. Nothing is unmerged, deleted or frozen."""
        self._enabled = False

    def reset_parameters(self) -> None:
        """Draws every adapter anew; the base layer stays."""
        for name in self.settings:
            self._reset(name)

    def forward(self, input: Tensor) -> Tensor:
        layer = self.effective_layer
        if layer is not None:
            return _run_plain(layer, input)
        base, name = self.base_layer, cast(str, self._active)
        a, b = self.factors(name)
        weight: Weight = base.nf4 if isinstance(base, NF4Linear) else base.weight
        dtype = base.compute_dtype if isinstance(base, NF4Linear) else None
        x = input if dtype is None else input.to(dtype)
        y = lora_linear(x, weight, a, b, self.scaling[name], base.bias, self.settings[name].dropout, self.training)
        return y if dtype is None else y.to(input.dtype)

    @torch.no_grad()
    def merge(self, to: Target = "dense", keep_base: bool = True) -> MergeReport:
        """Computes W + scaling B A of the active adapter in fp32, rounds it once and runs on that alone.

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
        a, b = (factor.to(compute_dtype(self.base_layer)) for factor in self.factors(name))
        with torch.autocast(a.device.type, enabled=False):
            delta = (b @ a).mul_(self.scaling[name])
        layer, report = merged_linear(self.base_layer, delta, name, to)
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
                "LoRALinear.unmerge: there is no merged adapter with its base kept (merge(keep_base=False) frees it)"
            )
        self._merged = None

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={s.rank}, scaling={float(self.scaling[name]):g}, dropout={s.dropout:g}"
            for name, s in self.settings.items()
        )
        state = "".join(f", {word}" for word, on in (("merged", self.merged), ("disabled", not self._enabled)) if on)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters=({adapters}), "
            f"active={self._active}{state}"
        )

    def _check_exists(self, method: str, adapter_name: str) -> None:
        if adapter_name not in self.settings:
            known = ", ".join(map(repr, self.settings)) or "none"
            raise ValueError(f"LoRALinear.{method}: no adapter {adapter_name!r}; there is {known}")

    def _check_mergeable(self, to: Any, keep_base: bool) -> str:
        """The name of the adapter to merge."""
        if to not in ("dense", "nf4"):
            raise ValueError(f"LoRALinear.merge: to must be 'dense' or 'nf4', got {to!r}")
        if to == "nf4" and not isinstance(self.base_layer, NF4Linear):
            raise ValueError("LoRALinear.merge: to='nf4' needs an NF4Linear base, got a dense one")
        if self._active is None:
            raise RuntimeError("LoRALinear.merge: no adapter is active; see set_adapter")
        if self._merged is not None:
            raise RuntimeError(f"LoRALinear.merge: adapter {self._active!r} is merged already; unmerge() first")
        if not self._enabled and not keep_base:
            raise RuntimeError("LoRALinear.merge: adapters are disabled; enable_adapters() before keep_base=False")
        if self.weight.is_meta:
            raise RuntimeError("LoRALinear.merge: the weight is on the meta device")
        return self._active

    def _reset(self, adapter_name: str) -> None:
        a, b = self.factors(adapter_name)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged.layer._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self._merged = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _run_plain(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer without its hooks, which are the LoRALinear's; x of any dtype, as `lora_linear` takes it."""
    if isinstance(layer, NF4Linear) or x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return layer.forward(x)
    return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias).to(x.dtype)
