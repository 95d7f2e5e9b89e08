"""lora_linear in Triton: one pass over x for h, then the base and the rest in one GEMM or in two passes,
as `_extended_triton.in_one` says; backward one pass over dY for dS and dB, one over x for dA, and dX as forward.

torch's GEMM rounds the base to x's dtype before the low-rank part is added in fp32: two roundings, where the C++
kernels and the other routes have one. For many rows NF4 is decoded twice, forward and for dX (`Base.dense`).
"""

from typing import Any

import torch
from torch import Tensor

from peftkern.ops._extended_triton import extended
from peftkern.ops._linear import native_weight
from peftkern.ops._low_rank_triton import down
from peftkern.ops._reduce_triton import reduce
from peftkern.ops._triton import mask_of, meta_nf4
from peftkern.ops._weight_triton import Base, rows_of


def lora_linear(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    base = Base.of(w, wf)
    h = down(rows, lora_a.t(), mask=mask_of(dropout_p, seed)).small
    y = base.extended(rows, h, lora_b.t(), scaling, bias)
    return y.view(*x.shape[:-1], base.out_features), h


def lora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`. Gradients that are not needed are empty."""
    rows, grad_rows, mask = rows_of(x), rows_of(grad_y), mask_of(dropout_p, seed)
    grad_x, grad_a, grad_b = grad_y.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    factor = lora_b if need_x or need_a else None
    if need_x or need_a or need_b:
        grad_h, grad = reduce(grad_rows, h if need_b else None, factor, scaling, dtype=lora_b.dtype)
        grad_b = grad_b if grad is None else grad
    if need_a:
        _, grad_a = reduce(rows, grad_h, mask=mask, dtype=lora_a.dtype, transposed=True)
    if need_x:
        base = Base.of(w, wf)
        dense = base.dense(x.dtype)
        grad_x = extended(grad_rows, dense, grad_h, lora_a, mask=mask).view(x.shape)
    return grad_x, grad_a, grad_b


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    rows, features = 8192, 4096
    seed = torch.empty((), dtype=torch.int64, device="meta")
    weight = meta_nf4((features, features))
    for rank, dtype, *dropout in (
        (16, torch.bfloat16, 0.0, None),
        (16, torch.bfloat16, 0.1, seed),
        (32, torch.bfloat16, 0.1, seed),
        (64, torch.bfloat16, 0.1, seed),
        (16, torch.float16, 0.1, seed),
        (64, torch.float16, 0.1, seed),
        (64, torch.float32, 0.1, seed),
    ):
        x = torch.empty(rows, features, dtype=dtype, device="meta")
        lora_a, lora_b = torch.empty(rank, features, device="meta"), torch.empty(features, rank, device="meta")
        forward: Any = (x, *weight, lora_a, lora_b, 2.0, x[0], *dropout)
        _, h = lora_linear(*forward)
        backward: Any = (x, x, h, *weight, lora_a, lora_b, 2.0, *dropout, True, True, True)
        lora_linear_backward(*backward)
    # What is one GEMM, forward with a bias and backward with a mask; 16 rows, whose decoding of NF4 is.
    cases = (2048, 8192, torch.bfloat16), (2048, 8192, torch.float16), (4096, 16, torch.bfloat16)
    for features, rows, dtype in cases:
        x = torch.empty(rows, features, dtype=dtype, device="meta")
        lora_a, lora_b = torch.empty(16, features, device="meta"), torch.empty(features, 16, device="meta")
        base: Any = meta_nf4((features, features)) if rows == 16 else native_weight(x.new_empty(features, features))
        for mask in ((0.0, None), (0.1, seed)) if dtype == torch.bfloat16 else ((0.0, None),):
            arguments: Any = (x, *base, lora_a, lora_b, 2.0, x[0], *mask)
            _, h = lora_linear(*arguments)
            arguments = (x, x, h, *base, lora_a, lora_b, 2.0, *mask, True, False, False)
            lora_linear_backward(*arguments)
