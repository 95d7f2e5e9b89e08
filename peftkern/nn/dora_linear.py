"""DoRALinear: low-rank adapters with a magnitude for each output (DoRA, arXiv 2402.09353), over `ops.dora_linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftkern.nf4 import NF4Weight
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

    On the CPU the norms of W + s B A are kept until A or B changes, however it is written to, or W does; of W's writes
    through .data only those to the whole weight are seen. Elsewhere they are computed at every call, which waits for
    nothing. W is never added to B A.

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
        self._base: tuple[_Seen, Tensor] | None = None
        self._norms: dict[str, tuple[tuple[Any, ...], tuple[Tensor, Tensor], Tensor]] = {}
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

    def _keeps(self) -> bool:
        """Whether norms are kept: on the CPU. To look at a tensor elsewhere is to wait for the device."""
        return self.base_layer.weight.device.type == "cpu" and not torch.compiler.is_compiling()

    def _base_square_norm(self) -> Tensor:
        weight = self.base_weight
        if not self._keeps():
            with torch.no_grad():
                return weight_square_norm(weight)
        parts = weight.tensors if isinstance(weight, NF4Weight) else (weight,)
        tensors = [part for part in parts if part is not None]
        if self._base is None or not self._base[0].is_of(tensors):
            self._forget()
            with _no_grad_for_keeps():
                self._base = _Seen.of(tensors), weight_square_norm(weight)
        return self._base[1]

    def _norm(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """||W + s B A||, from memory if nothing has changed; None where the op had better compute it."""
        a, b = self.factors(adapter_name)
        scaling, settings, dtype = self.scaling[adapter_name], self.settings[adapter_name], computing_dtype(x)
        if accumulate_dtype(x) == torch.float64 or self.base_weight.dtype == torch.float64:
            return None
        square_norm = self._base_square_norm()
        if not settings.detach_norm:
            return dora_norm(self.base_weight, a, b, scaling, square_norm, dtype)
        if not self._keeps():
            with torch.no_grad():
                return dora_norm(self.base_weight, a, b, scaling, square_norm, dtype)
        with _no_grad_for_keeps():
            # Copies of A and B see what versions do not: writes through .data, as some optimizers make them.
            state, known = (dtype, float(scaling)), self._norms.get(adapter_name)
            if known is None or known[0] != state or not all(map(_same, known[1], (a, b))):
                norm = dora_norm(self.base_weight, a, b, scaling, square_norm, dtype)
                known = self._norms[adapter_name] = state, (a.detach().clone(), b.detach().clone()), norm
            return known[2]

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
        self._base = None
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


# How much of each part of a base weight is compared at every call, which takes 10 us.
_SAMPLES = 512


class _Seen(NamedTuple):
    """What tells that a base weight has changed, without a copy of it.

    torch's versions count every write but those through .data. Of these, samples see such as change the whole weight,
    like a merge by `weight.data += delta`.
    """

    marks: list[tuple[Any, ...]]
    samples: list[Tensor]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Seen:
        return cls([_mark(tensor) for tensor in tensors], [_sample(tensor).clone() for tensor in tensors])

    def is_of(self, tensors: list[Tensor]) -> bool:
        return self.marks == [_mark(tensor) for tensor in tensors] and all(
            torch.equal(_sample(tensor), sample) for tensor, sample in zip(tensors, self.samples)
        )


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _sample(tensor: Tensor) -> Tensor:
    """Elements at an odd distance, so that they lie in many columns; all of a small tensor."""
    tensor = tensor.detach()
    dense = tensor if tensor.is_contiguous() or tensor.dim() != 2 else tensor.t()
    return dense.reshape(-1)[:: tensor.numel() // _SAMPLES | 1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def _no_grad_for_keeps() -> Iterator[None]:
    """For what outlives the call: what inference mode makes could not be used in training."""
    with torch.inference_mode(False), torch.no_grad():
        yield
