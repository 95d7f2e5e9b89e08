"""What the tests of the Triton ops share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peftkern import NF4Weight

# One dtype that the interpreter computes in exactly as a GPU does, and one whose roundings show.
KINDS = ("nf4", "dense")


def on(device: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` by Triton on `device`, of tensors that lie on the CPU and differentiable in them."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor | NF4Weight) else value

    def run(**inputs: Any) -> Tensor:
        return function(**{name: moved(value) for name, value in inputs.items()}, **options, backend="triton").cpu()

    return run
