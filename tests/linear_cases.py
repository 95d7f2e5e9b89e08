"""Inputs for the linear ops, and how near float64 their results and gradients are."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from peftkern import NF4Weight, nf4_quantize
from peftkern._native import caps, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# out, in: odd, one, beside a vector's or a tile's width, blocks that begin inside rows.
SHAPES = ((1, 1), (7, 33), (65, 130), (513, 72), (33, 320))
# One fp32 sum of up to 4224 products, in parts: errors of about 2^-24 * sqrt(4224), with room.
FP32_SUM = 5e-6
# How much further than all together a single element may be off: 6 standard deviations of its sum, with room.
ELEMENT = 8

# How strides and leading dimensions may be: `randn` and a number of features to x or grad_y [..., features].
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int], Tensor]] = {
    "one row": lambda randn, features: randn(features),
    "many dimensions": lambda randn, features: randn(2, 3, 1, 4, features),
    "transposed": lambda randn, features: randn(features, 5).t(),
    "last dimension moved": lambda randn, features: randn(3, features, 4).transpose(1, 2),
    "rows moved": lambda randn, features: randn(3, 4, features).transpose(0, 1),
    "one row expanded": lambda randn, features: randn(features).expand(5, features),
    "one element expanded": lambda randn, features: randn(1, 1).expand(5, features),
    "columns of a wider matrix": lambda randn, features: randn(5, features + 9)[:, 4 : 4 + features],
    "every second row": lambda randn, features: randn(10, features)[::2],
    "every second column": lambda randn, features: randn(5, 2 * features)[:, ::2],
    "rows of blocks": lambda randn, features: randn(3, 7, features)[:, 2:5],
    "no rows": lambda randn, features: randn(0, features),
    "no rows in many dimensions": lambda randn, features: randn(2, 0, 3, features),
}

Inputs = dict[str, Any]
Function = Callable[..., Tensor]


def random_nf4(shape: tuple[int, int], block_size: int = 64, nested: bool = True) -> NF4Weight:
    return nf4_quantize(torch.randn(shape), block_size, nested)


def linear_inputs(weight: NF4Weight, x: Tensor, bias_dtype: torch.dtype | None = None) -> Inputs:
    """Keyword arguments of nf4_linear."""
    bias = None if bias_dtype is None else 3 * torch.randn(weight.shape[0]).to(bias_dtype)
    return {"x": x, "weight": weight, "bias": bias}


def lora_inputs(
    weight: Tensor | NF4Weight,
    x: Tensor,
    rank: int = 3,
    adapter_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
) -> Inputs:
    """Keyword arguments of lora_linear whose low-rank path is as large as the base."""
    lora_a = torch.randn(rank, weight.shape[1]).to(adapter_dtype)
    lora_b = (torch.randn(weight.shape[0], rank) / rank**0.5).to(adapter_dtype)
    bias = linear_inputs(weight, x, bias_dtype)["bias"]  # type: ignore[arg-type]
    return {
        "x": x,
        "weight": weight,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": torch.tensor(0.7),
        "bias": bias,
    }


def float_tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dtype.is_floating_point
    }


def gradients(
    function: Function, inputs: Inputs, grad_y: Tensor, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """y, and the gradients of the inputs named, by name; of every floating tensor among them by default."""
    names = float_tensors(inputs) if names is None else names
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    y = function(**{**inputs, **leaves})
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), grad_y)))}


@lru_cache(maxsize=2)
def _exact_weight(weight: NF4Weight) -> Tensor:
    return weight.dequantize(torch.float64)


def _widened(inputs: Inputs, power: int) -> Inputs:
    """Every factor of the products in float64, to a power; an NF4 weight as a dense one."""

    def wide(name: str, value: Any) -> Any:
        if isinstance(value, NF4Weight):
            return _exact_weight(value) ** power
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            return value.double() ** power
        return value**power if name == "scaling" else value

    return {name: wide(name, value) for name, value in inputs.items()}


def _storages(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
    """The bytes behind every tensor, with those that a view leaves out."""
    values = [*inputs.values(), grad_y]
    parts = [part for value in values for part in (value.tensors if isinstance(value, NF4Weight) else (value,))]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in tensors]


def assert_near_float64(
    function: Function,
    reference: Function,
    inputs: Inputs,
    grad_y: Tensor,
    expected_inputs: Inputs | None = None,
    frozen: tuple[str, ...] = (),
    through_x: tuple[str, ...] = ("weight",),
    product_error: float = FP32_SUM,
) -> None:
    """y and every gradient of `function` are those of `reference` in float64; nothing it was given is written over.

    `expected_inputs` are the reference's where they differ; inputs in `frozen` get no gradient; gradients of those in
    `through_x` are made from something that was rounded to grad_y's dtype; `product_error` is what the products and
    their sums may lose. The error is a Frobenius norm, over the
    result's norm and what that norm would be if no terms cancelled: the root of the sum of the terms' squares, which
    the same formula gives for squared factors. Each element by itself has ELEMENT times as much. One rounding of each
    element is at most eps / 2 of the first; rounding a weight to bf16, as the bf16 dot products do, about 1.5e-3 of the
    second.
    """
    before = [storage.clone() for storage in _storages(inputs, grad_y)]
    names = [name for name in float_tensors(inputs) if name not in frozen]
    actual = gradients(function, inputs, grad_y, names)
    for now, then in zip(_storages(inputs, grad_y), before):
        assert torch.equal(now, then), "an input was written over"
    expected_inputs = inputs if expected_inputs is None else expected_inputs
    exact = gradients(reference, _widened(expected_inputs, 1), grad_y.double(), names)
    spread = gradients(reference, _widened(expected_inputs, 2), grad_y.double() ** 2, names)
    for name, value in actual.items():
        like = inputs["x" if name == "y" else name]
        assert value.dtype == like.dtype and value.shape == exact[name].shape, name
        error = (value.double() - exact[name]).norm().item()
        size = (exact[name].norm() + spread[name].abs().sqrt().norm()).item()
        dtypes = (value.dtype, grad_y.dtype) if name in through_x else (value.dtype,)
        limit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2 + product_error
        assert error <= limit * size, f"{name}: relative error {error / size:.2e} > {limit:.2e}"
        mean = size / max(1, value.numel()) ** 0.5  # of squares; the terms of what is not linear may seem to cancel
        allowed = ELEMENT * limit * (exact[name].abs() + spread[name].abs().sqrt() + mean)
        beyond = (value.double() - exact[name]).abs() > allowed
        assert not beyond.any(), f"{name}: {beyond.sum()} of {beyond.numel()} elements are wrong"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True)


def compile_counting(function: Function) -> tuple[Function, CompileCounterWithBackend]:
    """`function` compiled without graph breaks for any size, and what counts its graphs."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=graphs, dynamic=True), graphs


def graph_count(graphs: CompileCounterWithBackend) -> int:
    """How often something was compiled; torch's restarts of an analysis leave an empty graph behind."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in graphs.graphs)


@contextmanager
def only_level(isa: str) -> Iterator[None]:
    """The engine runs in the body, at the level `isa` and at no other."""
    before = {level: ops.cpu_tiles_run(level) for level in caps.isas()}
    yield
    ran = {level for level in before if ops.cpu_tiles_run(level) != before[level]}
    assert ran == {isa}
