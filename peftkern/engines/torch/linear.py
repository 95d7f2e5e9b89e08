"""Linear layers with low-rank adapters, one or several on the same x: nf4_linear, lora_linear and lora_qkv.

The formulas are those of `peftkern/ops/lora_linear.py` and `lora_qkv.py`. Saved for backward: x, h = d(x) A^T of each
adapter, dropout's mask, and the weights as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.engines.torch.autograd import Function, flat, without_autocast
from peftkern.engines.torch.decode import DENSE, Kind, Weight
from peftkern.engines.torch.products import Small, add_up, column_sums, down, outer_sums, up


class Projection(NamedTuple):
    """A linear layer with an adapter, or without one: lora_a and lora_b are None."""

    weight: Weight
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    bias: Tensor | None


def _a(projection: Projection) -> Tensor:
    assert projection.lora_a is not None
    return projection.lora_a


class Dropped(NamedTuple):
    """d(x), and what tells which elements it kept."""

    values: Tensor
    mask: Tensor | None


def dropped(x: Tensor, p: float) -> Dropped:
    """d(x) in one launch: an element is kept with probability 1 - p, and divided by it."""
    return Dropped(*torch.native_dropout(x, p, True)) if p > 0 else Dropped(x, None)


def dropped_again(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """d(x), or the gradient through d, by the mask of forward."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, kept_scale(p))


def kept_scale(p: float) -> float:
    """What kept elements are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def base(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias by the library, in x's dtype."""
    return F.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def forward(
    x: Tensor, projections: Sequence[Projection], p: float
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """y, h and mask of each; x [rows, in]. Without dropout, the adapters' first products read x once."""
    own = [i for i, projection in enumerate(projections) if projection.lora_a is not None]
    hs: list[Tensor | None] = [None] * len(projections)
    masks: list[Tensor | None] = [None] * len(projections)
    if p == 0 and len(own) > 1 and len({_a(projections[i]).dtype for i in own}) == 1:
        factors = [_a(projections[i]) for i in own]
        parts = down(x, torch.cat(factors)).split([len(factor) for factor in factors], 1)
        for i, part in zip(own, parts):
            hs[i] = part
    else:
        for i in own:
            kept = dropped(x, p)
            hs[i], masks[i] = down(kept.values, _a(projections[i])), kept.mask
    ys = []
    for (weight, _, lora_b, scaling, bias), h in zip(projections, hs):
        y = base(x, weight, bias)
        ys.append(y if h is None or lora_b is None else add_up(y, h, lora_b, scaling))
    return ys, hs, masks


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of each projection's factors."""

    x: bool
    lora_a: Sequence[bool]
    lora_b: Sequence[bool]


Grads = list[Tensor | None]


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    p: float,
    needs: Needs,
) -> tuple[Tensor | None, Grads, Grads]:
    """The gradients of x, of each A and of each B; x and grads [rows, features], None for those of unused results."""
    grad_x: Tensor | None = None
    grad_as: Grads = [None] * len(projections)
    grad_bs: Grads = [None] * len(projections)
    for i, (dy, projection, h, mask) in enumerate(zip(grads, projections, hs, masks)):
        if dy is None:
            continue
        if needs.x:
            dense = projection.weight.dense(dy.dtype)
            grad_x = dy @ dense if grad_x is None else grad_x.addmm_(dy, dense)
            del dense
        if projection.lora_a is None or projection.lora_b is None or h is None:
            continue
        lora_a, lora_b, scaling = projection.lora_a, projection.lora_b, projection.scaling
        if needs.lora_b[i]:
            grad_bs[i] = outer_sums(h, dy, scaling, lora_b.dtype, columns_first=True)
        if not (needs.x or needs.lora_a[i]):
            continue
        dh = Small(down(dy, lora_b.t()))  # scaled where it is used
        if needs.lora_a[i]:
            grad_as[i] = outer_sums(dh, dropped_again(x, mask, p), scaling, lora_a.dtype)
        if grad_x is not None and mask is None:
            add_up(grad_x, dh, lora_a.t(), scaling)
        elif grad_x is not None:
            through = up(dh, lora_a.t(), dy.dtype)
            grad_x.add_(torch.ops.aten.native_dropout_backward(through, mask, kept_scale(p) * scaling))
    return grad_x, grad_as, grad_bs


class Spec(NamedTuple):
    """What of a projection is no tensor, beside an autograd function's flat list of those that it has."""

    scaling: float
    has_adapter: bool
    has_bias: bool
    parts: int
    kind: Kind

    @staticmethod
    def of(projection: Projection) -> "Spec":
        """What a projection is beside its tensors."""
        weight = projection.weight
        has_adapter, has_bias = projection.lora_a is not None, projection.bias is not None
        return Spec(projection.scaling, has_adapter, has_bias, len(weight.parts), weight.kind)


def packed(projections: Sequence[Projection]) -> list[Tensor]:
    """Every tensor of theirs, in the order in which `unpacked` takes them."""
    tensors: list[Tensor] = []
    for weight, lora_a, lora_b, _, bias in projections:
        tensors += [t for t in (lora_a, lora_b, bias) if t is not None]
        tensors += weight.parts
    return tensors


def unpacked(specs: Sequence[Spec], shapes: Sequence[tuple[int, int]], tensors: Sequence[Tensor]) -> list[Projection]:
    """The projections that `packed` made flat; `shapes` are those of the weights."""
    left = iter(tensors)
    projections = []
    for spec, shape in zip(specs, shapes):
        lora_a, lora_b = (next(left), next(left)) if spec.has_adapter else (None, None)
        bias = next(left) if spec.has_bias else None
        weight = spec.kind.weight(tuple(next(left) for _ in range(spec.parts)), *shape)
        projections.append(Projection(weight, lora_a, lora_b, spec.scaling, bias))
    return projections


class _Linear(Function):
    op = "lora_linear"

    @staticmethod
    def forward(
        p: float, outs: tuple[int, ...], specs: tuple[Spec, ...], x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with without_autocast(x):
            shapes = [(out, x.shape[-1]) for out in outs]
            ys, hs, masks = forward(flat(x), unpacked(specs, shapes, tensors), p)
        shaped = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
        return *shaped, *(kept for kept in (*hs, *masks) if kept is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        p, outs, specs, x, *tensors = inputs
        kept = output[len(specs) :]
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.p, ctx.outs, ctx.specs, ctx.count = p, outs, specs, len(tensors)

    @staticmethod
    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        specs, p = ctx.specs, ctx.p
        shapes = [(out, x.shape[-1]) for out in ctx.outs]
        projections, kept = unpacked(specs, shapes, saved[: ctx.count]), iter(saved[ctx.count :])
        hs = [next(kept) if spec.has_adapter else None for spec in specs]
        masks = [next(kept) if spec.has_adapter and p > 0 else None for spec in specs]
        need_x, wanted = ctx.needs_input_grad[3], iter(ctx.needs_input_grad[4:])
        dys = [None if dy is None else flat(dy) for dy in grads[: len(specs)]]
        needs = [Needed.of(spec, wanted) for spec in specs]
        rows = flat(x)
        grad_x, grad_as, grad_bs = backward(
            dys, rows, projections, hs, masks, p, Needs(need_x, [n.lora_a for n in needs], [n.lora_b for n in needs])
        )
        found = gradients_in_order(projections, dys, [rows] * len(specs), needs, grad_as, grad_bs)
        return None, None, None, None if grad_x is None else grad_x.view(x.shape), *found


class Needed(NamedTuple):
    """Which gradients of a projection are wanted."""

    lora_a: bool
    lora_b: bool
    bias: bool
    weight: bool

    @staticmethod
    def of(spec: Spec, wanted: Iterator[bool]) -> "Needed":
        """Takes a projection's flags from those of all tensors, in the order of `packed`."""
        lora_a, lora_b = (next(wanted), next(wanted)) if spec.has_adapter else (False, False)
        bias = next(wanted) if spec.has_bias else False
        parts = [next(wanted) for _ in range(spec.parts)]
        return Needed(lora_a, lora_b, bias, parts[0] and spec.kind.format == DENSE)


def grad_bias(dy: Tensor | None, bias: Tensor) -> Tensor | None:
    """Of a bias: the sum of dy's rows."""
    return None if dy is None else column_sums(dy).to(bias.dtype)


def grad_weight(dy: Tensor | None, x: Tensor, weight: Weight) -> Tensor | None:
    """Of a dense weight that trains."""
    return None if dy is None else (dy.t() @ x).to(weight.parts[0].dtype)


def gradients_in_order(
    projections: Sequence[Projection],
    grads: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    needs: Sequence[Needed],
    grad_as: Grads,
    grad_bs: Grads,
) -> Grads:
    """Those of every tensor in the order of `packed`, biases and dense weights included."""
    found: Grads = []
    for (weight, lora_a, _, _, bias), dy, x, need, grad_a, grad_b in zip(
        projections, grads, xs, needs, grad_as, grad_bs
    ):
        if lora_a is not None:
            found += [grad_a, grad_b]
        if bias is not None:
            found.append(grad_bias(dy, bias) if need.bias else None)
        found.append(grad_weight(dy, x, weight) if need.weight else None)
        found += [None] * (len(weight.parts) - 1)
    return found


def linears(x: Tensor, projections: Sequence[Projection], p: float) -> tuple[Tensor, ...]:
    """y of each projection of x [..., in]; p is the probability of dropping, 0 outside of training."""
    specs = tuple(Spec.of(projection) for projection in projections)
    outs = tuple(projection.weight.out_features for projection in projections)
    return _Linear.run(p, outs, specs, x, *packed(projections))[: len(projections)]  # type: ignore[no-any-return]
