"""What the linear ops share: argument checks, autocast and the weight as the native ops take it."""

import numbers
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from peftkern.engines.torch.decode import DENSE, NF4
from peftkern.nf4 import NF4Weight

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# As an argument, also while torch.compile traces it.
NUMBER = (int, float, torch.SymInt, torch.SymFloat)

Weight = Tensor | NF4Weight

P = ParamSpec("P")
T = TypeVar("T")


def number(value: Any) -> Any:
    """A number of another kind, such as numpy's, as a float; anything else as it is, to be checked."""
    if isinstance(value, Tensor | bool) or type(value) in NUMBER:
        return value
    # torch.compile takes numpy's numbers for arrays without dimensions.
    if torch.compiler.is_compiling() and type(value).__name__ == "ndarray" and value.ndim == 0:
        return torch.as_tensor(value)
    return float(value) if isinstance(value, numbers.Real) else value


def oracle(reference: Callable[P, T]) -> Callable[P, T]:
    """A reference that computes in the dtypes it says, also under the caller's autocast."""

    @wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        kind = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return reference(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return reference(*args, **kwargs)

    return run


def computing_dtype(x: Tensor) -> torch.dtype:
    """x's dtype once autocast has cast it, which leaves float64 alone as torch's does."""
    if x.dtype == torch.float64:
        return x.dtype
    kind = x.device.type
    # Meta has no autocast and may not even be asked.
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in autocast's dtype where autocast is on. Scales and adapters are never cast."""
    dtype = computing_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, bias


class WeightFormat(NamedTuple):
    """What `wf` of a schema says of one weight, see csrc/common/weight_format.h: how its `parts` tensors are read."""

    format: int
    block_size: int
    out_features: int
    in_features: int
    parts: int


def native_weight(weight: Weight) -> tuple[list[Tensor], list[int]]:
    """The weight as `w` and `wf` of a schema; those of several weights are one after the other."""
    if isinstance(weight, NF4Weight):
        parts = [part for part in weight.tensors if part is not None]
        return parts, [NF4, weight.block_size, *weight.shape, len(parts)]
    return [weight], [DENSE, 0, *weight.shape, 1]


def formats_of(wf: Sequence[int]) -> list[WeightFormat]:
    """Of each weight."""
    count = len(WeightFormat._fields)
    return [WeightFormat(*wf[i : i + count]) for i in range(0, len(wf), count)]


def out_features_of(wf: Sequence[int]) -> int:
    """Of the one weight."""
    return WeightFormat(*wf).out_features


def in_features_of(wf: Sequence[int]) -> int:
    return WeightFormat(*wf).in_features


def dense_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, for references."""
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """What references compute in: float64 for float64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """`value` is a tensor of one of `dtypes` on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if value.device != device:
        raise RuntimeError(f"{op}: {name} must be on x's device {device}, got {value.device}")


def check_linear(op: str, x: Any, weight: Any, bias: Any) -> tuple[int, int]:
    """Checks x [..., in], weight [out, in] and bias [out]; returns (out_features, in_features)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    check_tensor(op, "x", x, FLOATING, x.device)
    if isinstance(weight, NF4Weight):
        names = ("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight.offset")
        for name, part in zip(names, weight.tensors):
            if part is not None and part.device != x.device:
                raise RuntimeError(f"{op}: {name} must be on x's device {x.device}, got {part.device}")
    elif isinstance(weight, Tensor):
        check_tensor(op, "weight", weight, FLOATING, x.device)
    else:
        raise TypeError(f"{op}: weight must be a Tensor or NF4Weight, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight must have shape [out, in], got {list(weight.shape)}")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x must have shape [..., {in_features}] (weight's in), got {list(x.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, FLOATING, x.device)
        if bias.dim() != 1 or bias.shape[0] != out_features:
            raise ValueError(f"{op}: bias must have shape [{out_features}] (weight's out), got {list(bias.shape)}")
    return out_features, in_features


def empty_like(tensor: Tensor, needed: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Dense and of its shape, in its dtype or another; empty if it is not needed, as native ops leave such results."""
    return tensor.new_empty(tensor.shape if needed else (0,), dtype=dtype)


def grad_weights(
    needed: Sequence[bool], grad_ys: Sequence[Tensor], xs: Sequence[Tensor], w: Sequence[Any], wf: Sequence[int]
) -> list[Tensor | None]:
    """Of each tensor of `w`: of dense weights [out, in], by torch's matmul."""
    grads: list[Tensor | None] = []
    for grad_y, x, weight in zip(grad_ys, xs, formats_of(wf)):
        place = len(grads)
        grads += [None] * weight.parts
        if weight.format == DENSE and needed[place]:
            product = grad_y.reshape(-1, grad_y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            grads[place] = product.to(w[place].dtype)
    return grads


def grad_bias(grad_y: Tensor, bias: Any) -> Tensor:
    """The sum over all rows in fp32, in the dtype of the bias."""
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
