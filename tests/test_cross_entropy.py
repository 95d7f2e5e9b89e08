"""cross_entropy against torch's in float64: sizes, layouts, dtypes, levels; torch's tools; errors."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import DTYPES, compile_counting, graph_count, only_level
from torch import Tensor

import peftkern
from peftkern._native import ops
from peftkern.ops.cross_entropy import cross_entropy, cross_entropy_reference

# rows, classes: one class, less than a vector, beside a vector of each level and beside four of them, many, no rows.
SIZES = ((1, 1), (3, 2), (4, 17), (2, 64), (3, 131), (5, 1030), (0, 7))
native = partial(cross_entropy, backend="cpu")


def case(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    target = torch.randint(classes, (rows,))
    target[1::3] = -100
    return (3 * torch.randn(rows, classes)).to(dtype), target


def with_gradient(function: Any, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    torch.manual_seed(7)
    (grad,) = torch.autograd.grad(loss, leaf, torch.randn(loss.shape, dtype=torch.float64).to(loss.dtype))
    return loss.detach(), grad


def assert_near_float64(logits: Tensor, target: Tensor) -> None:
    loss, grad = with_gradient(native, logits, target, reduction="none")
    exact = with_gradient(F.cross_entropy, logits.double(), target, reduction="none")
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype and grad.shape == logits.shape
    # A sum of up to 1030 exponentials, each good to 2 ulp at an argument below 2^5: 1e-6 of it.
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=2e-6)
    rounding = 4e-6 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps / 2 * 1.01
    torch.testing.assert_close(grad.double(), exact[1], rtol=rounding, atol=4e-6 if rounding < 1e-5 else 1e-5)


def test_reference_gradients(seed: int) -> None:
    logits, target = case(5, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_reference(x, target), logits.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(isa: str, dtype: torch.dtype, seed: int) -> None:
    with only_level(isa):
        for rows, classes in SIZES:
            assert_near_float64(*case(rows, classes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Large logits, hidden classes, all alike; the sums neither overflow nor lose the largest."""
    large = torch.tensor([[3e4, 2.99e4, -3e4], [0.0, 60.0, -math.inf], [5.0, 5.0, 5.0]]).repeat(1, 7).to(dtype)
    with only_level(isa):
        assert_near_float64(large, torch.tensor([0, 1, 2]))
        loss, grad = with_gradient(native, large, torch.tensor([2, 2, 0]), reduction="none")
    assert loss[1] == math.inf and torch.isfinite(loss[[0, 2]]).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_show(isa: str, value: float, seed: int) -> None:
    """In the first, middle and last class."""
    with only_level(isa):
        for place in (0, 500, 1029):
            logits, target = case(3, 1030)
            logits[:, place] = value
            assert native(logits, target, reduction="none").isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, seed: int) -> None:
    """Of logits: rows apart, every second column, expanded; of the target and of the gradient."""
    wide, target = case(6, 260, dtype)
    for logits in (wide[:, 3:200], wide[:, ::2], wide[:1].expand(6, -1), wide[::2].repeat(2, 1)):
        target = torch.randint(logits.shape[1], (6, 2))[:, 0]
        assert_near_float64(logits, target)
        expected = with_gradient(native, logits.contiguous(), target.contiguous(), reduction="mean")
        for actual, wanted in zip(with_gradient(native, logits, target, reduction="mean"), expected):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_ignored_rows(reduction: str, seed: int) -> None:
    logits, target = case(9, 40)
    for ignore_index in (-100, 5, int(target[0])):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        chosen = torch.where(target == -100, ignore_index, target)
        actual = with_gradient(native, logits, chosen, **options)
        torch.testing.assert_close(actual, with_gradient(F.cross_entropy, logits, chosen, **options))
        assert not actual[1][chosen == ignore_index].any()
    nothing = torch.full((9,), -100)
    assert native(logits, nothing).isnan() and native(logits, nothing, reduction="sum") == 0


def test_only_gradients_that_are_asked_for(seed: int) -> None:
    logits, target = case(4, 30)
    assert not native(logits, target).requires_grad
    with torch.no_grad():
        assert not native(logits.requires_grad_(), target).requires_grad
    grad = torch.autograd.grad(native(logits, target), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cross_entropy"):
        grad.sum().backward()


def test_threads_give_the_same_bits(seed: int) -> None:
    logits, target = case(300, 1030, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradient(native, logits, target, reduction="none"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_nothing_in_fp32_is_saved(seed: int) -> None:
    logits, target = case(64, 1000, torch.bfloat16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        native(logits.requires_grad_(), target)
    assert sum(kept) < logits.nbytes + 64 * 8 + 2 * 64 * 4 + 1000


def test_opcheck(seed: int) -> None:
    logits, target = case(4, 30)
    torch.library.opcheck(ops.cross_entropy, (logits.requires_grad_(), target, -100))
    _, *sums = ops.cross_entropy(logits.detach(), target, -100)
    torch.library.opcheck(ops.cross_entropy_backward, (torch.randn(4), logits.detach(), target, *sums, -100))


def test_compiles_once_for_all_sizes(seed: int) -> None:
    compiled, graphs = compile_counting(native)
    for rows, classes in ((4, 30), (6, 50), (9, 70)):
        logits, target = case(rows, classes)
        torch.testing.assert_close(with_gradient(compiled, logits, target), with_gradient(native, logits, target))
    assert graph_count(graphs) <= 2


LOGITS, TARGET = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
ERRORS = {
    "logits must be a Tensor, got list": ([1.0], TARGET),
    "logits must be torch.float32 or .*, got torch.int64": (TARGET[:, None], TARGET),
    r"logits must have shape \[rows, classes\], got \[3\]": (LOGITS[0], TARGET),
    r"logits must have shape \[rows, classes\], got \[2, 0\]": (LOGITS[:, :0], TARGET),
    "target must be a Tensor, got int": (LOGITS, 1),
    "target must be torch.int64, got torch.int32": (LOGITS, TARGET.int()),
    r"target must have shape \[2\] \(logits' rows\), got \[1\]": (LOGITS, TARGET[:1]),
    "target must be from 0 to 2 or -100, got 3": (LOGITS, TARGET + 3),
    "target must be from 0 to 2 or -100, got -1": (LOGITS, TARGET - 1),
    "ignore_index must be an int, got float": (LOGITS, TARGET, 1.0),
    "reduction must be one of none, mean, sum, got 'max'": (LOGITS, TARGET, -100, "max"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"cross_entropy: {message}"):
        native(*ERRORS[message])


def test_native_checks_targets_before_it_reads_or_writes() -> None:
    with pytest.raises(RuntimeError, match="target must be from 0 to 2 or -100, got 3"):
        ops.cross_entropy(LOGITS, TARGET + 3, -100)


def test_backends() -> None:
    logits, target = LOGITS.double(), TARGET
    assert cross_entropy(logits, target).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        native(logits, target)
    assert peftkern.explain(cross_entropy, LOGITS, target)[0].implementation == "cpu"
