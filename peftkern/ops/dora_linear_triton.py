"""dora_linear in Triton: torch's product with the base, and all that is around it in one pass each way.

Forward: one pass over x for h (and, where the base is dropped too, for what is kept of x and the rest), one over y that
adds the low-rank part, scales, adds the bias and leaves z. Backward: one pass over dy gives dh, g * dy and dg, one dB.
The products with the base are rounded to x's dtype before the pass that uses them. The norm: see `_dora_norm_triton`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.ops._dora_norm_triton import (
    dora_linear_norm,
    dora_linear_norm_backward,
    dora_linear_square_norm,
    norm_configurations,
)
from peftkern.ops._linear_triton import Base, rows_of, scale_columns, sum_parts
from peftkern.ops._passes_triton import down, mask_of, outer, up
from peftkern.ops._triton import meta_nf4

__all__ = [
    "dora_linear",
    "dora_linear_backward",
    "dora_linear_norm",
    "dora_linear_norm_backward",
    "dora_linear_square_norm",
]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    out_features: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    drop_base: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    mask = mask_of(dropout_p, seed, x)
    split = drop_base and mask.seed is not None
    base = Base(weight, absmax, nested_absmax, nested_quant_map, offset, block_size)
    dense = base.dense(out_features, rows.shape[1], x.dtype)
    h, kept, rest, _ = down(rows, lora_a.t(), mask=mask, need_scaled=split)
    y = F.linear(rows if kept is None else kept, dense)
    z = y.new_empty((*x.shape[:-1], out_features) if need_z else (0,))
    up(
        h,
        lora_b.t(),
        y,
        scaling,
        bias=None if bias is None else bias.contiguous(),
        inner=y,
        outer=None if rest is None else F.linear(rest, dense),
        factors=scale.contiguous(),
        unscaled=z if need_z else None,
    )
    return y.view(*x.shape[:-1], out_features), h, z


def dora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    z: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    drop_base: bool,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    grad, rows, scale = rows_of(grad_y), rows_of(x), scale.contiguous()
    (_, out_features), in_features = grad.shape, rows.shape[1]
    mask = mask_of(dropout_p, seed, x)
    split = drop_base and mask.seed is not None
    shift = 1.0 if split else 0.0
    sums = rows_of(z) if need_scale else None
    grad_h: Any = None
    scaled: Any = None
    parts: Any = None
    if need_x or need_a:
        passed = down(grad, lora_b, scaling, factors=scale, shift=shift, others=sums, need_scaled=need_x)
        grad_h, scaled, parts = passed.small, passed.scaled, passed.partials
    elif need_scale:
        _, parts = scale_columns(grad, scale, others=sums, need_out=False)

    grad_x, grad_a, grad_b = grad_y.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_scale = scale.new_empty(out_features if need_scale else 0)
    if parts is not None:
        sum_parts(parts, grad_scale)
    if need_a:
        grad_a = outer(rows, grad_h, lora_a, mask=mask, transposed=True)
    if need_b:
        grad_b = outer(grad, h, lora_b, scaling, factors=scale)
    if need_x:
        base = Base(weight, absmax, nested_absmax, nested_quant_map, offset, block_size)
        dense = base.dense(out_features, in_features, grad.dtype)
        # Where the base is dropped as well: dx = mask * (dh A + (g - 1) * dy W) + dy W.
        product = scaled @ dense
        rest = grad @ dense if split else product
        up(grad_h, lora_a, product, mask=mask, inner=product if split else None, outer=rest)
        grad_x = product.view(x.shape)
    return grad_x, grad_a, grad_b, grad_scale


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    seed = torch.empty((), dtype=torch.int64, device="meta")
    for dtype, size, rank, dropout in (
        (torch.float16, 4096, 64, (0.0, None, True)),
        (torch.bfloat16, 4096, 16, (0.1, seed, True)),
        (torch.float32, 4095, 64, (0.1, seed, False)),
    ):
        weight: Any = meta_nf4((size, size))
        x, lora_a, lora_b, scale = empty(8192, size, dtype=dtype), empty(rank, size), empty(size, rank), empty(size)
        rest: Any = (*weight, lora_a, lora_b, scale, 0.5)
        y, h, z = dora_linear(*(x, *weight, size, lora_a, lora_b, scale, 0.5, scale, *dropout, True))
        dora_linear_backward(*(y, x, h, z, *rest, *dropout, True, True, True, True))
    norm_configurations()
