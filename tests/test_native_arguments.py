"""The native backward ops check every tensor before they read its memory: called as torch.ops, past Python's checks."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import random_nf4
from projection_cases import projection_inputs, projections_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern._native import ops

ROWS, OUT, IN, RANK = 7, 10, 66, 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def nested() -> Any:
    return random_nf4((OUT, IN))


def projections() -> Any:
    inputs = {}
    for i in range(2):
        inputs.update(projection_inputs(i, nested()))
    return zip(*projections_of({name: trained(value) for name, value in inputs.items()}))


def trained(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.dim() else value


def qkv() -> Tensor:
    weights, lora_as, lora_bs, _, _ = projections()
    return torch.cat(peftkern.lora_qkv(leaf(ROWS, IN), weights, lora_as, lora_bs, [1.0, 2.0], None, 0.5, True), 1)


def mlp() -> Tensor:
    weights = [random_nf4(shape) for shape in ((OUT, IN), (OUT, IN), (IN, OUT))]
    adapters = [(leaf(RANK, w.shape[1]), leaf(w.shape[0], RANK), 1.0) for w in weights]
    return peftkern.lora_mlp(leaf(ROWS, IN), *weights, adapters, dropout_p=0.5, training=True)


def multi_lora() -> Tensor:
    lora_as, lora_bs = [leaf(rank, IN) for rank in (3, 5)], [leaf(OUT, rank) for rank in (3, 5)]
    indices = torch.arange(ROWS) % 3 - 1
    return peftkern.multi_lora_linear(leaf(ROWS, IN), nested(), lora_as, lora_bs, [1.0, 2.0], indices, None, 0.5, True)


def dora() -> Tensor:
    factors = leaf(RANK, IN), leaf(OUT, RANK), leaf(OUT)
    return peftkern.dora_linear(leaf(ROWS, IN), nested(), *factors, dropout_p=0.5, training=True, detach_norm=False)


def prompts() -> Tensor:
    ids, chosen, places = torch.randint(9, (3, 4)), torch.tensor([1, 0, 1]), torch.tensor([0, 2])
    return peftkern.prompt_embedding(ids, leaf(9, 6), leaf(2, 2, 6), chosen, prompt_places=places).inputs_embeds


def bottleneck() -> Tensor:
    return peftkern.bottleneck_adapter(leaf(ROWS, IN), leaf(RANK, IN), leaf(RANK), leaf(IN, RANK), leaf(IN))


def prefix() -> Tensor:
    tokens = [leaf(2, heads, 5, 8) for heads in (4, 2, 2)]
    return peftkern.prefix_attention(*tokens, leaf(2, 3, 8), leaf(2, 3, 8), torch.randn(2, 4, 5, 5), enable_gqa=True)


CALLS: dict[str, Callable[[], Tensor]] = {
    "nf4_linear": lambda: peftkern.nf4_linear(leaf(ROWS, IN), nested()),
    "lora_linear": lambda: peftkern.lora_linear(
        leaf(ROWS, IN), nested(), leaf(RANK, IN), leaf(OUT, RANK), dropout_p=0.5, training=True
    ),
    "lora_linear, dense": lambda: peftkern.lora_linear(
        leaf(ROWS, IN), torch.randn(OUT, IN), leaf(RANK, IN), leaf(OUT, RANK)
    ),
    "lora_qkv": qkv,
    "lora_mlp": mlp,
    "multi_lora_linear": multi_lora,
    "dora_linear": dora,
    "ia3_linear": lambda: peftkern.ia3_linear(leaf(ROWS, IN), nested(), leaf(OUT)),
    "ia3_linear, a scale of 0": lambda: peftkern.ia3_linear(
        leaf(ROWS, IN), nested(), torch.zeros(OUT).requires_grad_(), torch.randn(OUT)
    ),
    "ia3_linear, the input": lambda: peftkern.ia3_linear(leaf(ROWS, IN), nested(), leaf(IN), scale_input=True),
    "prompt_embedding": prompts,
    "bottleneck_adapter": bottleneck,
    "prefix_attention": prefix,
    "cross_entropy": lambda: peftkern.cross_entropy(leaf(ROWS, 9), torch.arange(ROWS) + 2),
}
# What another size of the same call looks like: the op, an argument and its dimension.
FREE = {
    ("nf4_linear_backward", "grad_y", 0),
    ("prompt_embedding_backward", "grad", 2),
}
# Never read: y where it cannot tell what was scaled.
UNREAD = {("ia3_linear, a scale of 0", "y")}

Call = tuple[Any, tuple[Any, ...]]


class Recording(TorchDispatchMode):
    """Collects the calls of backward ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peftkern" and func._opname.endswith("_backward"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def backward_calls(name: str) -> list[Call]:
    with Recording() as recording:
        y = CALLS[name]()
        y.backward(torch.randn(y.shape))
    return recording.calls


def tensors_of(func: Any, args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor, Callable[[Tensor], tuple[Any, ...]]]]:
    """Each tensor, also in lists, with its argument's name and what puts another in its place."""

    def with_argument(i: int, value: Any) -> tuple[Any, ...]:
        return *args[:i], value, *args[i + 1 :]

    for i, (argument, value) in enumerate(zip(func._schema.arguments, args)):
        if isinstance(value, Tensor):
            yield argument.name, value, lambda other, i=i: with_argument(i, other)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            for j, entry in enumerate(value):
                yield (
                    argument.name,
                    entry,
                    lambda other, i=i, j=j, v=value: with_argument(i, [*v[:j], other, *v[j + 1 :]]),
                )


def wrong(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The tensor in another dtype (-1), and one smaller in a dimension."""
    yield -1, tensor.to(torch.float64 if tensor.dtype.is_floating_point else torch.int32)
    if not tensor.dim():
        yield 0, tensor.new_empty(0)
    for dim, size in enumerate(tensor.shape):
        if size:
            yield dim, tensor.narrow(dim, 0, size - 1)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_tensors_are_refused(name: str, seed: int) -> None:
    calls = backward_calls(name)
    assert calls
    for func, args in calls:
        func(*args)
        for argument, tensor, put in tensors_of(func, args):
            for dim, other in wrong(tensor.detach()):
                if (func._opname, argument, dim) in FREE or (name, argument) in UNREAD:
                    func(*put(other))
                    continue
                try:
                    func(*put(other))
                except RuntimeError as error:
                    assert str(error).startswith(f"{func._opname}: "), (argument, dim, str(error))
                else:
                    pytest.fail(f"{func._opname}: {argument} taken as {other.dtype} {list(other.shape)}")


def test_every_backward_op_is_called(seed: int) -> None:
    called = {func._opname for name in CALLS for func, _ in backward_calls(name)}
    registered = {
        name.removeprefix("peftkern::")
        for name in torch._C._dispatch_get_all_op_names()
        if re.fullmatch(r"peftkern::\w+_backward", name)
    }
    assert called == registered


@pytest.mark.parametrize(("prompts", "message"), [(0, "there must be 1 prompt, got 0"), (-1, "no fewer than 0")])
def test_a_prompt_that_is_not_there(prompts: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.prompt_embedding_backward(
            torch.ones(2, 5, 4), torch.zeros(2, 3).long(), None, None, 6, prompts, torch.float32, True, True
        )


def test_no_path_of_the_machine_that_compiled_it() -> None:
    """Neither in what our checks raise nor in what those of torch's headers would."""
    for call in (
        lambda: ops.nf4_linear(torch.ones(2, 64), [torch.ones(3), torch.ones(1)], [1, 64, 1, 64, 2], None),
        lambda: ops.nf4_quantize(torch.ones(2, 64), 5),
        lambda: ops.cpu_tiles_run("sse9"),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert "/" not in str(raised.value) and "csrc" not in str(raised.value)
    library = (Path(peftkern.__file__).parent / "_C.abi3.so").read_bytes()
    assert not re.findall(rb"\0/[\w./+-]+\.(?:h|cpp|cu)\b", library)
