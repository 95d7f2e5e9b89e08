"""nf4_linear: a linear layer on a 4-bit weight (QLoRA, arXiv 2305.14314, equation 5 without the adapter).

Formula:   y = x @ dequantize(W)^T + bias            dx = dy @ dequantize(W)          dbias = sum of dy over the rows
W is decoded in tiles inside the matrix product; nothing of size [out, in] is made, forward or backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import (
    accumulate_dtype,
    autocast,
    check_linear,
    dense_weight,
    native_weight,
    oracle,
    raise_double_backward,
)
from peftkern.ops._registration import NAMESPACES, register


@oracle
def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """`nf4_linear` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once to x's dtype."""
    compute = accumulate_dtype(x)
    bias = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), dense_weight(weight, compute), bias).to(x.dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`x @ dequantize(weight)^T + bias` without the dense weight (QLoRA, arXiv 2305.14314, equation 5).

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weight: NF4Weight of shape [out, in].
        bias: [out], optional.
        backend: "reference", "cpu", "cuda" or "triton"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x and bias; the weight gets no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"nf4_linear: weight must be an NF4Weight, got {type(weight).__name__}; see nf4_quantize")
    out_features, _ = check_linear("nf4_linear", x, weight, bias)
    x, bias = autocast(x, bias)
    implementation = backends.choose("nf4_linear", x, backend).implementation
    if implementation == "reference":
        return nf4_linear_reference(x, weight, bias)
    return NAMESPACES[implementation].nf4_linear(x, *native_weight(weight), out_features, bias)


def _fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_backward(
    grad_y: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    in_features: int,
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, absmax, nested_absmax, nested_quant_map, offset, block_size, _, bias = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, nested_quant_map, offset)
    ctx.block_size = block_size
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ops: Any, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.nf4_linear_backward(grad_y, *ctx.saved_tensors, ctx.block_size, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, None, None, grad_bias


register("nf4_linear", _fake, _backward, _setup_context, triton="nf4_linear_triton")
register("nf4_linear_backward", _fake_backward, raise_double_backward("nf4_linear"), triton="nf4_linear_triton")
