"""lora_linear in Triton: one pass over x for h, torch's GEMM for the base and one pass that adds the rest; backward one
pass over dY for dS and dB, one over x for dA, and dX as forward.

torch's GEMM rounds the base to x's dtype before the low-rank part is added in fp32: two roundings, where the C++
kernels and few rows on NF4 have one. For many rows NF4 is decoded twice, forward and for dX (`_weight_triton.dense`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.ops._low_rank_triton import Dropout, add_product, as_rows, project, reduce, sum_partials
from peftkern.ops._triton import meta_nf4
from peftkern.ops._weight_triton import base_product, dense, matmul


def lora_linear(
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
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = as_rows(x)
    parts = (absmax, nested_absmax, nested_quant_map, offset)
    h = project(rows, lora_a.t(), Dropout(dropout_p, seed))
    base = base_product(rows, weight, parts, block_size, out_features)
    y = add_product(base, h, lora_b.t(), x.dtype, Dropout(), scaling, bias)
    return y.view(*x.shape[:-1], out_features), h


def lora_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
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
    rank, in_features = lora_a.shape
    rows, grad_rows = as_rows(x), as_rows(grad_y)
    dropout = Dropout(dropout_p, seed)
    grad_x, grad_a, grad_b = grad_y.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    # A row stride that the compiler knows to be a multiple of 16 saves the registers that addresses would take.
    padding = (0, -rank % 16)
    small_partials, grad_partials = reduce(
        grad_rows,
        F.pad(h, padding).contiguous() if need_b else None,
        F.pad(lora_b, padding).contiguous() if need_x or need_a else None,
        Dropout(),
    )
    if grad_partials is not None:
        grad_b = sum_partials(grad_partials, scaling, lora_b.dtype)[:, :rank].contiguous()
    if small_partials is not None:
        grad_h = sum_partials(small_partials, scaling)
        if need_a:
            _, grad_partials = reduce(rows, grad_h, None, dropout, transposed=True)
            assert grad_partials is not None
            grad_a = sum_partials(grad_partials, dropout.scale, lora_a.dtype)[:rank].contiguous()
        if need_x:
            parts = (absmax, nested_absmax, nested_quant_map, offset)
            base = matmul(grad_rows, dense(weight, parts, block_size, (grad_y.shape[-1], in_features), x.dtype))
            grad_x = add_product(base, grad_h[:, :rank].contiguous(), lora_a, x.dtype, dropout).view(x.shape)
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
        forward: Any = (x, *weight, features, lora_a, lora_b, 2.0, x[0], *dropout)
        _, h = lora_linear(*forward)
        backward: Any = (x, x, h, *weight, lora_a, lora_b, 2.0, *dropout, True, True, True)
        lora_linear_backward(*backward)
