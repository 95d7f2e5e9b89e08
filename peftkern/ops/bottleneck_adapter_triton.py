"""bottleneck_adapter in Triton: two passes over activations forward, three backward, around [rows, m] in fp32.

The activation is computed where f(z) is read, the residual, the scale and the bias are added where y is written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._activations_triton import slope
from peftkern.ops._low_rank_triton import down, up
from peftkern.ops._reduce_triton import reduce
from peftkern.ops._triton import launch
from peftkern.ops._weight_triton import rows_of

BLOCK = 1024


@triton.jit
def _multiply_by_slope(grad, z, elements, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    value = tl.load(grad + element, mask=inside, other=0.0)
    by = slope(tl.load(z + element, mask=inside, other=0.0), ACTIVATION)
    tl.store(grad + element, value * by, mask=inside)


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str,
    scaling: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    z = down(rows, down_weight.t(), bias=down_bias.contiguous()).small
    y = x.new_empty(x.shape)
    up(
        z,
        up_weight.t(),
        x.dtype,
        scaling,
        bias=up_bias.float() * scaling,
        outer=rows if residual is None else rows_of(residual),
        out=y.view(rows.shape),
        activation=activation,
    )
    return y, z


def bottleneck_adapter_backward(
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
    need_x: bool,
    need_down_weight: bool,
    need_down_bias: bool,
    need_up_weight: bool,
    need_up_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    grad, rows = rows_of(grad_y), rows_of(x)
    grad_x = grad_y.new_empty(x.shape if need_x else (0,))
    grad_down_weight, grad_up_weight = down_weight.new_empty(0), up_weight.new_empty(0)
    grad_down_bias, grad_up_bias = down_bias.new_empty(0), up_bias.new_empty(0)
    if need_x or need_down_weight or need_down_bias:
        grad_z = down(grad, up_weight, scaling).small
        size = grad_z.numel()
        launch(_multiply_by_slope, (triton.cdiv(size, BLOCK),), grad_z, z, size, BLOCK=BLOCK, ACTIVATION=activation)
        if need_x:
            up(grad_z, down_weight, x.dtype, outer=grad if adds_x else None, out=grad_x.view(rows.shape))
        if need_down_weight:
            _, grad_down_weight = reduce(rows, grad_z, dtype=down_weight.dtype, transposed=True)
        if need_down_bias:
            grad_down_bias = grad_z.sum(0).to(down_bias.dtype)
    if need_up_weight:
        _, grad_up_weight = reduce(grad, z, scale=scaling, dtype=up_weight.dtype, activation=activation)
    if need_up_bias:
        grad_up_bias = (grad.sum(0, dtype=torch.float32) * scaling).to(up_bias.dtype)
    return grad_x, grad_down_weight, grad_down_bias, grad_up_weight, grad_up_bias


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, features, size, activation in (
        (torch.bfloat16, 4096, 64, "gelu"),
        (torch.float16, 4095, 16, "gelu_tanh"),
        (torch.float32, 4096, 64, "silu"),
    ):
        x = empty(8192, features, dtype=dtype)
        weights: Any = [
            empty(*shape, dtype=dtype) for shape in ((size, features), (size,), (features, size), (features,))
        ]
        y, z = bottleneck_adapter(*(x, *weights, activation, 0.5, None))
        bottleneck_adapter_backward(*(y, x, z, *weights, activation, 0.5, True, *(True,) * 5))
