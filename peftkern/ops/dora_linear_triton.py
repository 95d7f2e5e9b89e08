"""dora_linear in Triton: torch's product with the base, and all that is around it in one pass each way.

Forward: one pass over x for h (and, where the base is dropped too, for what is kept of x and the rest), one over y that
adds the low-rank part, scales, adds the bias and leaves z. Backward: one pass over dy gives dh, g * dy and dg, one dB.
The products with the base are rounded to x's dtype before the pass that uses them. The norm: see `_dora_norm_triton`.
"""

from typing import Any

import torch
from torch import Tensor

from peftkern.ops._dora_norm_triton import (
    dora_linear_norm,
    dora_linear_norm_backward,
    dora_linear_square_norm,
    norm_configurations,
)
from peftkern.ops._low_rank_triton import down, up
from peftkern.ops._reduce_triton import reduce, sum_parts
from peftkern.ops._triton import mask_of, meta_nf4
from peftkern.ops._weight_triton import Base, matmul, rows_of
from peftkern.ops.ia3_linear_triton import scale_columns

__all__ = [
    "dora_linear",
    "dora_linear_backward",
    "dora_linear_norm",
    "dora_linear_norm_backward",
    "dora_linear_square_norm",
]


def dora_linear(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
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
    mask = mask_of(dropout_p, seed)
    base = Base.of(w, wf)
    h, kept, rest, _ = down(rows, lora_a.t(), mask=mask, need_scaled=drop_base and mask.seed is not None)
    z = x.new_empty((*x.shape[:-1], base.out_features) if need_z else (0,))
    y = up(
        h,
        lora_b.t(),
        x.dtype,
        scaling,
        bias=bias,
        inner=base.product(rows if kept is None else kept),
        outer=None if rest is None else base.product(rest),
        scales=scale.contiguous(),
        unscaled=z if need_z else None,
    )
    return y.view(*x.shape[:-1], base.out_features), h, z


def dora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    z: Tensor,
    w: list[Tensor],
    wf: list[int],
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
    mask = mask_of(dropout_p, seed)
    split = drop_base and mask.seed is not None
    sums = rows_of(z) if need_scale else None
    scaled: Any = None
    parts: Any = None
    if need_x or need_a:
        grad_h, scaled, _, parts = down(
            grad, lora_b, scaling, scales=scale, shift=1.0 if split else 0.0, others=sums, need_scaled=need_x
        )
    elif need_scale:
        _, parts = scale_columns(grad, scale, others=sums, need_out=False)

    grad_x, grad_a, grad_b = grad_y.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    grad_scale = scale.new_empty(0) if parts is None else sum_parts(parts, dtype=scale.dtype)
    if need_a:
        _, grad_a = reduce(rows, grad_h, mask=mask, dtype=lora_a.dtype, transposed=True)
    if need_b:
        _, grad_b = reduce(grad, h, scale=scaling, dtype=lora_b.dtype, scales=scale)
    if need_x:
        base = Base.of(w, wf)
        dense = base.dense(grad.dtype)
        # Where the base is dropped as well: dx = mask * (dh A + (g - 1) * dy W) + dy W.
        inner = matmul(scaled, dense) if split else None
        outer = matmul(grad if split else scaled, dense)
        grad_x = up(grad_h, lora_a, x.dtype, mask=mask, inner=inner, outer=outer).view(x.shape)
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
        y, h, z = dora_linear(*(x, *weight, lora_a, lora_b, scale, 0.5, scale, *dropout, True))
        dora_linear_backward(*(y, x, h, z, *rest, *dropout, True, True, True, True))
    norm_configurations()
