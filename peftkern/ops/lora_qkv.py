"""lora_qkv: linear layers on one input, such as an attention's q, k and v, with a low-rank adapter each (LoRA, arXiv
2106.09685, equation 3; QLoRA on NF4 weights).

Formula, for each projection i as in lora_linear, with x flattened to rows and d_i(x) = dropout(x) under a mask of its
own:
    h_i = d_i(x) A_i^T                                      side by side in h [rows, sum of ranks], fp32
    y_i = x W_i^T + scaling_i * h_i B_i^T + bias_i
    dh_i = scaling_i * dy_i B_i        dA_i = dh_i^T d_i(x)        dB_i = scaling_i * dy_i^T h_i
    dx = sum over i of dy_i W_i + mask_i * (dh_i A_i)       rounded once
Saved for backward: x and h, once. The masks are regenerated from the seeds (`_dropout.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern import backends
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import Weight, accumulate_dtype, autocast, number, oracle, raise_double_backward
from peftkern.ops._projections import (
    Projection,
    check_projection,
    draw_seeds,
    grad_biases,
    grad_weights,
    native_projections,
    only,
    projection_reference,
    split_grad_a,
    stacked_dtype,
)
from peftkern.ops._registration import NAMESPACES, register


@oracle
def lora_qkv_reference(
    x: Tensor, projections: Sequence[Projection], dropout_p: float = 0.0, seeds: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`lora_qkv` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once. No seeds: no dropout."""
    wide = x.to(accumulate_dtype(x))  # once, so that the gradients of x are summed before they are rounded
    return tuple(
        projection_reference(wide, projection, dropout_p, seeds, i).to(x.dtype)
        for i, projection in enumerate(projections)
    )


def lora_qkv(
    x: Tensor,
    weights: Sequence[Weight],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scalings: Sequence[float | Tensor],
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for several weights on the same x (LoRA, arXiv 2106.09685, equation 3), one or more.

    x is read and saved once, and its gradients are summed before they are rounded.

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weights: of q, k, v or whatever else reads x: each dense [out, in], or an NF4Weight; out may differ.
        lora_as, lora_bs: [rank, in] and [out, rank] of each; x's dtype or fp32, any rank. None, None: no adapter.
        scalings: for each a number or a 0-d tensor, read at every call; not used without an adapter.
        biases: for each [out] or None.
        dropout_p: probability of dropping an element of x on the low-rank paths, used if `training`. Each adapter has
            its own mask, that of `lora_linear` calls one after the other.
        backend: "reference", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        A tuple of [..., out] in x's dtype. Differentiable in x, adapters, scalings, biases and dense weights.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    if isinstance(weights, Tensor | NF4Weight):
        raise TypeError(f"lora_qkv: weights must be a sequence of weights, got {type(weights).__name__}")
    biases = [None] * len(weights) if biases is None else biases
    lists = {"lora_as": lora_as, "lora_bs": lora_bs, "scalings": scalings, "biases": biases}
    if not weights:
        raise ValueError("lora_qkv: weights must have at least one entry")
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(f"lora_qkv: {name} must have {len(weights)} entries, as weights, got {len(values)}")
    dropout_p, scalings = number(dropout_p), [number(scaling) for scaling in scalings]
    projections = [Projection(*values) for values in zip(weights, lora_as, lora_bs, scalings, biases)]
    for i, projection in enumerate(projections):
        check_projection(f"lora_qkv[{i}]", x, projection, dropout_p)
    x, projections = _autocast(x, projections)
    implementation = backends.choose("lora_qkv", x, backend).implementation
    seeds = draw_seeds(projections, dropout_p, training, x.device)
    if implementation == "reference":
        return lora_qkv_reference(x, projections, dropout_p, seeds)
    ys, _ = NAMESPACES[implementation].lora_qkv(x, *native_projections(projections), dropout_p, seeds)
    return tuple(ys)


def _autocast(x: Tensor, projections: list[Projection]) -> tuple[Tensor, list[Projection]]:
    biases = [autocast(x, projection.bias)[1] for projection in projections]
    return autocast(x, None)[0], [p._replace(bias=bias) for p, bias in zip(projections, biases)]


def _fake(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    scale_counts: list[int],
    block_sizes: list[int],
    out_features: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    biases: list[Tensor],
    dropout_p: float,
    seeds: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    rank = sum(lora_a.shape[0] for lora_a in lora_as)
    h = x.new_empty((math.prod(x.shape[:-1]), rank), dtype=torch.float32)
    return [x.new_empty((*x.shape[:-1], out)) for out in out_features], h


def _fake_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    h: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    scale_counts: list[int],
    block_sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    dropout_p: float,
    seeds: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_a = x.new_empty((h.shape[1], x.shape[-1]), dtype=stacked_dtype(lora_as)) if need_a else x.new_empty(0)
    grad_x = grad_ys[0].new_empty(x.shape) if need_x else x.new_empty(0)
    return grad_x, grad_a, [lora_b.new_empty(lora_b.shape) for lora_b in lora_bs] if need_b else []


def _setup_context(ctx: Any, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, scales, counts, block_sizes, _, lora_as, lora_bs, scalings, biases, dropout_p, seeds = inputs
    ctx.save_for_backward(x, output[1], seeds, *weights, *lora_as, *lora_bs, *scales)
    ctx.mark_non_differentiable(output[1])
    ctx.scalars = counts, block_sizes, scalings, dropout_p
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def _backward(ops: Any, ctx: Any, grad_ys: list[Tensor], _: Any) -> tuple[Any, ...]:
    x, h, seeds, *rest = ctx.saved_tensors
    counts, block_sizes, scalings, dropout_p = ctx.scalars
    n = len(counts)
    weights, lora_as, lora_bs, scales = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
    need_x, need_weights, _, _, _, _, need_as, need_bs, _, need_biases, *_ = ctx.needs_input_grad
    grad_x: Tensor | None = None
    grad_as: list[Tensor | None] = [None] * n
    grad_bs: list[Tensor | None] = [None] * n
    need_a, need_b = any(need_as), any(need_bs)
    if need_x or need_a or need_b:
        lists = weights, scales, counts, block_sizes, lora_as, lora_bs, scalings
        grad_x, grad_a, bs = ops.lora_qkv_backward(grad_ys, x, h, *lists, dropout_p, seeds, need_x, need_a, need_b)
        grad_as = only(need_as, split_grad_a(grad_a, lora_as)) if need_a else grad_as
        grad_bs = only(need_bs, bs) if need_b else grad_bs
    return (
        grad_x if need_x else None,
        grad_weights(need_weights, grad_ys, [x] * n, weights),
        [None] * len(scales),
        *(None,) * 3,
        grad_as,
        grad_bs,
        None,
        grad_biases(need_biases, grad_ys, ctx.bias_dtypes),
        None,
        None,
    )


register("lora_qkv", _fake, _backward, _setup_context, triton="lora_qkv_triton")
register("lora_qkv_backward", _fake_backward, raise_double_backward("lora_qkv"), triton="lora_qkv_triton")
