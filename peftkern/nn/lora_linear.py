"""LoRALinear: a frozen linear layer with low-rank adapters (LoRA, arXiv 2106.09685), over `ops.lora_linear`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._adapted_linear import AdaptedLinear
from peftkern.nn._adapters import check_name
from peftkern.ops._linear import FLOATING
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


def check_adapter(op: str, name: Any, dtype: Any) -> None:
    """Raises ValueError or TypeError unless an adapter can have this name and dtype."""
    check_name(op, name)
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")


class LoRALinear(AdaptedLinear):
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
        super().__init__(base)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float | Tensor] = {}
        self.add_adapter(adapter_name, rank, alpha, dropout, use_rslora, dtype)
        self._take_over(adapter_name)

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
        check_adapter(type(self).__name__, adapter_name, dtype)
        settings = LoRASettings(rank, alpha, dropout, use_rslora)
        self._check_new(adapter_name)
        options: dict[str, Any] = {"dtype": dtype, "device": self.base_layer.weight.device}
        a, b = torch.empty(rank, self.in_features, **options), torch.empty(self.out_features, rank, **options)
        # Not nn.Linear: what replaces or re-initialises every nn.Linear of a model must pass these by.
        self.lora_A[adapter_name] = nn.ParameterDict({"weight": nn.Parameter(a, requires_grad=False)})
        self.lora_B[adapter_name] = nn.ParameterDict({"weight": nn.Parameter(b, requires_grad=False)})
        self.settings[adapter_name] = settings
        self.scaling[adapter_name] = settings.scaling
        self._reset(adapter_name)

    def reset_parameters(self) -> None:
        """Draws every adapter anew; the base layer stays."""
        for name in self.settings:
            self._reset(name)

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """(A, B)."""
        return self.factors(adapter_name)

    def _tables(self) -> tuple[Any, ...]:
        return (self.lora_A, self.lora_B, self.settings, self.scaling)

    def _adapted(self, x: Tensor) -> Tensor:
        name = cast(str, self._active)
        a, b = self.factors(name)
        dropout = self.settings[name].dropout
        return lora_linear(x, self.base_weight, a, b, self.scaling[name], self.base_layer.bias, dropout, self.training)

    def _merged_parts(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, nn.Parameter | None]:
        """W + scaling B A."""
        a, b = (factor.to(weight.dtype) for factor in self.factors(adapter_name))
        return weight.add_((b @ a).mul_(self.scaling[adapter_name])), self.base_layer.bias

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={s.rank}, scaling={float(self.scaling[name]):g}, dropout={s.dropout:g}"
            for name, s in self.settings.items()
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters=({adapters}), "
            f"active={self._active}{self._state_words()}"
        )

    def _reset(self, adapter_name: str) -> None:
        a, b = self.factors(adapter_name)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
