"""nf4_linear in Triton against float64: few rows and many, blocks that fit a step and that do not, torch's tools."""

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
    random_nf4,
    relative_error,
)
from torch import Tensor

from peftkern import NF4Weight, nf4_linear
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops._weight_triton import FEW_ROWS, runs_fused
from peftkern.ops.nf4_linear import nf4_linear_reference

ops = NAMESPACES["triton"].library
# A weight rounded to x's dtype, which loses 2^-9 of each term at most, and FP32_SUM.
ROUNDED_WEIGHT = {torch.float32: 5e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def on_device(device: str) -> Any:
    """nf4_linear on the device for inputs, results and gradients on the CPU."""

    def run(**inputs: Any) -> Tensor:
        moved = {k: v.to(device) if isinstance(v, Tensor | NF4Weight) else v for k, v in inputs.items()}
        return nf4_linear(**moved, backend="triton").cpu()

    return run


def check(device: str, inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype) if grad_y is None else grad_y
    error = ROUNDED_WEIGHT[x.dtype]
    assert_near_float64(on_device(device), nf4_linear_reference, inputs, grad_y, product_error=error)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(device: str, dtype: torch.dtype, nested: bool, seed: int) -> None:
    """Decoded inside the product, sums in one part and in several, with and without a bias."""
    for rows, shape, block_size in ((1, (1, 64), 64), (5, (70, 192), 64), (64, (33, 512), 256), (17, (8, 640), 128)):
        assert runs_fused(rows, shape[1], block_size)
        x = torch.randn(rows, shape[1]).to(dtype)
        check(device, linear_inputs(random_nf4(shape, block_size, nested), x, None if rows == 5 else torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_first(device: str, dtype: torch.dtype, seed: int) -> None:
    """Many rows, small blocks, and rows of the weight that begin inside a block."""
    cases = (
        (FEW_ROWS + 1, (7, 64), 64),
        (3, (7, 64), 32),
        (3, (7, 64), 128),
        *((2, shape, 64) for shape in SHAPES[:3]),
    )
    for rows, shape, block_size in cases:
        assert not runs_fused(rows, shape[1], block_size)
        check(device, linear_inputs(random_nf4(shape, block_size), torch.randn(rows, shape[1]).to(dtype), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (7, 64))
    check(device, linear_inputs(random_nf4((7, 64)), x, torch.float32), grad_y)


def test_strided_bias(device: str, seed: int) -> None:
    for rows in (2, FEW_ROWS + 1):
        check(device, {**linear_inputs(random_nf4((7, 64)), torch.randn(rows, 64)), "bias": torch.randn(7, 2)[:, 0]})


def test_accuracy_of_inputs_with_a_mean(device: str, seed: int) -> None:
    """No worse than a weight that is rounded once, 2.5e-3."""
    weight, x = random_nf4((64, 2048)), (torch.randn(4, 2048) + 1).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert relative_error(on_device(device)(x=x, weight=weight), exact) <= 4e-3


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 1])
def test_gradients_that_are_asked_for(device: str, rows: int, seed: int) -> None:
    inputs, grad_y = linear_inputs(random_nf4((7, 64)), torch.randn(rows, 64), torch.float32), torch.randn(rows, 7)
    both = gradients(on_device(device), inputs, grad_y)
    for name in ("x", "bias"):
        assert_same_bits(gradients(on_device(device), inputs, grad_y, [name]), {k: both[k] for k in ("y", name)})
    with torch.no_grad():
        assert not on_device(device)(**inputs).requires_grad


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 1])
def test_opcheck(device: str, rows: int, seed: int) -> None:
    q = random_nf4((7, 64)).to(device)
    x, bias = (
        torch.randn(rows, 64, device=device, requires_grad=True),
        torch.randn(7, device=device, requires_grad=True),
    )
    torch.library.opcheck(ops.nf4_linear, (x, *native_weight(q), bias))
    torch.library.opcheck(ops.nf4_linear_backward, (torch.randn(rows, 7, device=device), *native_weight(q)))


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    """With one graph for few rows and for many."""
    inputs = linear_inputs(random_nf4((7, 64)), torch.randn(2, 64), torch.float32)
    weight = inputs.pop("weight")
    compiled, graphs = compile_counting(lambda **values: on_device(device)(**values, weight=weight))
    for rows in (50, 51, 70):
        inputs["x"], grad_y = torch.randn(rows, 64), torch.randn(rows, 7)
        eager = gradients(on_device(device), {**inputs, "weight": weight}, grad_y, inputs)
        assert_same_bits(gradients(compiled, inputs, grad_y), eager)
    assert graph_count(graphs) == 1


def test_double_backward(device: str, seed: int) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = on_device(device)(x=x, weight=random_nf4((7, 64)))
    with pytest.raises(RuntimeError, match="nf4_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tensors_on_different_devices(device: str, name: str) -> None:
    inputs = linear_inputs(random_nf4((7, 64)), torch.randn(2, 64), torch.float32)
    moved = {key: value.to("meta" if key == name else device) for key, value in inputs.items()}
    with pytest.raises(RuntimeError, match=f"nf4_linear: {name} must be on x's device {device}.*, got meta"):
        nf4_linear(**moved, backend="triton")
