"""ia3_linear; the formula is that of `peftkern/ops/ia3_linear.py`.

Saved for backward: where the input is scaled, x; else z = x W^T + bias, which no scale, however small, takes from us.
"""

from typing import Any

from torch import Tensor

from peftkern.engines.torch.autograd import Function, flat, without_autocast
from peftkern.engines.torch.decode import Kind, Weight
from peftkern.engines.torch.linear import base, grad_bias
from peftkern.engines.torch.products import column_sums, scaled
from peftkern.engines.transforms import is_transformed


class _OutputScaled(Function):
    op = "ia3_linear"

    @staticmethod
    def forward(
        kind: Kind, out: int, x: Tensor, scale: Tensor, bias: Tensor | None, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            z = base(flat(x), kind.weight(parts, out, x.shape[-1]), bias)
            y = scaled(z, scale)
        return y.view(*x.shape[:-1], y.shape[1]), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        kind, out, x, scale, bias, *parts = inputs
        ctx.save_for_backward(output[1] if scale.requires_grad or is_transformed() else None, scale, bias, *parts)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.out, ctx.x_shape = kind, out, x.shape

    @staticmethod
    def gradients(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Any, ...]:
        z, scale, bias, *parts = ctx.saved_tensors
        weight = ctx.kind.weight(tuple(parts), ctx.out, ctx.x_shape[-1])
        need_x, need_scale, need_bias, *_ = ctx.needs_input_grad[2:]
        dy = flat(grad_y)
        grad_x = grad_scale = grad_bias_ = None
        if need_scale:
            grad_scale = column_sums(dy, z).to(scale.dtype)
        if need_x:
            dz = scaled(dy, scale)
            grad_x = (dz @ weight.dense(dy.dtype)).view(ctx.x_shape)
        if need_bias:
            grad_bias_ = (column_sums(dy) * scale).to(bias.dtype)
        return None, None, grad_x, grad_scale, grad_bias_, *(None,) * len(parts)


class _InputScaled(Function):
    op = "ia3_linear"

    @staticmethod
    def forward(kind: Kind, out: int, x: Tensor, scale: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        with without_autocast(x):
            y = base(scaled(flat(x), scale), kind.weight(parts, out, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        kind, out, x, scale, bias, *parts = inputs
        ctx.save_for_backward(x if scale.requires_grad or is_transformed() else None, scale, bias, *parts)
        ctx.kind, ctx.out, ctx.x_shape = kind, out, x.shape

    @staticmethod
    def gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, scale, bias, *parts = ctx.saved_tensors
        weight = ctx.kind.weight(tuple(parts), ctx.out, ctx.x_shape[-1])
        need_x, need_scale, need_bias, *_ = ctx.needs_input_grad[2:]
        dy = flat(grad_y)
        grad_x = grad_scale = None
        if need_x or need_scale:
            unscaled = dy @ weight.dense(dy.dtype)
            grad_scale = column_sums(unscaled, flat(x)).to(scale.dtype) if need_scale else None
            grad_x = scaled(unscaled, scale).view(ctx.x_shape) if need_x else None
        return None, None, grad_x, grad_scale, grad_bias(dy, bias) if need_bias else None, *(None,) * len(parts)


def ia3_linear(x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, scale_input: bool) -> Tensor:
    """scale * (x W^T + bias), or (scale * x) W^T + bias, for x [..., in]."""
    if scale_input:
        return _InputScaled.run(weight.kind, weight.out_features, x, scale, bias, *weight.parts)  # type: ignore[no-any-return]
    return _OutputScaled.run(weight.kind, weight.out_features, x, scale, bias, *weight.parts)[0]  # type: ignore[no-any-return]
