"""ia3_linear in Triton against float64: both sides, dtypes, layouts, scales of zero; only what is asked for."""

from typing import Any

import pytest
import torch
from linear_cases import (
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    gradients,
    graph_count,
    relative_error,
)
from test_ia3_linear import SIDES, ia3_inputs, random_weight, small
from torch import Tensor
from triton_cases import on

from peftkern import ia3_linear
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.ia3_linear import ia3_linear_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(device: str, inputs: dict[str, Any], grad_y: Any = None) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype) if grad_y is None else grad_y
    through = ("y", "x", "scale", "bias")
    assert_near_float64(on(device, ia3_linear), ia3_linear_reference, inputs, grad_y, None, ("weight",), through)


@SIDES
@pytest.mark.parametrize("kind", ["nf4", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, kind: str, scale_input: bool, seed: int) -> None:
    for shape in ((1, 1), (70, 33), (40, 192)):
        x = 0.5 + torch.randn(67, shape[1])
        check(device, ia3_inputs(random_weight(kind, shape), x.to(dtype), scale_input, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (7, 33))
    for scale_input in (False, True):
        check(device, ia3_inputs(random_weight("float32", (7, 33)), x, scale_input), grad_y)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("nf4", torch.float32), ("nf4", torch.bfloat16), ("float32", torch.float16)]
)
def test_a_scale_of_zero(device: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    """y does not tell what it multiplied, yet its gradient is right, also in a second tile of columns and depth."""
    inputs = ia3_inputs(random_weight(kind, (130, 70)), torch.randn(70, 70).to(dtype), False, dtype)
    inputs["scale"][torch.tensor([1, 69])] = 0
    check(device, inputs)
    inputs["scale"].zero_()
    check(device, {**inputs, "bias": None})


@pytest.mark.parametrize("small_scale", [2e-8, -0.06, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiny_scale(device: str, dtype: torch.dtype, small_scale: float, seed: int) -> None:
    """Rounded to its dtype, y is 0 or coarse, yet the scale's gradient is right."""
    inputs = ia3_inputs(random_weight("nf4", (70, 33)), torch.randn(20, 33).to(dtype), False, dtype)
    inputs["scale"].fill_(small_scale)
    grad_y = torch.randn(20, 70).to(dtype)
    actual = gradients(on(device, ia3_linear), inputs, grad_y, ["scale"])["scale"]
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    wide["weight"] = inputs["weight"].dequantize(torch.float64)
    exact = gradients(ia3_linear_reference, wide, grad_y.double(), ["scale"])["scale"]
    assert relative_error(actual, exact) < 2 * torch.finfo(dtype).eps + 1e-5


@SIDES
def test_a_wider_weight_is_not_rounded(device: str, scale_input: bool, seed: int) -> None:
    """To x's dtype, which here has not its range; also where a scale of zero hides the product."""
    x, grad_y = (1e-4 * torch.randn(5, features) for features in (33, 7))
    inputs = ia3_inputs(1e5 * random_weight("float32", (7, 33)), x.half(), scale_input, torch.float16)
    inputs["scale"][1] = 0
    check(device, inputs, grad_y.half())


@SIDES
def test_many_rows(device: str, scale_input: bool, seed: int) -> None:
    """Sums of several parts, twice with the same bits."""
    inputs = ia3_inputs(random_weight("float32", (7, 33)), torch.randn(300, 33), scale_input, torch.float32)
    grad_y = torch.randn(300, 7)
    check(device, inputs, grad_y)
    names = ("x", "scale", "bias")
    assert_same_bits(*(gradients(on(device, ia3_linear), inputs, grad_y, names) for _ in range(2)))


@SIDES
@pytest.mark.parametrize("needs", [("x",), ("scale",), ("bias",), ()])
def test_only_what_is_asked_for_gets_a_gradient(
    device: str, needs: tuple[str, ...], scale_input: bool, seed: int
) -> None:
    inputs = small(scale_input)
    tensors = ("x", "scale", "bias")
    expected = gradients(on(device, ia3_linear), inputs, torch.ones(5, 7), tensors)
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_(name in needs) for name in tensors}}
    y = on(device, ia3_linear)(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name in tensors if leaves[name].grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


@SIDES
def test_compile_without_graph_breaks(device: str, scale_input: bool, seed: int) -> None:
    inputs = small(scale_input, "float32")
    del inputs["scale_input"]
    function = on(device, ia3_linear, scale_input=scale_input)
    compiled, graphs = compile_counting(function)
    for rows in (50, 51):
        inputs["x"], grad_y = torch.randn(rows, 33), torch.randn(rows, 7)
        names = ("x", "scale", "bias")
        assert_same_bits(*(gradients(each, inputs, grad_y, names) for each in (compiled, function)))
    assert graph_count(graphs) == 1


@SIDES
def test_opcheck(device: str, scale_input: bool, seed: int) -> None:
    inputs = small(scale_input)
    weight = native_weight(inputs["weight"].to(device))
    x, scale, bias = (inputs[name].detach().to(device).requires_grad_() for name in ("x", "scale", "bias"))
    torch.library.opcheck(NAMESPACES["triton"].library.ia3_linear, (x, *weight, scale, bias, scale_input))


def test_double_backward(device: str, seed: int) -> None:
    leaf = small()["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="ia3_linear: double backward is not implemented"):
        y = on(device, ia3_linear)(**{**small(), "x": leaf})
        (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        grad.sum().backward()
