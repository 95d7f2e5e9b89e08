"""dora_linear: a linear layer whose weight is a magnitude and a direction (DoRA, arXiv 2402.09353, equation 5).

Formula, with x flattened to rows, d(x) = dropout(x), V = W + s B A, n_j = ||V_j||, the norm of row j, and g = m / n:
    h = d(x) A^T        z = x W^T + s h B^T        y = g * z + bias
    dh = s dy (g B)    dA = dh^T d(x)    dB = g * (s dy^T h)    dx = (g * dy) W + mask * (dh A)    dg = sum of dy * z
Saved for backward: x, h and, if g needs a gradient, z. The norm is a constant in backward (section 4.3 of the paper)
unless detach_norm=False, which adds dn = -dg * m / n^2 and its gradients.

The norm is never taken of a dense V: n_j^2 = ||W_j||^2 + 2 s (W A^T)_j . B_j + s^2 B_j (A A^T) B_j^T, and ||W_j||^2 is
known.

Where the base is dropped as well (dropout_mode="peft", what HF PEFT computes), e = x - d(x) and
    z = d(x) W^T + s h B^T    y = g * z + e W^T + bias    dx = mask * (dh A + (g - 1) * dy W) + dy W
"""

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch import dora as composed
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.engines.transforms import is_transformed
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    check_tensor,
    dense_weight,
    empty_like,
    grad_bias,
    native_weight,
    number,
    oracle,
    out_features_of,
)
from peftkern.ops._op import NAMESPACES, Op
from peftkern.ops.lora_linear import check_lora, low_rank_product

DropoutMode = Literal["peft", "lora_only"]
DROPOUT_MODES = ("peft", "lora_only")


@oracle
def dora_linear_reference(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_mode: DropoutMode = "peft",
    detach_norm: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """`dora_linear` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once. No seed: no dropout."""
    compute = accumulate_dtype(x)
    wide, base = x.to(compute), dense_weight(weight, compute)
    a, b = lora_a.to(compute), lora_b.to(compute)
    kept = wide
    if seed is not None and dropout_p > 0:
        mask = keep_mask(seed.to(x.device), math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        kept = torch.where(mask, wide * keep_scale(dropout_p), 0)
    if norm is None:
        norm = torch.linalg.vector_norm(base + scaling * (b @ a), dim=1)
    g = magnitude.to(compute) / (norm.detach() if detach_norm else norm)
    through = kept if dropout_mode == "peft" else wide
    z = F.linear(through, base) + scaling * F.linear(F.linear(kept, a), b)
    y = g * z + F.linear(wide - through, base)
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def weight_square_norm(weight: Weight, *, backend: str | None = None) -> Tensor:
    """||W_j||^2 of every row, fp32 [out] (float64 for a float64 weight); without a dense NF4 weight on the kernels."""
    native = native_weight(weight)
    probe = native[0][0].new_empty(0, dtype=weight.dtype)
    implementation = backends.choose("dora_norm", probe, backend).implementation
    if implementation == "torch":
        return composed.square_norm(FrozenWeight.of(weight))
    if implementation != "reference":
        return NAMESPACES[implementation].dora_linear_square_norm(*native)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return dense_weight(weight, wide).detach().square().sum(1)


@oracle
def _norm_reference(
    lora_a: Tensor, lora_b: Tensor, weight: Weight, scaling: float | Tensor, compute: torch.dtype
) -> Tensor:
    change = scaling * (lora_b.to(compute) @ lora_a.to(compute))
    return torch.linalg.vector_norm(dense_weight(weight, compute) + change, dim=1)


def dora_norm(
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    square_norm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """||W_j + s B_j A|| of every row, fp32 [out]: what DoRA divides the magnitude by (arXiv 2402.09353, section 4).

    Differentiable in lora_a, lora_b and scaling.

    Args:
        weight: dense [out, in] or an NF4Weight.
        lora_a: [rank, in], lora_b: [out, rank].
        scaling: a number or a 0-d tensor.
        square_norm: `weight_square_norm(weight)`, if it is at hand: it never changes.
        dtype: of the activations. With bf16 the products A W^T are bf16 dot products where the CPU has them; rows whose
            norm is much smaller than W's are computed directly.
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    scaling = number(scaling)
    probe = lora_a.new_empty((0, weight.shape[1]), dtype=dtype if dtype != torch.float64 else lora_a.dtype)
    check_lora("dora_norm", probe, weight, lora_a, lora_b, scaling, None, 0.0)
    implementation = backends.choose("dora_norm", probe, backend).implementation
    if implementation == "reference":
        return _norm_reference(lora_a, lora_b, weight, scaling, accumulate_dtype(probe))
    if isinstance(scaling, Tensor):
        lora_b, scaling = lora_b.float() * scaling, 1.0
    if implementation == "torch":
        return composed.dora_norm(FrozenWeight.of(weight), lora_a, lora_b, float(scaling))
    if square_norm is None:
        square_norm = weight_square_norm(weight, backend=implementation)
    check_tensor("dora_norm", "square_norm", square_norm, (torch.float32,), lora_a.device)
    native, ops = native_weight(weight), NAMESPACES[implementation]
    return ops.dora_linear_norm(*native, lora_a, lora_b, scaling, square_norm, dtype == torch.bfloat16)


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    norm: Tensor | None = None,
    dropout_mode: DropoutMode = "peft",
    detach_norm: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`m / ||W + s B A|| * (x (W + s B A)^T) + bias` in one pass (DoRA, arXiv 2402.09353, equation 5).

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weight: dense [out, in] in any of these dtypes, or an NF4Weight (QDoRA).
        lora_a: [rank, in], lora_b: [out, rank]: x's dtype or fp32, any rank.
        magnitude: m [out], x's dtype or fp32; ||W_j|| makes a new adapter the identity.
        scaling: a number or a 0-d tensor, read at every call.
        bias: [out], optional; it is not scaled.
        dropout_p: probability of dropping an element of x, used if `training`.
        norm: ||W_j + s B_j A|| [out] of these very factors, from `dora_norm`; computed if None. Keep it as long as
            neither A nor B has changed.
        dropout_mode: "peft" drops the input of the base product that is scaled as well, which is HF PEFT's formula and
            takes two base products; "lora_only" drops the low-rank path alone, in one.
        detach_norm: treat the norm as a constant in backward (section 4.3 of the paper; what HF PEFT does).
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x, lora_a, lora_b, magnitude, scaling and bias, not in the weight.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    op = "dora_linear"
    scaling, dropout_p = number(scaling), number(dropout_p)
    out_features, _ = check_lora(op, x, weight, lora_a, lora_b, scaling, bias, dropout_p)
    vectors = {"magnitude": magnitude} if norm is None else {"magnitude": magnitude, "norm": norm}
    for name, tensor in vectors.items():
        check_tensor(op, name, tensor, tuple(dict.fromkeys((torch.float32, x.dtype))), x.device)
        if tensor.dim() != 1 or tensor.shape[0] != out_features:
            raise ValueError(f"{op}: {name} must have shape [{out_features}], got {list(tensor.shape)}")
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"{op}: dropout_mode must be one of {', '.join(DROPOUT_MODES)}, got {dropout_mode!r}")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight must be frozen, got one that requires grad")
    x, bias = autocast(x, bias)
    implementation = backends.choose(op, x, backend).implementation
    draws = training and dropout_p > 0 and implementation != "torch"
    seed = draw_seed(x.device) if draws else None
    if implementation == "reference":
        return dora_linear_reference(
            x, weight, lora_a, lora_b, magnitude, scaling, bias, dropout_p, seed, dropout_mode, detach_norm, norm
        )
    if isinstance(scaling, Tensor):  # folded into B [out, rank]: torch differentiates it
        lora_b, scaling = lora_b.float() * scaling, 1.0
    if norm is None:
        a, b = (lora_a.detach(), lora_b.detach()) if detach_norm else (lora_a, lora_b)
        norm = dora_norm(weight, a, b, scaling, dtype=x.dtype, backend=implementation)
    scale = magnitude.float() / (norm.detach() if detach_norm else norm)
    need_z = torch.is_grad_enabled() and (scale.requires_grad or is_transformed())
    if implementation == "torch":
        p, drops_base = dropout_p if training else 0.0, dropout_mode == "peft"
        frozen = FrozenWeight.of(weight)
        return composed.dora_linear(x, frozen, lora_a, lora_b, scale, float(scaling), bias, p, drops_base, need_z)
    y, _, _ = NAMESPACES[implementation].dora_linear(
        x,
        *native_weight(weight),
        lora_a,
        lora_b,
        scale,
        scaling,
        bias,
        dropout_p,
        seed,
        dropout_mode == "peft",
        need_z,
    )
    return y


def _fake_square_norm(call: Any) -> Tensor:
    return call.w[0].new_empty(out_features_of(call.wf), dtype=torch.float32)


def _fake_norm(call: Any) -> Tensor:
    return call.lora_b.new_empty(call.lora_b.shape[0], dtype=torch.float32)


def _fake_norm_backward(call: Any) -> tuple[Tensor, Tensor]:
    return empty_like(call.lora_a), empty_like(call.lora_b)


def _norm_backward(run: Any, call: Any, needs: Any, grad_norm: Tensor) -> dict[str, Any]:
    grad_a, grad_b = run(grad_norm=grad_norm)
    return {"lora_a": grad_a, "lora_b": grad_b}


def _fake(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = call.x.new_empty((*call.x.shape[:-1], out_features_of(call.wf)))
    return y, low_rank_product(call), empty_like(y, call.need_z)


def _fake_backward(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_like(call.x, call.need_x, call.grad_y.dtype),
        empty_like(call.lora_a, call.need_a),
        empty_like(call.lora_b, call.need_b),
        empty_like(call.scale, call.need_scale),
    )


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    need_scale = needs.scale and call.need_z
    if needs.x or needs.lora_a or needs.lora_b or need_scale:
        found["x"], found["lora_a"], found["lora_b"], grad_scale = run(
            grad_y=grad_y, need_x=needs.x, need_a=needs.lora_a, need_b=needs.lora_b, need_scale=need_scale
        )
        found["scale"] = grad_scale if need_scale else None
    if needs.bias:
        found["bias"] = grad_bias(grad_y, call.bias)
    return found


_op = partial(Op, triton="dora_linear_triton")
_op("dora_linear_square_norm", _fake_square_norm)
_norm_saves = ("norm", "w", "lora_a", "lora_b")
_op("dora_linear_norm", _fake_norm, _norm_backward, _norm_saves, _fake_norm_backward)
_op("dora_linear", _fake, _backward, ("x", "h", "z", "w", "lora_a", "lora_b", "scale", "seed"), _fake_backward)
# The name under which `dora_norm` chooses.
backends.TRITON_OPS.add("dora_norm")
