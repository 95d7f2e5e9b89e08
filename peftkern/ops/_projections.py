"""Linear layers with optional adapters, several in one op: arguments, checks, seeds and the native ops' lists."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.engines.torch import linear as composed
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    check_linear,
    dense_weight,
    grad_bias,
    native_weight,
)
from peftkern.ops.lora_linear import check_lora, lora_linear_reference


class Projection(NamedTuple):
    """One of them. Without an adapter lora_a and lora_b are None."""

    weight: Weight
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float | Tensor
    bias: Tensor | None


class NativeProjections(NamedTuple):
    """The lists of a native op's schema."""

    w: list[Tensor]
    wf: list[int]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scalings: list[float]
    biases: list[Tensor]


def check_projection(op: str, x: Any, projection: Projection, dropout_p: Any) -> int:
    """Checks every argument of one projection; returns its out_features."""
    weight, lora_a, lora_b, scaling, bias = projection
    if lora_a is None and lora_b is None:
        return check_linear(op, x, weight, bias)[0]
    return check_lora(op, x, weight, lora_a, lora_b, scaling, bias, dropout_p)[0]


def draw_seeds(
    projections: Sequence[Projection], dropout_p: float, training: bool, device: torch.device | str = "cpu"
) -> Tensor | None:
    """One seed for each, drawn as one lora_linear after the other would; 0 where there is no adapter."""
    if not training or dropout_p == 0:
        return None
    no_seed = torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([no_seed if p.lora_a is None else draw_seed(device) for p in projections])


def projection_reference(
    x: Tensor, projection: Projection, dropout_p: float, seeds: Tensor | None, index: int
) -> Tensor:
    """One projection in plain torch, not rounded if x is in the dtype that references compute in."""
    weight, lora_a, lora_b, scaling, bias = projection
    if lora_a is None or lora_b is None:
        compute = accumulate_dtype(x)
        bias = None if bias is None else bias.to(compute)
        return F.linear(x.to(compute), dense_weight(weight, compute), bias).to(x.dtype)
    seed = None if seeds is None else seeds[index]
    return lora_linear_reference(x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed)


def native_projections(projections: Sequence[Projection]) -> NativeProjections:
    """Adapters that are missing have rank 0 there, biases no elements."""
    present = next((p.lora_a for p in projections if p.lora_a is not None), None)
    dtype = torch.float32 if present is None else present.dtype
    lists = NativeProjections([], [], [], [], [], [])
    for weight, lora_a, lora_b, scaling, bias in projections:
        out_features, in_features = weight.shape
        parts, native_format = native_weight(weight)
        if lora_a is None or lora_b is None:
            lora_a = parts[0].new_empty((0, in_features), dtype=dtype)
            lora_b, scaling = parts[0].new_empty((out_features, 0), dtype=dtype), 0.0
        elif isinstance(scaling, Tensor):  # folded into B [out, rank]: torch differentiates it
            lora_b, scaling = lora_b.float() * scaling, 1.0
        lists.w.extend(parts)
        lists.wf.extend(native_format)
        lists.lora_as.append(lora_a)
        lists.lora_bs.append(lora_b)
        lists.scalings.append(scaling)
        lists.biases.append(parts[0].new_empty(0, dtype=dtype) if bias is None else bias)
    return lists


def composed_projections(projections: Sequence[Projection]) -> list[composed.Projection]:
    """As the engine that composes torch's ops takes them."""
    made = []
    for weight, lora_a, lora_b, scaling, bias in projections:
        if lora_b is not None and isinstance(scaling, Tensor):  # folded into B [out, rank]: torch differentiates it
            lora_b, scaling = lora_b.float() * scaling, 1.0
        scaling = 0.0 if lora_b is None else float(scaling)
        made.append(composed.Projection(FrozenWeight.of(weight), lora_a, lora_b, scaling, bias))
    return made


def stacked_dtype(lora_as: Sequence[Tensor]) -> torch.dtype:
    """Of the gradients of several A's one below the other."""
    dtypes = {lora_a.dtype for lora_a in lora_as}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def split_grad_a(grad_a: Tensor, lora_as: Sequence[Tensor]) -> list[Tensor]:
    """Each A's gradient."""
    parts = grad_a.split([lora_a.shape[0] for lora_a in lora_as])
    return [part.to(lora_a.dtype) for part, lora_a in zip(parts, lora_as)]


def grad_biases(needed: Sequence[bool], grad_ys: Sequence[Tensor], biases: Sequence[Any]) -> list[Tensor | None]:
    return [grad_bias(dy, bias) if need else None for need, dy, bias in zip(needed, grad_ys, biases)]


def stacked_products(call: Any) -> Tensor:
    """h [rows, sum of ranks] without values."""
    rank = sum(lora_a.shape[0] for lora_a in call.lora_as)
    return call.x.new_empty((math.prod(call.x.shape[:-1]), rank), dtype=torch.float32)
