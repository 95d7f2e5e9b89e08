"""lora_qkv in Triton: one pass over x for every h and one for every dA where nothing is dropped, torch's GEMMs, and one
pass over each y, each dy and dx.

The base products are rounded to x's dtype before the low-rank parts are added in fp32, those of dx after each GEMM.
"""

from typing import Any

import torch
from torch import Tensor

from peftkern.ops._projections_triton import (
    Adapters,
    add_grad_x,
    given,
    grad_a_of,
    products,
    small_gradients,
    sum_of_products,
)
from peftkern.ops._triton import meta_nf4
from peftkern.ops._weight_triton import Base, rows_of


def lora_qkv(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    biases: list[Tensor],
    dropout_p: float,
    seeds: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    adapters = Adapters(lora_as, lora_bs, scalings, dropout_p, seeds)
    bases = Base.each(w, wf)
    h = products(rows, adapters)
    ys = []
    for i, (base, lora_b, scaling, bias) in enumerate(zip(bases, lora_bs, scalings, biases)):
        y = base.extended(rows, adapters.part(h, i), lora_b.t(), scaling, given(bias))
        ys.append(y.view(*x.shape[:-1], base.out_features))
    return ys, h


def lora_qkv_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    h: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op of this name, see `csrc/ops.cpp`. Gradients that are not needed are empty."""
    rows, grads = rows_of(x), [rows_of(grad_y) for grad_y in grad_ys]
    adapters = Adapters(lora_as, lora_bs, scalings, dropout_p, seeds)
    bases = Base.each(w, wf)
    grad_h, grad_bs = small_gradients(grads, h, adapters, need_x or need_a, need_b)
    grad_a = grad_a_of(rows, grad_h, adapters) if need_a else x.new_empty(0)
    grad_x = x.new_empty(0)
    if need_x:
        product = sum_of_products((grad, base.dense(x.dtype)) for base, grad in zip(bases, grads))
        grad_x = add_grad_x(product, grad_h, adapters, x.dtype).view(x.shape)
    return grad_x, grad_a, grad_bs


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    features, outs = 4096, [4096, 1024, 1024]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = [meta_nf4((out, features)) for out in outs]
    lists = ([part for w, _ in weights for part in w], [each for _, wf in weights for each in wf])
    for rank, dtype, dropout_p in (
        (16, torch.bfloat16, 0.0),
        (64, torch.bfloat16, 0.1),
        (16, torch.float32, 0.1),
    ):
        x = empty(8192, features, dtype=dtype)
        lora_as, lora_bs = [empty(rank, features)] * 3, [empty(out, rank) for out in outs]
        adapters = (lora_as, lora_bs, [2.0] * 3)
        dropout = (dropout_p, empty(3, dtype=torch.int64) if dropout_p else None)
        forward: Any = (x, *lists, *adapters, [empty(out, dtype=dtype) for out in outs], *dropout)
        ys, h = lora_qkv(*forward)
        backward: Any = (ys, x, h, *lists, *adapters, *dropout, True, True, True)
        lora_qkv_backward(*backward)
