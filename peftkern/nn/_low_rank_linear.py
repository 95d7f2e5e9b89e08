"""What LoRALinear and DoRALinear share: a pair of factors for each adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._adapted_linear import AdaptedLinear
from peftkern.nn._adapters import check_name
from peftkern.ops._linear import FLOATING, number


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
            value = number(getattr(self, name))
            object.__setattr__(self, name, value)
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


class LowRankLinear(AdaptedLinear):
    """A frozen linear layer with adapters A [rank, in] and B [out, rank] under HF PEFT's names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float | Tensor] = {}

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """(A [rank, in], B [out, rank]) of an adapter."""
        self._check_exists("factors", adapter_name)
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return cast(nn.Parameter, a), cast(nn.Parameter, b)

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """(A, B)."""
        return self.factors(adapter_name)

    def reset_parameters(self) -> None:
        """Draws every adapter anew; the base layer stays."""
        for name in self.settings:
            self._reset(name)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: rank={s.rank}, scaling={float(self.scaling[name]):g}, dropout={s.dropout:g}"
            for name, s in self.settings.items()
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters=({adapters}), "
            f"active={self._active}{self._state_words()}"
        )

    def _add(self, adapter_name: str, settings: LoRASettings, dtype: torch.dtype) -> None:
        """Adds an adapter on the base layer's device, frozen."""
        check_adapter(type(self).__name__, adapter_name, dtype)
        self._check_new(adapter_name)
        options: dict[str, Any] = {"dtype": dtype, "device": self.base_layer.weight.device}
        self.lora_A[adapter_name] = parameter(torch.empty(settings.rank, self.in_features, **options))
        self.lora_B[adapter_name] = parameter(torch.empty(self.out_features, settings.rank, **options))
        self.settings[adapter_name] = settings
        self.scaling[adapter_name] = settings.scaling

    def _reset(self, adapter_name: str) -> None:
        a, b = self.factors(adapter_name)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def _tables(self) -> tuple[Any, ...]:
        return (self.lora_A, self.lora_B, self.settings, self.scaling)

    def _delta(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """scaling B A."""
        a, b = (factor.to(dtype) for factor in self.factors(adapter_name))
        return (b @ a).mul_(self.scaling[adapter_name])


def parameter(value: Tensor) -> nn.ParameterDict:
    """A frozen parameter called `weight`, not an nn.Linear: what replaces every nn.Linear must pass these by."""
    return nn.ParameterDict({"weight": nn.Parameter(value, requires_grad=False)})
