"""nf4_linear against float64: every dtype, level, layout and size; gradients and torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    gradients,
    graph_count,
    linear_inputs,
    only_level,
    random_nf4,
    relative_error,
)
from torch import Tensor

from peftkern import NF4Weight, nf4_linear
from peftkern._native import ops
from peftkern.ops._linear import native_weight
from peftkern.ops.nf4_linear import nf4_linear_reference
from peftkern.ops.nf4_quantize import BLOCK_SIZES

OUT, IN = 7, 33


def native(**inputs: Any) -> Tensor:
    return nf4_linear(**inputs, backend="cpu")


def check(inputs: dict[str, Any]) -> None:
    """nf4_linear against float64, with a random grad_y of x's strides."""
    x, out_features = inputs["x"], inputs["weight"].shape[0]
    grad_y = torch.randn(*x.shape[:-1], out_features).to(x.dtype)
    assert_near_float64(native, nf4_linear_reference, inputs, grad_y)


def test_reference_gradients(seed: int) -> None:
    weight = random_nf4((OUT, IN))
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: nf4_linear(x, weight, bias), (x, bias))
    assert torch.autograd.gradcheck(lambda x: nf4_linear(x, weight), (x,))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, nested: bool, seed: int) -> None:
    with only_level(isa):
        for shape in SHAPES:
            weight = random_nf4(shape, nested=nested)
            for rows, bias_dtype in ((1, dtype), (64, torch.float32), (300, None)):
                check(linear_inputs(weight, torch.randn(rows, shape[1]).to(dtype), bias_dtype))


@pytest.mark.parametrize("shape", [(21, 4224), (70, 96), (70, 99)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    """Every number of rows that a kernel of its own may take, where rows begin with a block and where they don't."""
    weight = random_nf4(shape, nested=False)
    with only_level(isa):
        for rows in range(1, 26):
            check(linear_inputs(weight, torch.randn(rows, shape[1]).to(dtype)))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(isa: str, dtype: torch.dtype, block_size: int, seed: int) -> None:
    with only_level(isa):
        for shape, row_counts in (((19, 4096), (3, 17)), ((37, 320), (1, 4, 40)), ((35, 131), (2, 5, 40))):
            for nested in (False, True):
                weight = random_nf4(shape, block_size, nested)
                for rows in row_counts:
                    check(linear_inputs(weight, torch.randn(rows, shape[1]).to(dtype), dtype))


@pytest.fixture(scope="module")
def large() -> tuple[NF4Weight, Tensor]:
    """4096 x 4096 as NF4, and its values in float64."""
    weight = random_nf4((4096, 4096))
    return weight, weight.dequantize(torch.float64)


@pytest.mark.parametrize("rows", [4, 16, 64])
def test_accuracy_of_inputs_with_a_mean(isa: str, rows: int, large: tuple[NF4Weight, Tensor], seed: int) -> None:
    """The values of a plain bf16 codebook have a common error, which such inputs sum up to 2e-2."""
    weight, dense = large
    for x in (torch.randn(rows, 4096) + 1, torch.randn(rows, 4096).relu()):
        x = x.bfloat16().requires_grad_()
        y = native(x=x, weight=weight)
        (grad_x,) = torch.autograd.grad(y, x, x.detach())
        assert relative_error(y.detach(), x.detach().double() @ dense.t()) <= 4e-3
        assert relative_error(grad_x, x.detach().double() @ dense) <= 4e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    for shape in ((OUT, IN), (20, 64)):
        grad_y, x = (LAYOUTS[layout](randn, features) for features in shape)
        assert_near_float64(native, nf4_linear_reference, linear_inputs(random_nf4(shape, 32), x, dtype), grad_y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_backward(isa: str, dtype: torch.dtype, seed: int) -> None:
    """The gradient of a sum is one element, expanded."""
    weight = random_nf4((OUT, IN))
    x = torch.randn(4, IN, dtype=dtype, requires_grad=True)
    nf4_linear(x, weight).sum().backward()
    (expected,) = torch.autograd.grad(nf4_linear(x, weight), x, torch.ones(4, OUT, dtype=dtype))
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_non_finite_rows_stay_apart(isa: str, seed: int) -> None:
    """NaN and infinity in a row of x reach its row of y and no other, whichever the number of rows."""
    for dtype in DTYPES:
        for shape in ((33, 320), (OUT, IN)):
            weight = random_nf4(shape)
            for rows in (1, 2, 4, 6, 13, 40):
                x = torch.randn(rows, shape[1]).to(dtype)
                expected = native(x=x, weight=weight)
                x[rows // 2, ::5] = float("nan")
                y = native(x=x, weight=weight)
                assert y[rows // 2].isnan().all()
                others = [row for row in range(rows) if row != rows // 2]
                torch.testing.assert_close(y[others], expected[others], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    weight = random_nf4((513, 320))
    for rows in (1, 4, 16, 64, 300):
        inputs = linear_inputs(weight, torch.randn(rows, 320).to(dtype), dtype)
        grad_y = torch.randn(rows, 513).to(dtype)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            results.append(gradients(native, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing_where_the_output_is_narrow(
    isa: str, dtype: torch.dtype, set_threads: Any, seed: int
) -> None:
    """Rows are shared then, but never so few that the kernel for few rows takes some of them."""
    weight = random_nf4((33, 64))
    for rows in (40, 70, 130, 256):
        inputs = linear_inputs(weight, torch.randn(rows, 64).to(dtype), dtype)
        results = []
        for threads in (1, 2, 3, 5, 8):
            set_threads(threads)
            results.append(gradients(native, inputs, torch.ones(rows, 33).to(dtype)))
        for result in results[1:]:
            assert_same_bits(result, results[0])


def test_rows_do_not_depend_on_what_is_beside_them(isa: str, seed: int) -> None:
    """Rows beyond the largest tile give what a single tile of the same kind gives."""
    weight = random_nf4((70, 320))
    x = torch.randn(600, 320).bfloat16()
    assert torch.equal(native(x=x, weight=weight)[:300], native(x=x[:300], weight=weight))


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("needs_bias", [False, True])
def test_only_what_is_asked_for_gets_a_gradient(needs_x: bool, needs_bias: bool, seed: int) -> None:
    weight = random_nf4((OUT, IN), nested=False)
    x, bias = torch.randn(3, IN, requires_grad=needs_x), torch.randn(OUT, requires_grad=needs_bias)
    y = nf4_linear(x, weight, bias)
    assert y.requires_grad == (needs_x or needs_bias)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (needs_x, needs_bias)
    with torch.no_grad():
        assert not nf4_linear(x, weight, bias).requires_grad
    with torch.inference_mode():
        assert torch.equal(nf4_linear(x, weight, bias), y.detach())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, with_bias: bool, nested: bool, seed: int) -> None:
    weight = random_nf4((OUT, IN), 32, nested)
    bias = torch.randn(OUT, requires_grad=True) if with_bias else None
    x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
    torch.library.opcheck(ops.nf4_linear, (x, *native_weight(weight), bias))
    grad_y = torch.randn(2, 3, OUT, dtype=dtype)
    torch.library.opcheck(ops.nf4_linear_backward, (grad_y, *native_weight(weight)))


def test_compile_without_graph_breaks(seed: int) -> None:
    """With one graph for any number of rows."""
    weight, bias = random_nf4((OUT, IN)), torch.randn(OUT)

    def function(**values: Any) -> Tensor:
        return nf4_linear(**values, weight=weight)

    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs, grad_y = {"x": torch.randn(rows, IN), "bias": bias}, torch.randn(rows, OUT)
        assert_same_bits(gradients(compiled, inputs, grad_y), gradients(function, inputs, grad_y))
    assert graph_count(graphs) == 1


def test_autocast(isa: str, seed: int) -> None:
    weight = random_nf4((OUT, IN))
    x, bias = torch.randn(3, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, weight, bias)
        float_y = nf4_linear(x.half(), weight)
    assert y.dtype == float_y.dtype == torch.bfloat16
    assert torch.equal(y, nf4_linear(x.bfloat16(), weight, bias.bfloat16()))
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_double_backward(seed: int) -> None:
    weight, x = random_nf4((OUT, IN)), torch.randn(3, IN, requires_grad=True)
    with pytest.raises(RuntimeError, match="nf4_linear: double backward is not implemented"):
        (grad_x,) = torch.autograd.grad(nf4_linear(x, weight).square().sum(), x, create_graph=True)
        grad_x.sum().backward()
    (grad_x,) = torch.autograd.grad(nf4_linear(x, weight, backend="reference").square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad_x.sum(), x)
    dense = weight.dequantize(torch.float32)
    torch.testing.assert_close(second, (2 * dense.t() @ dense).sum(0).expand(3, IN))


def test_one_wrong_element_of_many_is_seen(seed: int) -> None:
    """By what the tests of all ops compare with."""
    inputs = linear_inputs(random_nf4((512, 64)), torch.randn(300, 64).bfloat16())
    wrong = torch.zeros(300, 512, dtype=torch.bfloat16)
    wrong[7, 5] = 8  # of 150,000 elements of about that size
    grad_y = torch.randn(300, 512).bfloat16()
    assert_near_float64(nf4_linear, nf4_linear_reference, inputs, grad_y, frozen=("weight",))
    with pytest.raises(AssertionError, match="y: 1 of 153600 elements are wrong"):
        assert_near_float64(
            lambda **given: nf4_linear(**given) + wrong, nf4_linear_reference, inputs, grad_y, frozen=("weight",)
        )
