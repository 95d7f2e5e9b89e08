"""bottleneck_adapter: a bottleneck with a residual (adapters, arXiv 1902.00751, section 2.1).

Formula, with x [rows, d], D = down_weight [m, d], U = up_weight [d, m], f the activation and r the residual, which is x
unless another tensor is given (parallel adapters, arXiv 2110.04366, table 1):
    z  = x D^T + b_D                                  [rows, m], fp32
    y  = r + scaling * (f(z) U^T + b_U)
    dz = scaling * (dy U) * f'(z)     dD = dz^T x     db_D = sum of dz's rows
    dU = scaling * dy^T f(z)          db_U = scaling * sum of dy's rows
    dx = dz D (+ dy where r is x)     dr = dy
Saved for backward: x and z; f(z) is computed again. Where x and the weight are bf16, f(z) and dz are rounded to bf16
before they meet it, as the products of bf16 need.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.ops._linear import (
    FLOATING,
    NUMBER,
    accumulate_dtype,
    autocast,
    check_tensor,
    computing_dtype,
    number,
    oracle,
    raise_double_backward,
)
from peftkern.ops._registration import NAMESPACES, register

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(_FUNCTIONS)


@oracle
def bottleneck_adapter_reference(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`bottleneck_adapter` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once."""
    compute = accumulate_dtype(x)
    z = F.linear(x.to(compute), down_weight.to(compute), down_bias.to(compute))
    delta = F.linear(_FUNCTIONS[activation](z), up_weight.to(compute), up_bias.to(compute))
    return ((x if residual is None else residual).to(compute) + scaling * delta).to(x.dtype)


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`residual + scaling * (f(x D^T + b_D) U^T + b_U)` (adapters, arXiv 1902.00751, section 2.1).

    Args:
        x: [..., d], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        down_weight: D [m, d], down_bias: [m]: x's dtype or fp32, any m.
        up_weight: U [d, m], up_bias: [d]: x's dtype or fp32.
        activation: f, "relu", "gelu" (by erf), "gelu_tanh", "silu" or "tanh".
        scaling: a number or a 0-d tensor, read at every call.
        residual: x's shape, in its dtype or fp32; x by default.
        backend: "reference", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        [..., d] in x's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes, devices or values, or a backend that cannot run them.
    """
    scaling = number(scaling)
    check_bottleneck("bottleneck_adapter", x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual)
    x, _ = autocast(x, None)
    implementation = backends.choose("bottleneck_adapter", x, backend).implementation
    if implementation == "reference":
        return bottleneck_adapter_reference(
            x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual
        )
    if isinstance(scaling, Tensor):  # folded into U and its bias: torch differentiates it
        up_weight, up_bias, scaling = up_weight.float() * scaling, up_bias.float() * scaling, 1.0
    ops = NAMESPACES[implementation]
    y, _ = ops.bottleneck_adapter(x, down_weight, down_bias, up_weight, up_bias, activation, scaling, residual)
    return y


def check_activation(op: str, activation: Any) -> None:
    """Raises TypeError or ValueError unless `activation` is the name of one."""
    if not isinstance(activation, str):
        raise TypeError(f"{op}: activation must be a str, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        near = difflib.get_close_matches(activation, ACTIVATIONS, n=2)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}{hint}")


def check_bottleneck(
    op: str,
    x: Any,
    down_weight: Any,
    down_bias: Any,
    up_weight: Any,
    up_bias: Any,
    activation: Any,
    scaling: Any,
    residual: Any,
) -> None:
    """Checks every argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {type(x).__name__}")
    check_tensor(op, "x", x, FLOATING, x.device)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., features], got []")
    features = x.shape[-1]
    dtypes = tuple(dict.fromkeys((torch.float32, computing_dtype(x))))
    parameters = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    for name, parameter in parameters.items():
        check_tensor(op, name, parameter, dtypes, x.device)
    if down_weight.dim() != 2 or down_weight.shape[1] != features:
        got = list(down_weight.shape)
        raise ValueError(f"{op}: down_weight must have shape [bottleneck, {features}], got {got}")
    size = down_weight.shape[0]
    for name, shape in (("down_bias", (size,)), ("up_weight", (features, size)), ("up_bias", (features,))):
        if parameters[name].shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(parameters[name].shape)}")
    check_activation(op, activation)
    if isinstance(scaling, Tensor):
        if scaling.is_complex():
            raise TypeError(f"{op}: scaling must be real, got {scaling.dtype}")
        if scaling.dim() != 0:
            raise ValueError(f"{op}: scaling must be a number or a 0-d tensor, got shape {list(scaling.shape)}")
        if scaling.device != x.device:
            raise RuntimeError(f"{op}: scaling must be on x's device {x.device}, got {scaling.device}")
    elif not isinstance(scaling, NUMBER):
        raise TypeError(f"{op}: scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    if residual is not None:
        check_tensor(op, "residual", residual, tuple(dict.fromkeys((*dtypes, x.dtype))), x.device)
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")


def _fake(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str,
    scaling: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = x.new_empty((math.prod(x.shape[:-1]), down_weight.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape), z


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str,
    scaling: float,
    adds_x: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    results = (grad_y, down_weight, down_bias, up_weight, up_bias)
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in zip(results, needs))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, scaling, residual = inputs
    x, *parameters = tensors
    ctx.save_for_backward(x, output[1], *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.scalars = activation, scaling, residual is None
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ops: Any, ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 5
    if any(needs[:5]):
        results = ops.bottleneck_adapter_backward(grad_y, *ctx.saved_tensors, *ctx.scalars, *needs[:5])
        grads = [grad if need else None for grad, need in zip(results, needs)]
    return *grads, None, None, grad_y.to(ctx.residual_dtype) if needs[7] else None


register("bottleneck_adapter", _fake, _backward, _setup_context, triton="bottleneck_adapter_triton")
register(
    "bottleneck_adapter_backward",
    _fake_backward,
    raise_double_backward("bottleneck_adapter"),
    triton="bottleneck_adapter_triton",
)
