"""lora_mlp; the formula is that of `peftkern/ops/lora_mlp.py`.

Saved for backward: x, what gate and up gave, h of all three and the masks; act(gate) * up is computed again.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftkern.engines.torch import linear
from peftkern.engines.torch.activations import BACKWARD, FORWARD
from peftkern.engines.torch.autograd import Function, flat, without_autocast
from peftkern.engines.torch.linear import Needed, Needs, Projection, Spec, packed, unpacked


class _Mlp(Function):
    op = "lora_mlp"

    @staticmethod
    def forward(
        p: float, activation: str, outs: tuple[int, ...], specs: tuple[Spec, ...], x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        *first, down = unpacked(specs, _shapes(x.shape[-1], outs), tensors)
        with without_autocast(x):
            (gate, up), hs, masks = linear.forward(flat(x), first, p)
            product = FORWARD[activation](gate).mul_(up)
            (y,), down_hs, down_masks = linear.forward(product, [down], p)
        kept = [t for t in (*hs, *down_hs, *masks, *down_masks) if t is not None]
        return y.view(*x.shape[:-1], y.shape[1]), gate, up, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        p, activation, outs, specs, x, *tensors = inputs
        ctx.save_for_backward(x, *tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.scalars = p, activation, outs, specs, len(tensors)

    @staticmethod
    def gradients(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        p, activation, outs, specs, count = ctx.scalars
        x, *saved = ctx.saved_tensors
        gate, up, *rest = saved[count:]
        projections = unpacked(specs, _shapes(x.shape[-1], outs), saved[:count])
        kept = iter(rest)
        hs = [next(kept) if spec.has_adapter else None for spec in specs]
        masks = [next(kept) if spec.has_adapter and p > 0 else None for spec in specs]
        need_x, wanted = ctx.needs_input_grad[4], iter(ctx.needs_input_grad[5:])
        needs = [Needed.of(spec, wanted) for spec in specs]
        rows, dy = flat(x), flat(grad_y)
        activated = FORWARD[activation](gate)
        product = activated * up
        need_inner = need_x or any(any(need) for need in needs[:2])
        down_needs = Needs(need_inner, [needs[2].lora_a], [needs[2].lora_b])
        grad_product, *grad_down = linear.backward([dy], product, projections[2:], hs[2:], masks[2:], p, down_needs)
        grads = [None, None, dy]
        grad_x = None
        grad_as: linear.Grads = [None, None, *grad_down[0]]
        grad_bs: linear.Grads = [None, None, *grad_down[1]]
        if grad_product is not None:
            grads[:2] = BACKWARD[activation](grad_product * up, gate), activated.mul_(grad_product)
            first = Needs(need_x, [n.lora_a for n in needs[:2]], [n.lora_b for n in needs[:2]])
            grad_x, grad_as[:2], grad_bs[:2] = linear.backward(
                grads[:2], rows, projections[:2], hs[:2], masks[:2], p, first
            )
        found = linear.gradients_in_order(projections, grads, [rows, rows, product], needs, grad_as, grad_bs)
        return *(None,) * 4, None if grad_x is None else grad_x.view(x.shape), *found


def _shapes(features: int, outs: tuple[int, ...]) -> list[tuple[int, int]]:
    middle, _, out = outs
    return [(middle, features), (middle, features), (out, middle)]


def lora_mlp(x: Tensor, projections: Sequence[Projection], activation: str, p: float) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [..., in] and the projections gate, up and down."""
    specs = tuple(Spec.of(projection) for projection in projections)
    outs = tuple(projection.weight.out_features for projection in projections)
    return _Mlp.run(p, activation, outs, specs, x, *packed(projections))[0]  # type: ignore[no-any-return]
