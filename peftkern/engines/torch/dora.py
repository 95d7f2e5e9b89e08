"""dora_linear and dora_norm; the formulas are those of `peftkern/ops/dora_linear.py`.

The norm is taken of W + s B A itself, in tiles of rows. Saved for backward: x, h, the mask and, if g trains, z.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.engines.torch.autograd import Function, flat, without_autocast
from peftkern.engines.torch.decode import Kind, Weight
from peftkern.engines.torch.linear import base, dropped, dropped_again, grad_bias, kept_scale
from peftkern.engines.torch.products import Small, add_up, column_sums, down, outer_sums, scaled, up

# Of a tile of fp32 rows: 16 MB.
TILE_ELEMENTS = 1 << 22


class _Dora(Function):
    """y = g * z + bias, z = x W^T + s h B^T; where the base is dropped too, z is of d(x), and y has (x - d(x)) W^T."""

    op = "dora_linear"

    @staticmethod
    def forward(
        p: float,
        drop_base: bool,
        need_z: bool,
        scaling: float,
        kind: Kind,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        g: Tensor,
        bias: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        with without_autocast(x):
            rows, weight = flat(x), kind.weight(parts, g.shape[0], x.shape[-1])
            kept = dropped(rows, p)
            h = down(kept.values, lora_a)
            if drop_base and p > 0:
                z = add_up(base(kept.values, weight, None), h, lora_b, scaling)
                rest = base(torch.sub(rows, kept.values), weight, bias)
                y = torch.addcmul(rest, z, g, out=torch.empty_like(z))
            else:
                z = add_up(base(rows, weight, None), h, lora_b, scaling)
                y = scaled(z, g, bias)
        return y.view(*x.shape[:-1], y.shape[1]), h, z, kept.mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        p, drop_base, need_z, scaling, kind, x, lora_a, lora_b, g, bias, *parts = inputs
        _, h, z, mask = output
        ctx.save_for_backward(x, h, z if need_z else None, mask, lora_a, lora_b, g, bias, *parts)
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)
        ctx.scalars = p, drop_base, scaling, kind

    @staticmethod
    def gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        x, h, z, mask, lora_a, lora_b, g, bias, *parts = ctx.saved_tensors
        p, drop_base, scaling, kind = ctx.scalars
        need_x, need_a, need_b, need_g, need_bias = ctx.needs_input_grad[5:10]
        rows, dy, weight = flat(x), flat(grad_y), kind.weight(tuple(parts), g.shape[0], x.shape[-1])
        dz = scaled(dy, g)
        grad_x = grad_a = grad_b = grad_g = None
        if need_g:
            grad_g = column_sums(dy, z).to(g.dtype)
        if need_b:
            grad_b = outer_sums(h, dz, scaling, lora_b.dtype, columns_first=True)
        dh = Small(down(dz, lora_b.t())) if need_x or need_a else None
        if need_a and dh is not None:
            grad_a = outer_sums(dh, dropped_again(rows, mask, p), scaling, lora_a.dtype)
        if need_x and dh is not None:
            dense = weight.dense(dy.dtype)
            if mask is None:
                grad_x = add_up(dz @ dense, dh, lora_a.t(), scaling)
            elif drop_base:
                through = add_up(torch.sub(dz, dy) @ dense, dh, lora_a.t(), scaling)
                grad_x = (dy @ dense).add_(dropped_again(through, mask, p))
            else:
                through = up(dh, lora_a.t(), dy.dtype)
                grad_x = dz @ dense
                grad_x.add_(torch.ops.aten.native_dropout_backward(through, mask, kept_scale(p) * scaling))
            grad_x = grad_x.view(x.shape)
        grad_bias_ = grad_bias(dy, bias) if need_bias else None
        return *(None,) * 5, grad_x, grad_a, grad_b, grad_g, grad_bias_, *(None,) * len(parts)


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    g: Tensor,
    scaling: float,
    bias: Tensor | None,
    p: float,
    drop_base: bool,
    need_z: bool,
) -> Tensor:
    """g * (x W^T + scaling * d(x) A^T B^T) + bias for x [..., in] and g [out], the magnitude over the norm.

    `need_z` says whether g will be differentiated.
    """
    return _Dora.run(p, drop_base, need_z, scaling, weight.kind, x, lora_a, lora_b, g, bias, *weight.parts)[0]  # type: ignore[no-any-return]


class _Norm(Function):
    """n_j = ||W_j + s B_j A||."""

    op = "dora_norm"

    @staticmethod
    def forward(scaling: float, kind: Kind, lora_a: Tensor, lora_b: Tensor, *parts: Tensor) -> Tensor:
        norm = lora_a.new_empty(lora_b.shape[0], dtype=torch.float32)
        with without_autocast(lora_a):
            for tile, adapted in _adapted_tiles(parts, kind, lora_a, lora_b, scaling):
                torch.linalg.vector_norm(adapted, dim=1, out=norm[tile])
        return norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        scaling, kind, lora_a, lora_b, *parts = inputs
        ctx.save_for_backward(output, lora_a, lora_b, *parts)
        ctx.scalars = scaling, kind

    @staticmethod
    def gradients(ctx: Any, grad_norm: Tensor) -> tuple[Any, ...]:
        norm, lora_a, lora_b, *parts = ctx.saved_tensors
        scaling, kind = ctx.scalars
        _, _, need_a, need_b, *_ = ctx.needs_input_grad
        a, b, ratio = lora_a.float(), lora_b.float(), grad_norm / norm
        grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
        for tile, adapted in _adapted_tiles(tuple(parts), kind, lora_a, lora_b, scaling):
            adapted.mul_(ratio[tile].unsqueeze(1))
            if need_a:
                grad_a.addmm_(b[tile].t(), adapted, alpha=scaling)
            if need_b:
                grad_b[tile] = (adapted @ a.t()).mul_(scaling)
        found = grad_a.to(lora_a.dtype) if need_a else None, grad_b.to(lora_b.dtype) if need_b else None
        return None, None, *found, *(None,) * len(parts)


def dora_norm(weight: Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """||W_j + scaling * B_j A|| of every row, fp32 [out]; differentiable in both factors."""
    return _Norm.run(scaling, weight.kind, lora_a, lora_b, *weight.parts)  # type: ignore[no-any-return]


def square_norm(weight: Weight) -> Tensor:
    """||W_j||^2 of every row, fp32 [out]."""
    norm = torch.empty(weight.out_features, dtype=torch.float32, device=weight.device)
    for tile in _tiles(weight):
        norm[tile] = weight.rows(tile.start, tile.stop).dense(torch.float32).detach().square().sum(1)
    return norm


def _tiles(weight: Weight) -> Iterator[slice]:
    """Ranges of rows that begin where codes, blocks and groups of scales do."""
    rows, step = weight.out_features, weight.row_step
    step *= max(1, TILE_ELEMENTS // max(1, step * weight.in_features))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _adapted_tiles(
    parts: tuple[Tensor, ...], kind: Kind, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Iterator[tuple[slice, Tensor]]:
    """W + s B A in fp32, tile by tile."""
    weight = kind.weight(parts, lora_b.shape[0], lora_a.shape[1])
    a, b = lora_a.float(), lora_b.float()
    for tile in _tiles(weight):
        dense = weight.rows(tile.start, tile.stop).dense(torch.float32)
        yield tile, torch.addmm(dense, b[tile], a, alpha=scaling)
