"""DoRALinear: low-rank adapters with a magnitude for each output (DoRA, arXiv 2402.09353), over `ops.dora_linear`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._low_rank_linear import LoRASettings, LowRankLinear, parameter
from peftkern.ops._linear import accumulate_dtype, computing_dtype
from peftkern.ops.dora_linear import DROPOUT_MODES, DropoutMode, dora_linear, dora_norm, weight_square_norm


@dataclass(frozen=True)
class DoRASettings(LoRASettings):
    """One adapter's hyper-parameters.

    Attributes:
        rank, alpha, dropout, use_rslora: as LoRA's.
        dropout_mode: "peft" or "lora_only", see `dora_linear`.
        detach_norm: treat the norm as a constant in backward (section 4.3 of the paper).

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    dropout_mode: DropoutMode = "peft"
    detach_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_mode not in DROPOUT_MODES:
            raise ValueError(f"DoRA: dropout_mode must be one of {', '.join(DROPOUT_MODES)}, got {self.dropout_mode!r}")
        if type(self.detach_norm) is not bool:
            raise TypeError(f"DoRA: detach_norm must be a bool, got {self.detach_norm!r}")


class DoRALinear(LowRankLinear):
    """`y = m / ||W + s B A|| * (x (W + s B A)^T) + bias` with W and bias frozen (DoRA, arXiv 2402.09353, equation 5).

    As LoRALinear, with a magnitude m [out] beside A and B: `lora_magnitude_vector.<name>.weight` in the state dict, HF
    PEFT's name. It starts at the norms of W's rows, so that a new adapter changes nothing.

    The norms of W + s B A are kept until A or B changes, however it is written to; W is never added to B A.

    Args:
        base: exactly an nn.Linear or NF4Linear; it becomes `base_layer` and loses its gradients.
        rank, alpha, dropout, use_rslora, dropout_mode, detach_norm: of the first adapter, see `DoRASettings`.
        adapter_name: of the first adapter, which is active.
        dtype: of A, B and m, fp32 or what x will have.

    Raises:
        TypeError, ValueError: a base, setting, name or dtype that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x, A, B and m.
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
        dropout_mode: DropoutMode = "peft",
        detach_norm: bool = True,
    ) -> None:
        super().__init__(base)
        self.lora_magnitude_vector = nn.ModuleDict()
        self._square_norm: Tensor | None = None
        self._norms: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
        self.add_adapter(adapter_name, rank, alpha, dropout, use_rslora, dtype, dropout_mode, detach_norm)
        self._take_over(adapter_name)

    def magnitude(self, adapter_name: str) -> nn.Parameter:
        """m [out] of an adapter."""
        self._check_exists("magnitude", adapter_name)
        return cast(nn.Parameter, self.lora_magnitude_vector[adapter_name].weight)

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """(A, B, m)."""
        return (*self.factors(adapter_name), self.magnitude(adapter_name))

    def add_adapter(
        self,
        adapter_name: str,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        dropout_mode: DropoutMode = "peft",
        detach_norm: bool = True,
    ) -> None:
        """Adds an adapter on the base layer's device, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        self._add(adapter_name, DoRASettings(rank, alpha, dropout, use_rslora, dropout_mode, detach_norm), dtype)
        magnitude = torch.empty(self.out_features, dtype=dtype, device=self.base_layer.weight.device)
        self.lora_magnitude_vector[adapter_name] = parameter(magnitude)
        self._reset(adapter_name)

    def _reset(self, adapter_name: str) -> None:
        super()._reset(adapter_name)
        magnitude = self.magnitude(adapter_name)
        if not magnitude.is_meta and not self.base_layer.weight.is_meta:
            with torch.no_grad():
                magnitude.copy_(self._base_square_norm().sqrt())

    def _base_square_norm(self) -> Tensor:
        if self._square_norm is None:
            with torch.no_grad():
                self._square_norm = weight_square_norm(self.base_weight)
        return self._square_norm

    def _norm(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """||W + s B A||, from memory if A and B are as they were; None where the op had better compute it."""
        a, b = self.factors(adapter_name)
        scaling, settings, dtype = self.scaling[adapter_name], self.settings[adapter_name], computing_dtype(x)
        if accumulate_dtype(x) == torch.float64 or self.base_weight.dtype == torch.float64:
            return None
        if not settings.detach_norm:
            return dora_norm(self.base_weight, a, b, scaling, self._base_square_norm(), dtype)
        with torch.no_grad():
            if torch.compiler.is_compiling() or x.device.type != "cpu":
                return dora_norm(self.base_weight, a, b, scaling, self._base_square_norm(), dtype)
            # Hashes see what versions do not: writes through .data, as some optimizers make them.
            factors = (a, b)
            state = (dtype, float(scaling), *(f._version for f in factors), *(_hash(f) for f in factors))
            known = self._norms.get(adapter_name)
            if known is None or known[0] != state:
                norm = dora_norm(self.base_weight, a, b, scaling, self._base_square_norm(), dtype)
                known = self._norms[adapter_name] = state, norm
            return known[1]

    def _adapted(self, x: Tensor) -> Tensor:
        name = cast(str, self._active)
        settings = self.settings[name]
        return dora_linear(
            x,
            self.base_weight,
            *self.factors(name),
            self.magnitude(name),
            self.scaling[name],
            self.base_layer.bias,
            settings.dropout,
            self.training,
            norm=self._norm(name, x),
            dropout_mode=settings.dropout_mode,
            detach_norm=settings.detach_norm,
        )

    def _merged_parts(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, nn.Parameter | None]:
        """m / ||V|| * V with V = W + scaling B A."""
        direction = weight.add_(self._delta(adapter_name, weight.dtype))
        norm = torch.linalg.vector_norm(direction, dim=1)
        factor = self.magnitude(adapter_name).to(weight.dtype) / norm
        return direction.mul_(factor[:, None]), self.base_layer.bias

    def _tables(self) -> tuple[Any, ...]:
        return (*super()._tables(), self.lora_magnitude_vector)

    def _forget(self) -> None:
        """What was computed from the base weight."""
        self._square_norm = None
        self._norms.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._norms.pop(adapter_name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALinear:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _hash(tensor: Tensor) -> int:
    """Of the bytes."""
    return int(torch.hash_tensor(tensor.detach()).view(torch.int64))
