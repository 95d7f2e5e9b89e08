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

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.linear import linears
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    empty_like,
    formats_of,
    grad_weights,
    number,
    oracle,
)
from peftkern.ops._op import NAMESPACES, Op
from peftkern.ops._projections import (
    Projection,
    check_projection,
    composed_projections,
    draw_seeds,
    grad_biases,
    native_projections,
    projection_reference,
    split_grad_a,
    stacked_dtype,
    stacked_products,
)


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
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

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
    seeds = None if implementation == "torch" else draw_seeds(projections, dropout_p, training, x.device)
    if implementation == "reference":
        return lora_qkv_reference(x, projections, dropout_p, seeds)
    if implementation == "torch":
        return linears(x, composed_projections(projections), dropout_p if training else 0.0)
    ys, _ = NAMESPACES[implementation].lora_qkv(x, *native_projections(projections), dropout_p, seeds)
    return tuple(ys)


def _autocast(x: Tensor, projections: list[Projection]) -> tuple[Tensor, list[Projection]]:
    biases = [autocast(x, projection.bias)[1] for projection in projections]
    return autocast(x, None)[0], [p._replace(bias=bias) for p, bias in zip(projections, biases)]


def _fake(call: Any) -> tuple[list[Tensor], Tensor]:
    outs = [weight.out_features for weight in formats_of(call.wf)]
    return [call.x.new_empty((*call.x.shape[:-1], out)) for out in outs], stacked_products(call)


def _fake_backward(call: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, shape = call.x, (call.h.shape[1], call.x.shape[-1])
    grad_a = x.new_empty(shape, dtype=stacked_dtype(call.lora_as)) if call.need_a else x.new_empty(0)
    grad_x = empty_like(x, call.need_x, call.grad_ys[0].dtype)
    return grad_x, grad_a, [empty_like(lora_b) for lora_b in call.lora_bs] if call.need_b else []


def _backward(run: Any, call: Any, needs: Any, grad_ys: list[Tensor]) -> dict[str, Any]:
    found = {}
    need_a, need_b = any(needs.lora_as), any(needs.lora_bs)
    if needs.x or need_a or need_b:
        found["x"], grad_a, grad_bs = run(grad_ys=grad_ys, need_x=needs.x, need_a=need_a, need_b=need_b)
        found["lora_as"] = split_grad_a(grad_a, call.lora_as) if need_a else None
        found["lora_bs"] = grad_bs if need_b else None
    found["w"] = grad_weights(needs.w, grad_ys, [call.x] * len(grad_ys), call.w, call.wf)
    found["biases"] = grad_biases(needs.biases, grad_ys, call.biases)
    return found


_saves = ("x", "h", "seeds", "w", "lora_as", "lora_bs")
Op("lora_qkv", _fake, _backward, _saves, _fake_backward, triton="lora_qkv_triton")
