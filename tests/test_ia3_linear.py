"""ia3_linear against float64: every dtype, level, layout and size, both sides; scales of zero; torch's tools."""

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
    float_tensors,
    gradients,
    graph_count,
    linear_inputs,
    only_level,
    random_nf4,
    relative_error,
)
from torch import Tensor

from peftkern import ia3_linear, nf4_linear
from peftkern._native import ops
from peftkern.ops._linear import native_weight
from peftkern.ops.ia3_linear import ia3_linear_reference

OUT, IN = 7, 33
SIDES = pytest.mark.parametrize("scale_input", [False, True], ids=["output", "input"])


def native(**inputs: Any) -> Tensor:
    return ia3_linear(**inputs, backend="cpu")


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    return random_nf4(shape) if kind == "nf4" else torch.randn(shape).to(getattr(torch, kind))


def ia3_inputs(
    weight: Any,
    x: Tensor,
    scale_input: bool,
    bias_dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    scale = (1 + 0.3 * torch.randn(weight.shape[1 if scale_input else 0])).to(scale_dtype)
    return {**linear_inputs(weight, x, bias_dtype), "scale": scale, "scale_input": scale_input}


def check(inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype) if grad_y is None else grad_y
    # The scale's gradient comes from y, or from the gradient of what W multiplies, in x's dtype.
    assert_near_float64(native, ia3_linear_reference, inputs, grad_y, frozen=("weight",), through_x=("scale", "bias"))


def small(scale_input: bool = False, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return ia3_inputs(random_weight(kind, (OUT, IN)), torch.randn(5, IN).to(dtype), scale_input, dtype)


@SIDES
def test_reference_gradients(scale_input: bool, seed: int) -> None:
    inputs = small(scale_input, "float32")
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}

    def function(*values: Tensor) -> Tensor:
        return ia3_linear_reference(**dict(zip(leaves, values)), scale_input=scale_input)

    assert set(leaves) == {"x", "weight", "scale", "bias"}
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_is_the_formula(seed: int) -> None:
    x, weight, bias = torch.randn(5, IN).double(), torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    out, into = torch.randn(OUT).double(), torch.randn(IN).double()
    torch.testing.assert_close(ia3_linear_reference(x, weight, out, bias), out * (x @ weight.t() + bias))
    torch.testing.assert_close(ia3_linear_reference(x, weight, into, bias, True), (x * into) @ weight.t() + bias)


@SIDES
@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, kind: str, scale_input: bool, seed: int) -> None:
    with only_level(isa):
        for shape in SHAPES:
            weight = random_weight(kind, shape)
            for rows, scale_dtype, bias_dtype in ((1, torch.float32, dtype), (64, dtype, torch.float32)):
                check(ia3_inputs(weight, torch.randn(rows, shape[1]).to(dtype), scale_input, bias_dtype, scale_dtype))


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype, scale_input: bool, seed: int) -> None:
    weight = random_nf4((70, 96))
    for rows in (1, 2, 3, 4, 5, 6, 7, 16, 24, 25, 300):
        check(ia3_inputs(weight, torch.randn(rows, 96).to(dtype), scale_input))


@SIDES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, scale_input: bool, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    for kind in ("nf4", "bfloat16"):
        grad_y, x = (LAYOUTS[layout](randn, features) for features in (OUT, IN))
        check(ia3_inputs(random_weight(kind, (OUT, IN)), x, scale_input), grad_y)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_zero(isa: str, dtype: torch.dtype, scale_input: bool, seed: int) -> None:
    """y does not tell what it multiplied, yet its gradient is right."""
    inputs = small(scale_input, dtype=dtype)
    inputs["scale"][1] = 0
    check(inputs)
    inputs["scale"].zero_()
    check({**inputs, "bias": None})


# Of x, y's gradient and the scale, such that no result but y is below what its dtype holds.
@pytest.mark.parametrize(("size", "grad_size", "tiny"), [(1, 1, 2e-8), (1, 1, -6e-5), (1, 1, 0.06), (1e4, 1e-3, 1e-6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiny_scale(isa: str, dtype: torch.dtype, size: float, grad_size: float, tiny: float, seed: int) -> None:
    """Rounded to its dtype y is 0 or coarse, and what it scaled may exceed fp16; yet the scale's gradient is right."""
    for columns in (1, OUT):
        inputs = small(dtype=dtype)
        inputs["x"] = size * inputs["x"]
        inputs["scale"][:columns] = tiny
        check_scale(inputs, (grad_size * torch.randn(5, OUT)).to(dtype))


def test_the_smallest_scale(isa: str, seed: int) -> None:
    inputs = small(dtype=torch.bfloat16)
    for tiny in (1e-30, 1e-38, 1e-44):
        inputs["scale"].fill_(tiny)
        check_scale(inputs, torch.randn(5, OUT).bfloat16())


def check_scale(inputs: dict[str, Any], grad_y: Tensor) -> None:
    names = ["scale"]
    actual = gradients(native, inputs, grad_y, names)["scale"]
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    wide["weight"] = inputs["weight"].dequantize(torch.float64)
    exact = gradients(ia3_linear_reference, wide, grad_y.double(), names)["scale"]
    assert relative_error(actual, exact) < 2 * torch.finfo(grad_y.dtype).eps + 1e-5


def test_ones_change_nothing(isa: str, seed: int) -> None:
    for dtype in DTYPES:
        inputs = small(dtype=dtype)
        ones = {**inputs, "scale": torch.ones(OUT)}
        expected = nf4_linear(inputs["x"], inputs["weight"], inputs["bias"])
        assert torch.equal(native(**ones), expected)
        assert torch.equal(native(**{**ones, "scale": torch.ones(IN), "scale_input": True}), expected)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, scale_input: bool, set_threads: Any, seed: int) -> None:
    weight = random_nf4((513, 320))
    for rows in (1, 16, 300):
        inputs = ia3_inputs(weight, torch.randn(rows, 320).to(dtype), scale_input)
        grad_y = torch.randn(rows, 513).to(dtype)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(gradients(native, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@SIDES
@pytest.mark.parametrize("needs", [("x",), ("scale",), ("bias",), ("x", "scale"), ()])
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], scale_input: bool, seed: int) -> None:
    inputs = small(scale_input)
    tensors = ("x", "scale", "bias")
    expected = gradients(native, inputs, torch.ones(5, OUT), tensors)
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_(name in needs) for name in tensors}}
    y = native(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name in tensors if leaves[name].grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


@SIDES
def test_saved_for_backward(scale_input: bool, seed: int) -> None:
    """x, and y itself: no copy of anything."""
    inputs = small(scale_input)
    saved: list[Tensor] = []
    inputs["x"].requires_grad_(), inputs["scale"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = native(**inputs)
    held = {tensor.untyped_storage().data_ptr() for tensor in saved}
    own = [*inputs["weight"].tensors, inputs["x"], inputs["scale"], inputs["bias"], y]
    assert held <= {tensor.untyped_storage().data_ptr() for tensor in own}


@SIDES
@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_compile_without_graph_breaks(kind: str, scale_input: bool, seed: int) -> None:
    inputs = small(scale_input, kind)
    weight = inputs.pop("weight")
    del inputs["scale_input"]

    def function(**values: Any) -> Tensor:
        return ia3_linear(**values, weight=weight, scale_input=scale_input)

    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, OUT)
        assert_same_bits(*(gradients(each, inputs, grad_y) for each in (compiled, function)))
    assert graph_count(graphs) == 1


@SIDES
@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_opcheck(kind: str, scale_input: bool, seed: int) -> None:
    inputs = small(scale_input, kind)
    weight = inputs["weight"]
    x, scale, bias = (inputs[name].detach().clone().requires_grad_() for name in ("x", "scale", "bias"))
    for own_bias in (bias, None):
        torch.library.opcheck(ops.ia3_linear, (x, *native_weight(weight), scale, own_bias, scale_input))


def test_autocast(seed: int) -> None:
    inputs = small()
    with torch.autocast("cpu", torch.bfloat16):
        y = native(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, native(**halved))


def test_double_backward(seed: int) -> None:
    inputs = small()
    leaf = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="ia3_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": 1.0}, TypeError, "scale must be a Tensor, got float"),
        ({"scale": torch.ones(OUT, 1)}, ValueError, r"scale must have shape \[7\] \(weight's out\), got \[7, 1\]"),
        ({"scale": torch.ones(OUT), "scale_input": True}, ValueError, r"shape \[33\] \(weight's in\), got \[7\]"),
        ({"scale": torch.ones(OUT).half()}, TypeError, "scale must be torch.float32, got torch.float16"),
        ({"scale": torch.ones(OUT, device="meta")}, RuntimeError, "scale must be on x's device cpu, got meta"),
        ({"x": torch.ones(3, IN + 1)}, ValueError, r"x must have shape \[..., 33\] .*, got \[3, 34\]"),
        ({"weight": torch.ones(OUT, IN, requires_grad=True)}, ValueError, "weight must be frozen"),
        ({"backend": "triton"}, RuntimeError, "'triton' needs (tensors on a GPU|triton)"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"ia3_linear: .*{message}"):
        ia3_linear(**{**small(), **change})
