"""ia3_linear: a linear layer with a learned scale on its outputs or its inputs ((IA)^3, arXiv 2205.05638, equation 1).

Formula, output scaled:   y = l * (x W^T + bias)      dx = (l * dy) W        dl = sum of dy * y, over l
         input scaled:    y = (l * x) W^T + bias      dx = l * (dy W)        dl = sum of x * (dy W)
Saved for backward: x and, where the output is scaled, y itself, which whoever uses it keeps as well. With an l_j of 0,
y does not tell what was scaled: x W^T + bias is then computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    check_linear,
    check_tensor,
    dense_weight,
    native_weight,
    oracle,
    raise_double_backward,
)
from peftkern.ops._registration import NAMESPACES, register


@oracle
def ia3_linear_reference(
    x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None = None, scale_input: bool = False
) -> Tensor:
    """`ia3_linear` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once to x's dtype."""
    compute = accumulate_dtype(x)
    wide, base, factor = x.to(compute), dense_weight(weight, compute), scale.to(compute)
    wide_bias = None if bias is None else bias.to(compute)
    if scale_input:
        return F.linear(wide * factor, base, wide_bias).to(x.dtype)
    return (factor * F.linear(wide, base, wide_bias)).to(x.dtype)


def ia3_linear(
    x: Tensor,
    weight: Weight,
    scale: Tensor,
    bias: Tensor | None = None,
    scale_input: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`scale * (x W^T + bias)` or `(scale * x) W^T + bias` in one pass ((IA)^3, arXiv 2205.05638, equation 1).

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weight: dense [out, in] in any of these dtypes, or an NF4Weight; frozen.
        scale: l [out], or [in] with scale_input; x's dtype or fp32. Ones are the identity.
        bias: [out], optional.
        scale_input: scale x instead of the output, as (IA)^3 does in the feed-forward block.
        backend: "reference", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x, scale and bias. Where the output is scaled, y is kept for backward
        and must not be written over.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, a weight that requires grad, or a backend
            that cannot run them.
    """
    op = "ia3_linear"
    out_features, in_features = check_linear(op, x, weight, bias)
    check_tensor(op, "scale", scale, tuple(dict.fromkeys((torch.float32, x.dtype))), x.device)
    wanted = in_features if scale_input else out_features
    if scale.dim() != 1 or scale.shape[0] != wanted:
        side = "in" if scale_input else "out"
        raise ValueError(f"{op}: scale must have shape [{wanted}] (weight's {side}), got {list(scale.shape)}")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight must be frozen, got one that requires grad")
    x, bias = autocast(x, bias)
    implementation = backends.choose(op, x, backend).implementation
    if implementation == "reference":
        return ia3_linear_reference(x, weight, scale, bias, scale_input)
    return ia3_linear_native(x, weight, scale, bias, scale_input, implementation)


def ia3_linear_native(
    x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scale_input: bool, implementation: str = "cpu"
) -> Tensor:
    """`ia3_linear` on the kernels, for arguments that have been checked and x and bias that are cast."""
    run = NAMESPACES[implementation].ia3_linear
    return run(x, *native_weight(weight), weight.shape[0], scale.float(), bias, scale_input)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[6]))


def _fake_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    scale, _, _, need_x, need_scale = arguments[8:]
    return (
        grad_y.new_empty(arguments[0].shape if need_x else (0,)),
        scale.new_empty(scale.shape if need_scale else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *weight, block_size, _, scale, bias, scale_input = inputs
    ctx.save_for_backward(x, None if scale_input else output, *weight, scale, bias)
    ctx.scalars = block_size, scale_input


def _backward(ops: Any, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *weight, scale, bias = ctx.saved_tensors
    block_size, scale_input = ctx.scalars
    need_x, need_scale, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[8], ctx.needs_input_grad[9]
    grad_x = grad_scale = grad_bias = None
    if need_x or need_scale:
        grad_x, grad_scale = ops.ia3_linear_backward(
            grad_y, x, y, *weight, block_size, scale, bias, scale_input, need_x, need_scale
        )
    if need_bias:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32)
        grad_bias = (grad_bias if scale_input else grad_bias * scale).to(bias.dtype)
    return (
        grad_x if need_x else None,
        *(None,) * 7,
        grad_scale if need_scale else None,
        grad_bias,
        None,
    )


register("ia3_linear", _fake, _backward, _setup_context, triton="ia3_linear_triton")
register("ia3_linear_backward", _fake_backward, raise_double_backward("ia3_linear"), triton="ia3_linear_triton")
