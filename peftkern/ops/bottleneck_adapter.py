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
from peftkern.engines.torch import bottleneck as composed
from peftkern.ops._linear import (
    FLOATING,
    NUMBER,
    accumulate_dtype,
    autocast,
    check_tensor,
    computing_dtype,
    empty_like,
    number,
    oracle,
)
from peftkern.ops._op import NAMESPACES, Op

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
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

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
    if implementation == "torch":
        factors = (down_weight, down_bias, up_weight, up_bias)
        return composed.bottleneck_adapter(x, *factors, activation, float(scaling), residual)
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


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    x = call.x
    z = x.new_empty((math.prod(x.shape[:-1]), call.down_weight.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape), z


def _fake_backward(call: Any) -> tuple[Tensor, ...]:
    return (
        empty_like(call.grad_y, call.need_x),
        empty_like(call.down_weight, call.need_down_weight),
        empty_like(call.down_bias, call.need_down_bias),
        empty_like(call.up_weight, call.need_up_weight),
        empty_like(call.up_bias, call.need_up_bias),
    )


PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    inputs = ("x", *PARAMETERS)
    wanted = {f"need_{name}": getattr(needs, name) for name in inputs}
    if any(wanted.values()):
        found = dict(zip(inputs, run(grad_y=grad_y, adds_x=call.residual is None, **wanted)))
    if needs.residual:
        found["residual"] = grad_y.to(call.residual.dtype)
    return found


Op(
    "bottleneck_adapter",
    _fake,
    _backward,
    ("x", "z", *PARAMETERS),
    _fake_backward,
    triton="bottleneck_adapter_triton",
)
