"""nf4_linear in Triton: up to 64 rows decode the weight inside the product; more decode it once and take torch's GEMM.

Decoding costs 2 bytes written and 2 read per weight and is done again for dX: keeping the dense weight until then would
keep the dense model.
"""

from typing import Any

import torch
from torch import Tensor

from peftkern.ops._triton import meta_nf4
from peftkern.ops._weight_triton import Base, matmul, rows_of


def nf4_linear(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
    bias: Tensor | None,
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    base = Base.of(w, wf)
    return base.linear(rows_of(x), bias).view(*x.shape[:-1], base.out_features)


def nf4_linear_backward(
    grad_y: Tensor,
    w: list[Tensor],
    wf: list[int],
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    base = Base.of(w, wf)
    weight = base.dense(grad_y.dtype)
    return matmul(rows_of(grad_y), weight).view(*grad_y.shape[:-1], base.in_features)


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    features = 4096
    for rows, dtype, nested in (
        (1, torch.bfloat16, True),
        (64, torch.bfloat16, True),
        (16, torch.float16, False),
        (64, torch.float32, True),
    ):
        x = torch.empty(rows, features, dtype=dtype, device="meta")
        weight = meta_nf4((features, features), 64, nested)
        forward: Any = (x, *weight, x[0])
        backward: Any = (x, *weight)
        nf4_linear(*forward)
        nf4_linear_backward(*backward)
