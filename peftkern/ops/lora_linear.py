"""lora_linear: a linear layer with a low-rank adapter (LoRA, arXiv 2106.09685, equation 3; QLoRA on an NF4 weight).

Formula, with x flattened to rows and d(x) = dropout(x):
    h  = d(x) A^T                                     [rows, rank], fp32
    y  = x W^T + scaling * h B^T + bias
    dh = scaling * dy B            dA = dh^T d(x)     dB = scaling * dy^T h      dx = dy W + mask * (dh A)
Saved for backward: x and h. The dropout mask is regenerated from the seed (`_dropout.py`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern._native import ops as native_ops
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.engines.torch.linear import Projection, linears
from peftkern.nf4 import NF4Weight
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale
from peftkern.ops._linear import (
    NUMBER,
    Weight,
    accumulate_dtype,
    autocast,
    check_linear,
    check_tensor,
    computing_dtype,
    dense_weight,
    empty_like,
    grad_bias,
    grad_weights,
    native_weight,
    number,
    oracle,
    out_features_of,
)
from peftkern.ops._op import NAMESPACES, Op

# What the decode of csrc/cuda/ takes: rows of x, and features of a row.
CUDA_ROWS, CUDA_FEATURES = 8, 2**26


@oracle
def lora_linear_reference(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`lora_linear` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once. No seed: no dropout."""
    compute = accumulate_dtype(x)
    wide = x.to(compute)
    dropped = wide
    if seed is not None and dropout_p > 0:
        mask = keep_mask(seed.to(x.device), math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        dropped = torch.where(mask, wide * keep_scale(dropout_p), 0)
    base = F.linear(wide, dense_weight(weight, compute), None if bias is None else bias.to(compute))
    delta = F.linear(F.linear(dropped, lora_a.to(compute)), lora_b.to(compute))
    return (base + scaling * delta).to(x.dtype)


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`x W^T + scaling * (dropout(x) A^T) B^T + bias` in one pass (LoRA, arXiv 2106.09685, equation 3).

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weight: dense [out, in] in any of these dtypes, or an NF4Weight (QLoRA).
        lora_a: [rank, in], lora_b: [out, rank]: x's dtype or fp32, any rank.
        scaling: a number or a 0-d tensor, read at every call (LoRA: alpha / rank).
        bias: [out], optional.
        dropout_p: probability of dropping an element of x on the low-rank path, used if `training`.
        backend: "reference", "torch", "cpu", "triton" or, for 1 to 8 rows of bf16 or fp16 on an NF4Weight without
            dropout, "cuda"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x, lora_a, lora_b, scaling, bias and a dense weight.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    scaling, dropout_p = number(scaling), number(dropout_p)
    check_lora("lora_linear", x, weight, lora_a, lora_b, scaling, bias, dropout_p)
    x, bias = autocast(x, bias)
    dropout_p = dropout_p if training else 0.0
    implementation = backends.choose("lora_linear", x, backend, weight, dropout_p).implementation
    return lora_linear_by(implementation, x, weight, lora_a, lora_b, scaling, bias, dropout_p)


def lora_linear_by(
    implementation: str,
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`lora_linear` with dropout, for arguments that have been checked and x and bias that are cast."""
    if implementation == "reference":
        seed = draw_seed(x.device) if dropout_p > 0 else None
        return lora_linear_reference(x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed)
    if isinstance(scaling, Tensor):  # folded into B [out, rank]: torch differentiates it
        lora_b, scaling = lora_b.float() * scaling, 1.0
    if implementation == "torch":
        projection = Projection(FrozenWeight.of(weight), lora_a, lora_b, float(scaling), bias)
        return linears(x, [projection], dropout_p)[0]
    seed = draw_seed(x.device) if dropout_p > 0 else None
    run = NAMESPACES[implementation].lora_linear
    y, _ = run(x, *native_weight(weight), lora_a, lora_b, scaling, bias, dropout_p, seed)
    return y


def _cuda_limit(x: Tensor, weight: Weight, dropout_p: float) -> str | None:
    """What the CUDA kernels, which are a decode with the adapter inside, do not take; None if they take the call."""
    rows, in_features = math.prod(x.shape[:-1]), x.shape[-1]
    if not isinstance(weight, NF4Weight):
        return "takes an NF4Weight, got a dense weight"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 or fp16, got {x.dtype}"
    if rows > CUDA_ROWS:
        return f"takes at most {CUDA_ROWS} rows of x, got {rows}"
    if dropout_p > 0:
        return f"takes no dropout, got dropout_p={dropout_p}"
    if weight.block_size < 64 or in_features % weight.block_size or not 0 < in_features <= CUDA_FEATURES:
        wanted = f"takes weights of 1 to {CUDA_FEATURES} in features, whole blocks of 64 or more"
        return f"{wanted}, got {in_features} in blocks of {weight.block_size}"
    return None


backends.CUDA_LIMITS["lora_linear"] = _cuda_limit


def check_lora(
    op: str,
    x: Any,
    weight: Any,
    lora_a: Any,
    lora_b: Any,
    scaling: Any,
    bias: Any,
    dropout_p: float,
) -> tuple[int, int]:
    """Checks every argument of a LoRA linear; returns (out_features, in_features)."""
    out_features, in_features = check_linear(op, x, weight, bias)
    dtypes = tuple(dict.fromkeys((torch.float32, computing_dtype(x))))
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(op, name, tensor, dtypes, x.device)
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features:
        raise ValueError(f"{op}: lora_a must have shape [rank, {in_features}], got {list(lora_a.shape)}")
    if lora_b.dim() != 2 or lora_b.shape[0] != out_features or lora_b.shape[1] != lora_a.shape[0]:
        wanted = f"[{out_features}, {lora_a.shape[0]}]"
        raise ValueError(f"{op}: lora_b must have shape {wanted} (out, lora_a's rank), got {list(lora_b.shape)}")
    if isinstance(scaling, Tensor):
        if scaling.is_complex():
            raise TypeError(f"{op}: scaling must be real, got {scaling.dtype}")
        if scaling.dim() != 0:
            raise ValueError(f"{op}: scaling must be a number or a 0-d tensor, got shape {list(scaling.shape)}")
        if scaling.device != x.device:
            raise RuntimeError(f"{op}: scaling must be on x's device {x.device}, got {scaling.device}")
    elif not isinstance(scaling, NUMBER):
        raise TypeError(f"{op}: scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    check_dropout(op, dropout_p)
    return out_features, in_features


def check_dropout(op: str, dropout_p: Any) -> None:
    """Raises TypeError or ValueError unless `dropout_p` is a probability."""
    if not isinstance(dropout_p, NUMBER):
        raise TypeError(f"{op}: dropout_p must be a number from 0 to 1, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, got {dropout_p}")


def low_rank_product(call: Any) -> Tensor:
    """h [rows, rank] without values."""
    return call.x.new_empty((math.prod(call.x.shape[:-1]), call.lora_a.shape[0]), dtype=torch.float32)


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    return call.x.new_empty((*call.x.shape[:-1], out_features_of(call.wf))), low_rank_product(call)


def _fake_backward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like(call.x, call.need_x, call.grad_y.dtype),
        empty_like(call.lora_a, call.need_a),
        empty_like(call.lora_b, call.need_b),
    )


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    if needs.x or needs.lora_a or needs.lora_b:
        found["x"], found["lora_a"], found["lora_b"] = run(
            grad_y=grad_y, need_x=needs.x, need_a=needs.lora_a, need_b=needs.lora_b
        )
    if any(needs.w):
        found["w"] = grad_weights(needs.w, [grad_y], [call.x], call.w, call.wf)
    if needs.bias:
        found["bias"] = grad_bias(grad_y, call.bias)
    return found


def _backward_on_cuda(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op for the few rows that forward takes on CUDA: nf4_linear_backward, and torch's products in fp32.

    The base's part of grad_x is rounded before the low-rank part is added: two roundings.
    """
    x, grad_y, lora_a, lora_b = call.x, call.grad_y, call.lora_a, call.lora_b
    grad_x, grad_a, grad_b = grad_y.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):  # it would round the products
        rows, grad_rows = x.reshape(-1, x.shape[-1]).float(), grad_y.reshape(-1, grad_y.shape[-1]).float()
        grad_h = call.scaling * (grad_rows @ lora_b.float())
        if call.need_a:
            grad_a = (grad_h.t() @ rows).to(lora_a.dtype)
        if call.need_b:
            grad_b = (call.scaling * (grad_rows.t() @ call.h)).to(lora_b.dtype)
        if call.need_x:
            base = native_ops.nf4_linear_backward(grad_y, call.w, call.wf)
            grad_x = (base.float() + (grad_h @ lora_a.float()).view(x.shape)).to(grad_y.dtype)
    return grad_x, grad_a, grad_b


_saves = ("x", "h", "w", "lora_a", "lora_b", "seed")
Op(
    "lora_linear",
    _fake,
    _backward,
    _saves,
    _fake_backward,
    triton="lora_linear_triton",
    backward_on_cuda=_backward_on_cuda,
)
