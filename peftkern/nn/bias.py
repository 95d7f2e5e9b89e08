"""BiasLinear and BiasModule: frozen modules whose biases alone are trained (BitFit, arXiv 2106.10199)."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.nn._adapted_linear import AdaptedLinear, _Merged
from peftkern.nn._adapters import AdapterModule
from peftkern.nn._merge import MergeReport, Target, weight_dtype
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.ops._linear import FLOATING
from peftkern.ops.nf4_linear import nf4_linear


@dataclass(frozen=True)
class BiasSettings:
    """One adapter's hyper-parameters: there are none."""


class BiasAdapters(AdapterModule):
    """Named changes of one bias.

    An adapter is a vector that is added to the base's bias, zero at first; what it trains is that change and not the
    bias, so that adapters add up, and so that a bf16 bias is trained in fp32. The sum is rounded to the bias's dtype
    before it is used, so that merging changes no bit.
    """

    # A subclass says which module it is.
    base_layer: Any
    settings: dict[str, BiasSettings]

    def _begin(self, base: nn.Module, adapter_name: str, dtype: torch.dtype) -> None:
        """The part of a subclass's __init__ after the base is there."""
        self.bias_delta = nn.ParameterDict()
        self.add_adapter(adapter_name, dtype)

    @property
    def method_name(self) -> str:
        return "BitFit"

    def add_adapter(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> None:
        """Adds an adapter on the base's device, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a name or dtype that cannot be, or a name that is taken.
        """
        self._check_new(adapter_name)
        if dtype not in FLOATING:
            raise TypeError(f"{type(self).__name__}: dtype must be one of {FLOATING}, got {dtype}")
        delta = torch.zeros(self._bias_size(), dtype=dtype, device=self._bias_device())
        self.bias_delta[adapter_name] = nn.Parameter(delta, requires_grad=False)
        self.settings[adapter_name] = BiasSettings()

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """(delta,)."""
        self._check_exists("adapter_parameters", adapter_name)
        return (cast(nn.Parameter, self.bias_delta[adapter_name]),)

    def biased(self, adapter_name: str) -> Tensor:
        """The bias with an adapter: base's + delta, in the base's dtype."""
        bias, delta = self._base_bias(), self.adapter_parameters(adapter_name)[0]
        return (delta if bias is None else bias + delta).to(self._bias_dtype())

    def _base_bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", self.base_layer.bias)

    def _bias_size(self) -> torch.Size:
        return cast(nn.Parameter, self._base_bias()).shape

    def _bias_dtype(self) -> torch.dtype:
        return cast(nn.Parameter, self._base_bias()).dtype

    def _bias_device(self) -> torch.device:
        return cast(nn.Parameter, self._base_bias()).device

    def _tables(self) -> tuple[MutableMapping[str, Any] | nn.ModuleDict | nn.ParameterDict, ...]:
        return (self.bias_delta, self.settings)

    def _with_bias(self, adapter_name: str) -> tuple[nn.Module, MergeReport]:
        """The base with an adapter's bias and its own weight, not a copy of it."""
        bias, base = self.biased(adapter_name), self.base_layer
        if not torch.isfinite(bias).all():
            raise ValueError(f"merge: the bias with adapter {adapter_name!r} added has NaN or infinity in {bias.dtype}")
        merged = copy.copy(base)
        merged._parameters = base._parameters | {"bias": nn.Parameter(bias.detach(), requires_grad=False)}
        exact = self.adapter_parameters(adapter_name)[0].double()
        norm = torch.linalg.vector_norm(exact)
        own = self._base_bias()
        exact = exact if own is None else exact + own
        error = torch.linalg.vector_norm(bias - exact)
        to: Target = "nf4" if isinstance(base, NF4Linear) else "dense"
        return merged, MergeReport(adapter_name, to, bias.dtype, 0.0, (error / norm).item() if error else 0.0)


class BiasLinear(BiasAdapters, AdaptedLinear):
    """`y = x W^T + (bias + delta)` with W and bias frozen; the base may have no bias.

    Its gradient is the sum of dy over the rows: forward saves no activation. The state-dict names are `base_layer.*`
    and `bias_delta.<name>` [out]. A merged layer shares the base's weight and stays NF4 on an NF4 base.

    Args:
        base: exactly an nn.Linear or NF4Linear; it becomes `base_layer` and loses its gradients.
        adapter_name: of the first adapter, which is active.
        dtype: of the delta.

    Raises:
        TypeError, ValueError: a base, name or dtype that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x and delta.
    """

    def __init__(self, base: nn.Linear, adapter_name: str = "default", dtype: torch.dtype = torch.float32) -> None:
        AdaptedLinear.__init__(self, base)
        self._begin(base, adapter_name, dtype)
        self._take_over(adapter_name)

    @property
    def op(self) -> str:
        return "nf4_linear" if isinstance(self.base_layer, NF4Linear) else "linear"

    def _bias_size(self) -> torch.Size:
        return torch.Size((self.out_features,))

    def _bias_dtype(self) -> torch.dtype:
        return weight_dtype(cast(nn.Linear, self.base_layer))

    def _bias_device(self) -> torch.device:
        return cast(nn.Linear, self.base_layer).weight.device

    def _adapted(self, x: Tensor) -> Tensor:
        base, bias = cast(nn.Linear, self.base_layer), self.biased(cast(str, self._active))
        if isinstance(base, NF4Linear):
            return nf4_linear(x, base.nf4, bias)
        if x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, base.weight, bias)
        return F.linear(x.to(base.weight.dtype), base.weight, bias).to(x.dtype)

    @torch.no_grad()
    def merge(self, to: Target = "dense", keep_base: bool = True) -> MergeReport:
        """Runs on a layer that has the biases' sum, as exact as before.

        Args:
            to: either; the weight stays what it is, which the report says.
            keep_base: keep the base layer, so that `unmerge()` has it. False puts the merged layer in its place and
                deletes the adapter.

        Raises:
            ValueError: the merged bias has NaN or infinity, or `to` is not possible on this base.
            RuntimeError: no active adapter, already merged, adapters disabled with keep_base=False, or a meta weight.
        """
        name = self._check_mergeable(to, keep_base)
        merged, report = self._with_bias(name)
        if keep_base:
            self._merged = _Merged(cast(nn.Linear, merged), report)
        else:
            self.delete_adapter(name)
            self.base_layer = cast(nn.Linear, merged)
        return report

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters=({', '.join(self.settings)}), "
            f"active={self._active}{self._state_words()}"
        )


class BiasModule(BiasAdapters):
    """Any other module that adds its `bias` parameter, as nn.LayerNorm, nn.Conv2d or transformers' Conv1D do.

    Attributes that it does not have are the base's. The base's hooks stay on it and run.

    Args:
        base: it becomes `base_layer` and loses its gradients.
        adapter_name: of the first adapter, which is active.
        dtype: of the delta.

    Raises:
        TypeError, ValueError: a base without such a bias, or a name or dtype that cannot be.
    """

    def __init__(self, base: nn.Module, adapter_name: str = "default", dtype: torch.dtype = torch.float32) -> None:
        if not has_bias(base):
            raise TypeError(f"BiasModule: base must have a floating-point bias, got {type(base).__name__}")
        super().__init__()
        self.base_layer = base
        self.training = base.training
        self._merged: tuple[nn.Module, MergeReport] | None = None
        self._begin(base, adapter_name, dtype)
        self.set_adapter(adapter_name)
        base.requires_grad_(False)

    @property
    def op(self) -> str:
        return "bias"

    @property
    def merged(self) -> bool:
        """Whether the active adapter is merged with the base kept."""
        return self._merged is not None

    def set_adapter(self, adapter_name: str | None) -> None:
        if adapter_name is not None:
            self._check_exists("set_adapter", adapter_name)
        if adapter_name != self._active:
            self._merged = None
        super().set_adapter(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._enabled or self._active is None:
            return self.base_layer(*args, **kwargs)
        bias = cast(Tensor, self._merged[0].bias) if self._merged else self.biased(self._active)
        return torch.func.functional_call(self.base_layer, {"bias": bias}, args, kwargs)

    @torch.no_grad()
    def merge(self, to: Target = "dense", keep_base: bool = True) -> MergeReport:
        """As BiasLinear's."""
        if to not in ("dense", "nf4"):
            raise ValueError(f"BiasModule.merge: to must be 'dense' or 'nf4', got {to!r}")
        if self._active is None:
            raise RuntimeError("BiasModule.merge: no adapter is active; see set_adapter")
        if self._merged is not None:
            raise RuntimeError(f"BiasModule.merge: adapter {self._active!r} is merged already; unmerge() first")
        if not self._enabled and not keep_base:
            raise RuntimeError("BiasModule.merge: adapters are disabled; enable_adapters() before keep_base=False")
        self._merged = merged, report = self._with_bias(self._active)
        if not keep_base:
            self.delete_adapter(self._active)
            self.base_layer = merged
        return report

    def unmerge(self) -> None:
        """Computes the sum of the biases at every call again.

        Raises:
            RuntimeError: nothing is merged, or the base was not kept.
        """
        if self._merged is None:
            raise RuntimeError("BiasModule.unmerge: there is no merged adapter with its base kept")
        self._merged = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        return f"adapters=({', '.join(self.settings)}), active={self._active}"


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a floating-point bias of its own. Subclasses of nn.Linear are left out: the module around
    nn.MultiheadAttention's out_proj reads the bias and never calls it."""
    bias = module._parameters.get("bias")
    subclass = isinstance(module, nn.Linear) and type(module) is not nn.Linear
    return bias is not None and bias.is_floating_point() and not subclass
