"""bottleneck_adapter; the formula is that of `peftkern/ops/bottleneck_adapter.py`. Saved for backward: x and z."""

from typing import Any

import torch
from torch import Tensor

from peftkern.engines.torch.activations import BACKWARD, FORWARD
from peftkern.engines.torch.autograd import Function, flat, without_autocast
from peftkern.engines.torch.products import add_up, column_sums, down, outer_sums


class _Bottleneck(Function):
    op = "bottleneck_adapter"

    @staticmethod
    def forward(
        activation: str,
        scaling: float,
        x: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
        up_weight: Tensor,
        up_bias: Tensor,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            rows = flat(x)
            z = down(rows, down_weight).add_(down_bias)
            start = rows if residual is None else flat(residual)
            y = torch.add(start, up_bias, alpha=scaling, out=torch.empty_like(rows))
            add_up(y, FORWARD[activation](z), up_weight, scaling)
        return y.view(x.shape), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        activation, scaling, *tensors, residual = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.scalars = activation, scaling
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    def gradients(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Any, ...]:
        activation, scaling = ctx.scalars
        x, down_weight, down_bias, up_weight, up_bias, z = ctx.saved_tensors
        need_x, need_down, need_down_bias, need_up, need_up_bias, need_residual = ctx.needs_input_grad[2:]
        rows, dy = flat(x), flat(grad_y)
        grad_x = grad_down = grad_down_bias = grad_up = grad_up_bias = grad_residual = None
        if need_up:
            grad_up = outer_sums(FORWARD[activation](z), dy, scaling, up_weight.dtype, columns_first=True)
        if need_up_bias:
            grad_up_bias = column_sums(dy).mul_(scaling).to(up_bias.dtype)
        if need_x or need_down or need_down_bias:
            dz = BACKWARD[activation](down(dy, up_weight.t()).to(z.dtype), z)
            if need_down:
                grad_down = outer_sums(dz, rows, scaling, down_weight.dtype)
            if need_down_bias:
                grad_down_bias = column_sums(dz).mul_(scaling).to(down_bias.dtype)
            if need_x:
                grad_x = torch.zeros_like(dy) if ctx.residual_dtype is not None else dy.clone()
                grad_x = add_up(grad_x, dz, down_weight.t(), scaling).view(x.shape)
        if need_residual:
            grad_residual = grad_y.to(ctx.residual_dtype)
        return None, None, grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_residual


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    activation: str,
    scaling: float,
    residual: Tensor | None,
) -> Tensor:
    """residual + scaling * (f(x D^T + b_D) U^T + b_U) for x [..., d]; without a residual it is x."""
    arguments = (activation, scaling, x, down_weight, down_bias, up_weight, up_bias, residual)
    return _Bottleneck.run(*arguments)[0]  # type: ignore[no-any-return]
