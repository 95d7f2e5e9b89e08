"""What the autograd functions of this engine share.

They are composed of torch's ops, so torch.compile traces into them, and torch.func's transforms know their formulas.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftkern.engines.transforms import is_transformed


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products are in the dtypes they are given in: the public functions have cast x already."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class Function(torch.autograd.Function):
    """An op of this engine: `forward`, `setup_context`, and `gradients` in place of backward.

    A size that x has is read off x in backward: torch.compile hands on a symbolic one only if forward used it itself.

    `gradients(ctx, *grads)` gets what autograd has, None for an undefined gradient, and returns one for each input. It
    is not differentiated itself: a second derivative raises, and names the op.
    """

    op: str
    gradients: Callable[..., tuple[Any, ...]]

    @classmethod
    def run(cls, *inputs: Any) -> Any:
        """The op, differentiable where something asks for a gradient."""
        differentiated = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        if torch.is_grad_enabled() and (differentiated or is_transformed()):
            return cls.apply(*inputs)
        with torch.no_grad():
            return cls.forward(*inputs)

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        gradients, op = cls.gradients, cls.op

        def backward(ctx: Any, *grads: Any) -> Any:
            given = [grad for grad in grads if grad is not None]
            if not given:
                return (None,) * len(ctx.needs_input_grad)
            with torch.no_grad(), without_autocast(given[0]):
                found = gradients(ctx, *grads)
            return _once(op, found, [*given, *ctx.saved_tensors]) if torch.is_grad_enabled() else found

        cls.backward = staticmethod(backward)  # type: ignore[method-assign, assignment]


class _Once(torch.autograd.Function):
    """Gradients that depend on what they were made of, in a way that nobody has written down."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: double backward is not implemented; use backend='reference' for second derivatives"
        )


def _once(op: str, found: Sequence[Any], sources: Sequence[Tensor | None]) -> tuple[Any, ...]:
    places = [i for i, grad in enumerate(found) if grad is not None]
    depends = [source for source in sources if source is not None and source.requires_grad]
    if not places or not depends:
        return tuple(found)
    grads = list(found)
    for i, grad in zip(places, _Once.apply(op, len(places), *(found[i] for i in places), *depends)):
        grads[i] = grad
    return tuple(grads)


def flat(x: Tensor) -> Tensor:
    """[rows, features]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
