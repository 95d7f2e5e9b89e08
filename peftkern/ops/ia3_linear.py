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
from peftkern.engines.torch import ia3 as composed
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    check_linear,
    check_tensor,
    dense_weight,
    empty_like,
    native_weight,
    oracle,
    out_features_of,
)
from peftkern.ops._op import NAMESPACES, Op


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
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

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
    return ia3_linear_by(implementation, x, weight, scale, bias, scale_input)


def ia3_linear_by(
    implementation: str, x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scale_input: bool
) -> Tensor:
    """`ia3_linear` for arguments that have been checked and x and bias that are cast."""
    if implementation == "reference":
        return ia3_linear_reference(x, weight, scale, bias, scale_input)
    if implementation == "torch":
        return composed.ia3_linear(x, FrozenWeight.of(weight), scale, bias, scale_input)
    run = NAMESPACES[implementation].ia3_linear
    return run(x, *native_weight(weight), scale.float(), bias, scale_input)


def _fake(call: Any) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], out_features_of(call.wf)))


def _fake_backward(call: Any) -> tuple[Tensor, Tensor]:
    return empty_like(call.x, call.need_x, call.grad_y.dtype), empty_like(call.scale, call.need_scale)


def _saves(call: Any) -> tuple[str, ...]:
    return ("x", "w", "scale", "bias") if call.scale_input else ("x", "y", "w", "scale", "bias")


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    if needs.x or needs.scale:
        y = None if call.scale_input else call.y
        found["x"], found["scale"] = run(grad_y=grad_y, y=y, need_x=needs.x, need_scale=needs.scale)
    if needs.bias:
        summed = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32)
        found["bias"] = (summed if call.scale_input else summed * call.scale).to(call.bias.dtype)
    return found


Op("ia3_linear", _fake, _backward, _saves, _fake_backward, triton="ia3_linear_triton")
