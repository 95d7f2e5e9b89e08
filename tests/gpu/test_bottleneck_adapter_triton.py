"""bottleneck_adapter in Triton against float64: activations, dtypes, sizes, layouts; only what is asked for."""

from typing import Any

import pytest
import torch
from linear_cases import LAYOUTS, assert_near_float64, assert_same_bits, compile_counting, gradients, graph_count
from test_bottleneck_adapter import PARAMETERS, adapter_inputs, small
from triton_cases import on

from peftkern import bottleneck_adapter
from peftkern.ops._op import NAMESPACES
from peftkern.ops.bottleneck_adapter import ACTIVATIONS, bottleneck_adapter_reference


def check(device: str, inputs: dict[str, Any]) -> None:
    grad_y = torch.randn(inputs["x"].shape).to(inputs["x"].dtype)
    run = on(device, bottleneck_adapter)
    assert_near_float64(run, bottleneck_adapter_reference, inputs, grad_y, through_x=())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: str, activation: str, seed: int) -> None:
    """Over all of their range, and beside 0."""
    for size in (5e-3, 3.0):
        x = size * torch.randn(20, 33)
        inputs = adapter_inputs(x, activation=activation)
        inputs["down_bias"] *= size
        check(device, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(device: str, activation: str) -> None:
    z = torch.tensor([-1e10, -1e4, -100.0, -40.0, 40.0, 100.0, 1e4, 1e10]).unsqueeze(1)
    one = torch.ones(1, 1)
    inputs = {"x": z, "down_weight": one, "down_bias": torch.zeros(1), "up_weight": one, "up_bias": torch.zeros(1)}
    inputs |= {"activation": activation, "residual": torch.zeros(8, 1)}
    actual = gradients(on(device, bottleneck_adapter), inputs, torch.ones(8, 1), ("x",))
    expected = gradients(bottleneck_adapter_reference, inputs, torch.ones(8, 1), ("x",))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes(device: str, dtype: torch.dtype, with_residual: bool, seed: int) -> None:
    for features, size, parameter_dtype in ((1, 1, torch.float32), (130, 3, dtype), (3, 70, torch.float32)):
        x = (0.5 + torch.randn(67, features)).to(dtype)
        check(device, adapter_inputs(x, size, parameter_dtype, with_residual=with_residual))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, seed: int) -> None:
    check(device, adapter_inputs(LAYOUTS[layout](torch.randn, 33)))


def test_no_bottleneck(device: str, seed: int) -> None:
    check(device, adapter_inputs(torch.randn(3, 33), 0))


def test_sums_in_several_parts(device: str, seed: int) -> None:
    """Of features, of rows; twice with the same bits."""
    run = on(device, bottleneck_adapter)
    for shape in ((3, 1040), (130, 33)):
        inputs = adapter_inputs(torch.randn(shape), 2)
        check(device, inputs)
        assert_same_bits(*(gradients(run, inputs, torch.ones(shape)) for _ in range(2)))


@pytest.mark.parametrize("needs", [*[(name,) for name in ("x", *PARAMETERS)], ("x", "up_bias"), ()])
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    inputs, run, tensors = small(), on(device, bottleneck_adapter), ("x", *PARAMETERS)
    expected = gradients(run, inputs, torch.ones(6, 33), tensors)
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_(name in needs) for name in tensors}}
    y = run(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name in tensors if leaves[name].grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    inputs = small()
    del inputs["activation"], inputs["scaling"], inputs["residual"]
    function = on(device, bottleneck_adapter, activation="silu", scaling=0.5)
    compiled, graphs = compile_counting(function)
    for rows in (50, 51):
        inputs["x"], grad_y = torch.randn(rows, 33), torch.randn(rows, 33)
        assert_same_bits(*(gradients(each, inputs, grad_y) for each in (compiled, function)))
    assert graph_count(graphs) == 1


def test_opcheck(device: str, seed: int) -> None:
    inputs = small()
    tensors = (inputs[name].detach().to(device).requires_grad_() for name in ("x", *PARAMETERS))
    torch.library.opcheck(NAMESPACES["triton"].library.bottleneck_adapter, (*tensors, "gelu", 0.5, None))
