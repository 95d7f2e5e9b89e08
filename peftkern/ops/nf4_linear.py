"""nf4_linear: a linear layer on a 4-bit weight (QLoRA, arXiv 2305.14314, equation 5 without the adapter).

Formula:   y = x @ dequantize(W)^T + bias            dx = dy @ dequantize(W)          dbias = sum of dy over the rows
W is decoded in tiles inside the matrix product; nothing of size [out, in] is made, forward or backward.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.engines.torch.linear import Projection, linears
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import (
    accumulate_dtype,
    autocast,
    check_linear,
    dense_weight,
    grad_bias,
    in_features_of,
    native_weight,
    oracle,
    out_features_of,
)
from peftkern.ops._op import NAMESPACES, Op


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
        backend: "reference", "torch", "cpu", "cuda" or "triton"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x and bias; the weight gets no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"nf4_linear: weight must be an NF4Weight, got {type(weight).__name__}; see nf4_quantize")
    check_linear("nf4_linear", x, weight, bias)
    x, bias = autocast(x, bias)
    implementation = backends.choose("nf4_linear", x, backend).implementation
    if implementation == "reference":
        return nf4_linear_reference(x, weight, bias)
    if implementation == "torch":
        return linears(x, [Projection(FrozenWeight.of(weight), None, None, 0.0, bias)], 0.0)[0]
    return NAMESPACES[implementation].nf4_linear(x, *native_weight(weight), bias)


def _fake(call: Any) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], out_features_of(call.wf)))


def _fake_backward(call: Any) -> Tensor:
    return call.grad_y.new_empty((*call.grad_y.shape[:-1], in_features_of(call.wf)))


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    if needs.x:
        found["x"] = run(grad_y=grad_y)
    if needs.bias:
        found["bias"] = grad_bias(grad_y, call.bias)
    return found


Op("nf4_linear", _fake, _backward, ("w",), _fake_backward, triton="nf4_linear_triton")
