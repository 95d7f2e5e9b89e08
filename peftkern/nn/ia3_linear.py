"""IA3Linear: a frozen linear layer with a trained scale ((IA)^3, arXiv 2205.05638), over `ops.ia3_linear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._adapted_linear import AdaptedLinear
from peftkern.nn._low_rank_linear import check_adapter
from peftkern.ops.ia3_linear import ia3_linear


@dataclass(frozen=True)
class IA3Settings:
    """One adapter's hyper-parameters.

    Attributes:
        is_feedforward: the scale multiplies the input instead of the output.

    Raises:
        TypeError: not a bool.
    """

    is_feedforward: bool = False

    def __post_init__(self) -> None:
        if type(self.is_feedforward) is not bool:
            raise TypeError(f"IA3: is_feedforward must be a bool, got {self.is_feedforward!r}")


class IA3Linear(AdaptedLinear):
    """`y = l * (x W^T + bias)`, or `y = (l * x) W^T + bias` in the feed-forward block ((IA)^3, arXiv 2205.05638).

    W and bias are frozen. `ia3_l.<name>` in the state dict is l, [out, 1] or [1, in], as in HF PEFT; it starts at ones.
    Keys and values are scaled after their projection and before rotation, so that merging is exact. The output keeps
    x's dtype. Merging, hooks and switching are those of LoRALinear; bias is scaled and merged with the output.

    Args:
        base: exactly an nn.Linear or NF4Linear; it becomes `base_layer` and loses its gradients.
        is_feedforward: of the first adapter, see `IA3Settings`.
        adapter_name: of the first adapter, which is active.
        dtype: of l, fp32 or what x will have.

    Raises:
        TypeError, ValueError: a base, setting, name or dtype that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x and l.
    """

    def __init__(
        self,
        base: nn.Linear,
        is_feedforward: bool = False,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        self.ia3_l = nn.ParameterDict()
        self.add_adapter(adapter_name, is_feedforward, dtype)
        self._take_over(adapter_name)

    def scale(self, adapter_name: str) -> nn.Parameter:
        """l of an adapter, [out, 1] or [1, in]."""
        self._check_exists("scale", adapter_name)
        return cast(nn.Parameter, self.ia3_l[adapter_name])

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """(l,)."""
        return (self.scale(adapter_name),)

    def add_adapter(self, adapter_name: str, is_feedforward: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """Adds an adapter on the base layer's device, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        check_adapter(type(self).__name__, adapter_name, dtype)
        settings = IA3Settings(is_feedforward)
        self._check_new(adapter_name)
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        ones = torch.ones(shape, dtype=dtype, device=self.base_layer.weight.device)
        self.ia3_l[adapter_name] = nn.Parameter(ones, requires_grad=False)
        self.settings[adapter_name] = settings

    def reset_parameters(self) -> None:
        """Sets every scale to one; the base layer stays."""
        for name in self.settings:
            nn.init.ones_(self.scale(name))

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: {'input' if s.is_feedforward else 'output'}" for name, s in self.settings.items()
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters=({adapters}), "
            f"active={self._active}{self._state_words()}"
        )

    def _tables(self) -> tuple[Any, ...]:
        return (self.ia3_l, self.settings)

    def _adapted(self, x: Tensor) -> Tensor:
        name = cast(str, self._active)
        scale = self.scale(name).flatten()
        return ia3_linear(x, self.base_weight, scale, self.base_layer.bias, self.settings[name].is_feedforward)

    def _merged_parts(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, nn.Parameter | None]:
        """l W and l bias, or W l and bias."""
        scale = self.scale(adapter_name).to(weight.dtype)
        bias = self.base_layer.bias
        if bias is not None and not self.settings[adapter_name].is_feedforward:
            scaled = (bias.to(weight.dtype) * scale.flatten()).to(bias.dtype)
            bias = nn.Parameter(scaled, requires_grad=False)
        return weight.mul_(scale), bias
