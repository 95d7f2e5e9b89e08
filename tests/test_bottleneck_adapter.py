"""bottleneck_adapter against float64: every activation, dtype, level, layout and size; gradients and torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import (
    DTYPES,
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    only_level,
)
from torch import Tensor

from peftkern import bottleneck_adapter
from peftkern._native import ops
from peftkern.ops.bottleneck_adapter import ACTIVATIONS, bottleneck_adapter_reference

WIDTH, SIZE = 33, 5
# d, m: one, odd, beside a vector's or a tile's width, a bottleneck that is none.
SHAPES = ((1, 1), (33, 3), (130, 65), (513, 16), (72, 130))
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")
TENSORS = ("x", *PARAMETERS, "scaling", "residual")


def adapter_inputs(
    x: Tensor,
    size: int = SIZE,
    parameter_dtype: torch.dtype = torch.float32,
    activation: str = "gelu",
    with_residual: bool = False,
    scaling: float | Tensor = 0.7,
) -> dict[str, Any]:
    """Keyword arguments of bottleneck_adapter whose bottleneck is as large as the residual."""
    width = x.shape[-1]
    return {
        "x": x,
        "down_weight": (torch.randn(size, width) / width**0.5).to(parameter_dtype),
        "down_bias": torch.randn(size).to(parameter_dtype),
        "up_weight": (torch.randn(width, size) / max(size, 1) ** 0.5).to(parameter_dtype),
        "up_bias": torch.randn(width).to(parameter_dtype),
        "activation": activation,
        "scaling": scaling,
        "residual": torch.randn(x.shape).to(x.dtype) if with_residual else None,
    }


def native(**inputs: Any) -> Tensor:
    return bottleneck_adapter(**inputs, backend="cpu")


def check(inputs: dict[str, Any]) -> None:
    grad_y = torch.randn(inputs["x"].shape).to(inputs["x"].dtype)
    assert_near_float64(native, bottleneck_adapter_reference, inputs, grad_y)


def small(dtype: torch.dtype = torch.float32, rows: int = 6, **options: Any) -> dict[str, Any]:
    return adapter_inputs(torch.randn(rows, WIDTH).to(dtype), **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_reference_gradients(activation: str, with_residual: bool, seed: int) -> None:
    """In every floating input."""
    x = torch.randn(2, 3, 7)
    inputs = adapter_inputs(x, 4, activation=activation, with_residual=with_residual, scaling=torch.tensor(0.7))
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}

    def function(*values: Tensor) -> Tensor:
        return bottleneck_adapter_reference(**dict(zip(leaves, values)), activation=activation)

    assert set(leaves) == set(TENSORS) - (set() if with_residual else {"residual"})
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_is_the_formula(seed: int) -> None:
    inputs = small(torch.float64, parameter_dtype=torch.float64, activation="silu")
    x, down, down_bias, up, up_bias = (inputs[name] for name in ("x", *PARAMETERS))
    z = x @ down.t() + down_bias
    delta = (z / (1 + torch.exp(-z))) @ up.t() + up_bias
    torch.testing.assert_close(bottleneck_adapter_reference(**inputs), x + 0.7 * delta)
    residual = torch.randn_like(x)
    torch.testing.assert_close(bottleneck_adapter_reference(**{**inputs, "residual": residual}), residual + 0.7 * delta)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str, seed: int) -> None:
    """Values and slopes element by element: a bottleneck of one, weights that are one."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-6, 1.5, 301), -torch.logspace(-6, 1.5, 301)])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    x = z[:, None].clone().requires_grad_()
    y = native(
        x=x, down_weight=one, down_bias=zero, up_weight=one, up_bias=zero, activation=activation,
        residual=torch.zeros_like(x),
    )  # fmt: skip
    y.sum().backward()
    exact = z.double().requires_grad_()
    expected = bottleneck_adapter_reference(
        exact[:, None], one.double(), zero.double(), one.double(), zero.double(), activation,
        residual=torch.zeros_like(exact)[:, None],
    )  # fmt: skip
    expected.sum().backward()
    # z^2 in exp(-z^2 / 2) has an error of 2^-24 z^2, which the tails keep; torch's float64 has 1 + erf(z) to 1e-16.
    torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=2e-5, atol=1e-15)
    torch.testing.assert_close(x.grad[:, 0].double(), exact.grad, rtol=2e-5, atol=1e-6)
    middle = z.abs() < 4
    torch.testing.assert_close(y.detach().double()[middle], expected.detach()[middle], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_stays(isa: str, activation: str) -> None:
    inputs = {**small(activation=activation), "x": torch.full((1, WIDTH), float("nan"))}
    assert (
        native(
            **inputs,
        )
        .isnan()
        .all()
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, activation: str, seed: int) -> None:
    """More rows than a tile has too; parameters in x's dtype and in fp32; with a residual and without."""
    with only_level(isa):
        for width, size in SHAPES:
            for rows, parameter_dtype in ((1, torch.float32), (5, dtype), (64, torch.float32), (300, dtype)):
                x = torch.randn(rows, width).to(dtype)
                check(adapter_inputs(x, size, parameter_dtype, activation, with_residual=rows in (5, 64)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype, seed: int) -> None:
    for rows in range(1, 20):
        check(adapter_inputs(torch.randn(rows, 96).to(dtype), 16, dtype))


@pytest.mark.parametrize("mixed", PARAMETERS)
def test_parameters_of_two_dtypes(isa: str, mixed: str, seed: int) -> None:
    """Each product takes what its own weight is in."""
    for own, others in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        inputs = small(torch.bfloat16, 70, parameter_dtype=others)
        check({**inputs, mixed: inputs[mixed].to(own)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_in_fp32(isa: str, dtype: torch.dtype, seed: int) -> None:
    check({**small(dtype, parameter_dtype=dtype), "residual": torch.randn(6, WIDTH)})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    for with_residual in (False, True):
        x, grad_y, residual = (LAYOUTS[layout](randn, WIDTH) for _ in range(3))
        inputs = {**adapter_inputs(x, parameter_dtype=dtype), "residual": residual if with_residual else None}
        assert_near_float64(native, bottleneck_adapter_reference, inputs, grad_y)


def test_strided_parameters(isa: str, seed: int) -> None:
    inputs = small()
    inputs["down_weight"] = torch.randn(WIDTH, 2 * SIZE).t()[::2]
    inputs["up_weight"] = torch.randn(SIZE + 3, WIDTH).t()[:, 2 : SIZE + 2]
    inputs["down_bias"], inputs["up_bias"] = torch.randn(2 * SIZE)[::2], torch.randn(1).expand(WIDTH)
    check(inputs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_no_bottleneck_is_a_bias(isa: str, with_residual: bool, seed: int) -> None:
    inputs = small(size=0, with_residual=with_residual)
    base = inputs["residual"] if with_residual else inputs["x"]
    torch.testing.assert_close(native(**inputs), base + 0.7 * inputs["up_bias"])
    check(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_identity_is_the_identity(isa: str, dtype: torch.dtype, seed: int) -> None:
    """With U and its bias at zero, bit for bit; so is any adapter scaled by zero."""
    inputs = small(dtype)
    silent = {**inputs, "up_weight": torch.zeros(WIDTH, SIZE), "up_bias": torch.zeros(WIDTH)}
    assert torch.equal(native(**silent), inputs["x"])
    assert torch.equal(native(**{**inputs, "scaling": 0.0}), inputs["x"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    for rows in (1, 16, 300):
        inputs = adapter_inputs(torch.randn(rows, 520).to(dtype), 64, dtype)
        grad_y = torch.randn(rows, 520).to(dtype)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            results.append(gradients(native, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("needs", [*[(name,) for name in TENSORS], ("x", "up_bias"), ("down_bias", "up_weight"), ()])
def test_only_what_is_asked_for_gets_a_gradient(
    isa: str, needs: tuple[str, ...], with_residual: bool, seed: int
) -> None:
    """And the same as when all is asked for."""
    inputs = small(with_residual=with_residual, scaling=torch.tensor(0.7))
    names = set(float_tensors(inputs)) & set(needs)
    expected = gradients(native, inputs, torch.ones(6, WIDTH))
    leaves = {name: value.clone().requires_grad_(name in names) for name, value in float_tensors(inputs).items()}
    y = native(**{**inputs, **leaves})
    assert y.requires_grad == bool(names)
    if names:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == names
    for name in names:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        assert not native(**{**inputs, **leaves}).requires_grad


def test_what_is_kept_for_backward(seed: int) -> None:
    """x and the small matrix; the parameters are kept by their owner anyway."""
    inputs = small(rows=50)
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        native(**inputs)
    own = {leaf.data_ptr() for leaf in leaves.values()}
    assert [t.shape for t in kept if t.data_ptr() not in own] == [(50, SIZE)]


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(with_residual: bool, seed: int) -> None:
    inputs = adapter_inputs(torch.randn(2, 3, WIDTH), with_residual=with_residual)
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    torch.library.opcheck(ops.bottleneck_adapter, tuple(inputs.values()))
    tensors = [inputs[name].detach() for name in PARAMETERS]
    grad_y, x, z = torch.randn(2, 3, WIDTH), inputs["x"].detach(), torch.randn(6, SIZE)
    for needs in ((True,) * 5, (True, False, True, False, True)):
        arguments = (grad_y, x, z, *tensors, "tanh", 0.7, not with_residual, *needs)
        torch.library.opcheck(ops.bottleneck_adapter_backward, arguments)


def test_compile_without_graph_breaks(seed: int) -> None:
    """With one graph for any number of rows."""
    inputs = small(scaling=torch.tensor(0.7))
    function = partial(bottleneck_adapter, activation=inputs.pop("activation"))
    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
        assert_same_bits(*(gradients(each, inputs, grad_y) for each in (compiled, function)))
    assert graph_count(graphs) == 1


def test_autocast(isa: str, seed: int) -> None:
    """x is cast; parameters, residual and their gradients are not."""
    inputs = small(with_residual=True, scaling=torch.tensor(0.7))
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = native(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, native(**halved))
    y.sum().backward()
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == dict.fromkeys(leaves, torch.float32)
    in_half = {**{name: inputs[name].bfloat16() for name in PARAMETERS}, "residual": inputs["x"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(native(**{**inputs, **in_half}), native(**{**halved, **in_half}))


@pytest.mark.parametrize("name", ["x", "down_weight", "up_bias"])
def test_double_backward(name: str, seed: int) -> None:
    inputs = small(activation="tanh")
    leaf = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="bottleneck_adapter: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()
    y = bottleneck_adapter(**inputs, backend="reference")
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    assert second.shape == leaf.shape and second.any()


def test_scaling_is_read_at_every_call(isa: str, seed: int) -> None:
    inputs = small(scaling=torch.tensor(0.7))
    doubled = native(**{**inputs, "scaling": 1.4})
    y = native(**inputs)
    inputs["scaling"].mul_(2)
    torch.testing.assert_close(native(**inputs), doubled)
    assert not torch.allclose(y, doubled)


def test_other_devices_and_float64_run_on_the_reference(seed: int) -> None:
    inputs = small(torch.float64)
    assert torch.equal(bottleneck_adapter(**inputs), bottleneck_adapter_reference(**inputs))
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    y = bottleneck_adapter(**meta)
    assert y.device.type == "meta" and y.shape == (6, WIDTH)


GOOD = {
    "x": torch.ones(3, WIDTH),
    "down_weight": torch.ones(SIZE, WIDTH),
    "down_bias": torch.ones(SIZE),
    "up_weight": torch.ones(WIDTH, SIZE),
    "up_bias": torch.ones(WIDTH),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", [1.0], TypeError, "x must be a Tensor, got list"),
        ("x", torch.ones(3, WIDTH).int(), TypeError, "x must be .*, got torch.int32"),
        ("x", torch.ones(()), ValueError, r"x must have shape \[..., features\], got \[\]"),
        ("x", torch.ones(3, WIDTH + 1), ValueError, r"down_weight must have shape \[bottleneck, 34\], got \[5, 33\]"),
        ("down_weight", None, TypeError, "down_weight must be a Tensor, got NoneType"),
        ("down_weight", torch.ones(SIZE, WIDTH).half(), TypeError, "down_weight must be torch.float32, got .*16"),
        ("down_weight", torch.ones(WIDTH), ValueError, r"down_weight must have shape \[bottleneck, 33\], got \[33\]"),
        ("down_bias", torch.ones(SIZE, 1), ValueError, r"down_bias must have shape \[5\], got \[5, 1\]"),
        ("up_weight", torch.ones(SIZE, WIDTH), ValueError, r"up_weight must have shape \[33, 5\], got \[5, 33\]"),
        ("up_bias", torch.ones(SIZE), ValueError, r"up_bias must have shape \[33\], got \[5\]"),
        ("up_bias", torch.ones(WIDTH, device="meta"), RuntimeError, "up_bias must be on x's device cpu, got meta"),
        ("activation", F.gelu, TypeError, "activation must be a str, got builtin"),
        ("activation", "gelu_tan", ValueError, "activation must .*, got 'gelu_tan'; did you mean 'gelu_tanh'"),
        ("activation", "maxout", ValueError, "activation must be one of .*tanh, got 'maxout'$"),
        ("scaling", "learned", TypeError, "scaling must be a number or a 0-d tensor, got str"),
        ("scaling", torch.ones(1), ValueError, r"scaling must be a number or a 0-d tensor, got shape \[1\]"),
        ("scaling", torch.tensor(1j), TypeError, "scaling must be real, got torch.complex64"),
        ("scaling", torch.ones((), device="meta"), RuntimeError, "scaling must be on x's device cpu, got meta"),
        ("residual", 1.0, TypeError, "residual must be a Tensor, got float"),
        ("residual", torch.ones(WIDTH), ValueError, r"residual must have x's shape \[3, 33\], got \[33\]"),
        ("residual", torch.ones(3, WIDTH).half(), TypeError, "residual must be torch.float32, got torch.float16"),
        ("backend", "gpu", ValueError, "backend must be one of .*, got 'gpu'"),
    ],
)  # fmt: skip
def test_bad_arguments_raise(name: str, value: Any, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"^bottleneck_adapter: {message}"):
        bottleneck_adapter(**{**GOOD, "backend": backend, name: value})


def test_native_op_checks_its_arguments() -> None:
    good = (*GOOD.values(), "gelu", 1.0, None)
    for position, value, message in (
        (0, torch.ones(3, WIDTH).double(), "x must be fp32, bf16 or fp16, got Double"),
        (1, torch.ones(SIZE, WIDTH + 1), r"down_weight must have shape \[bottleneck, 33\], got \[5, 34\]"),
        (2, torch.ones(SIZE + 1), r"bias must have shape \[5\], got \[6\]"),
        (3, torch.ones(WIDTH, SIZE + 1), r"up_weight must have shape \[33, 5\], got \[33, 6\]"),
        (5, "geru", "activation must be relu, gelu, gelu_tanh, silu or tanh, got geru"),
        (7, torch.ones(2, WIDTH), r"residual must have shape as x, got \[2, 33\]"),
    ):
        with pytest.raises(RuntimeError, match=f"bottleneck_adapter: {message}"):
            ops.bottleneck_adapter(*good[:position], value, *good[position + 1 :])
    x, *parameters = GOOD.values()
    for grad_y, z, message in (
        (torch.ones(2, WIDTH), torch.ones(3, SIZE), r"grad_y must have shape as x, got \[2, 33\]"),
        (x, torch.ones(3, SIZE).half(), "z must be fp32, got Half"),
        (x, torch.ones(2, SIZE), r"z must have shape \[rows, bottleneck\], got \[2, 5\]"),
    ):
        with pytest.raises(RuntimeError, match=f"bottleneck_adapter_backward: {message}"):
            ops.bottleneck_adapter_backward(grad_y, x, z, *parameters, "gelu", 1.0, True, *(True,) * 5)
