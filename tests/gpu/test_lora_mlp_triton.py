"""lora_mlp in Triton against float64: activations, dtypes, sizes, ranks, masks, needs; torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, LAYOUTS, assert_same_bits, compile_counting, float_tensors, gradients, graph_count
from projection_cases import Inputs, projections_of
from test_lora_mlp import IN, LIMITS, MIDDLE, NEEDS, OUT, activate, call, exact, mlp
from torch import Tensor
from triton_cases import on

from peftkern._native import ops as native_ops
from peftkern.ops._op import NAMESPACES
from peftkern.ops._projections import draw_seeds, native_projections
from peftkern.ops.lora_mlp import ACTIVATIONS

ops = NAMESPACES["triton"].library


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], inputs: Inputs) -> None:
    for name, value in expected.items():
        like = inputs["x" if name == "y" else name]
        assert actual[name].dtype == like.dtype and actual[name].shape == value.shape, name
        limit = max(LIMITS[inputs["x"].dtype], LIMITS[like.dtype])
        error = (actual[name].double() - value).norm().item()
        assert error <= limit * value.norm().item(), f"{name}: {error / value.norm().item():.2e} > {limit:.2e}"


def check(device: str, inputs: Inputs, grad_y: Tensor | None = None, **options: Any) -> None:
    x, out = inputs["x"], projections_of(inputs)[2].weight.shape[0]
    grad_y = torch.randn(*x.shape[:-1], out).to(x.dtype) if grad_y is None else grad_y
    before = {name: value.clone() for name, value in float_tensors(inputs).items()}
    actual = gradients(on(device, partial(call, **options)), inputs, grad_y)
    assert all(torch.equal(inputs[name], value) for name, value in before.items()), "an input was written over"
    assert_near(actual, exact(inputs, grad_y, **options), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(device: str, dtype: torch.dtype, activation: str, seed: int) -> None:
    inputs = {"x": torch.randn(20, IN).to(dtype), **mlp(bias_dtype=dtype)}
    check(device, inputs, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, seed: int) -> None:
    """Sizes beside a tile's, weights of every kind, adapters of either dtype and none, ranks in several tiles."""
    for rows, kinds, sizes, ranks, options in (
        (1, ("bfloat16", "float16", "nf4"), (5, 7, 1), (2, None, None), {"adapter_dtype": dtype}),
        (65, ("nf4", "nf4", "nf4"), (64, 130, 40), (16, 17, 70), {}),
        (40, ("float32", "nf4", "nf4"), (64, 65, 1), (None, None, 2), {}),
    ):
        check(device, {"x": torch.randn(rows, sizes[0]).to(dtype), **mlp(kinds, sizes, ranks, **options)})


def test_partial_sums(device: str, seed: int) -> None:
    """Long enough that sums are in parts, twice with the same bits."""
    inputs = {"x": torch.randn(70, 600), **mlp(("float32",) * 3, (600, 300, 9))}
    check(device, inputs)
    assert_same_bits(*(gradients(on(device, call), inputs, torch.ones(70, 9)) for _ in range(2)))


@pytest.mark.parametrize("layout", ["many dimensions", "transposed", "one element expanded", "no rows"])
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (OUT, IN))
    check(device, {"x": x, **mlp(("float32",) * 3, bias_dtype=torch.float32)}, grad_y)


def test_strided_parameters(device: str, seed: int) -> None:
    inputs = mlp(("float32",) * 3, bias_dtype=torch.float32)
    for name in ("lora_a0", "lora_b0", "lora_b1", "lora_a2", "lora_b2", "weight1"):
        inputs[name] = inputs[name].t().contiguous().t()
    inputs["bias0"], inputs["bias1"] = torch.randn(MIDDLE, 2)[:, 0], torch.randn(1).expand(MIDDLE)
    check(device, {"x": torch.randn(5, IN), **inputs})


@pytest.mark.parametrize("p", [0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device: str, dtype: torch.dtype, p: float, seed: int) -> None:
    """The masks of the reference: those that lora_linear calls for gate, up and down would have."""

    def dropping(**values: Any) -> Tensor:
        torch.manual_seed(5)
        return call(**values, dropout_p=p, training=True)

    for ranks in ((3, 2, 16), (3, None, 2), (None, 2, None)):
        inputs = {"x": torch.randn(40, IN).to(dtype), **mlp(ranks=ranks)}
        torch.manual_seed(5)
        seeds = draw_seeds(projections_of(inputs), p, True, device)
        grad_y = torch.randn(40, OUT).to(dtype)
        expected = exact(inputs, grad_y, dropout_p=p, seeds=None if seeds is None else seeds.cpu())
        assert_near(gradients(on(device, dropping), inputs, grad_y), expected, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(device: str, activation: str, seed: int) -> None:
    """Values and slopes of the pass alone: the identity around it. Also where exp leaves fp32's range."""
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([0.0, -0.0, -1e30, 1e30, -88.5, 89.5, 1e-30])])
    eye = torch.ones(1, 1)
    inputs = {"x": x[:, None], "weight0": eye, "weight1": torch.zeros(1, 1), "weight2": eye, "bias1": torch.ones(1)}
    run = on(device, partial(call, activation=activation))
    actual = gradients(run, inputs, torch.ones(len(x), 1), ("x",))
    wide = x.double().requires_grad_()
    value = activate(wide, activation)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    for ours, theirs in ((actual["y"], value.detach()), (actual["x"], slope)):
        torch.testing.assert_close(ours[:, 0].double(), theirs, rtol=1e-6, atol=1e-6 if activation == "silu" else 3e-6)
    inputs["x"] = torch.full((3, 1), float("nan"))
    assert run(**inputs).isnan().all()


@pytest.mark.parametrize("needs", NEEDS)
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    inputs = {"x": torch.randn(20, IN), **mlp(("float32",) * 3, bias_dtype=torch.float32)}
    run = on(device, call)
    expected = gradients(run, inputs, torch.ones(20, OUT))
    leaves = {name: value.clone().requires_grad_(name in needs) for name, value in float_tensors(inputs).items()}
    y = run(**{**inputs, **leaves})
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_saved_tensors_are_not_written_over(device: str, seed: int) -> None:
    """Backward twice, of gate and up as they were."""
    inputs = {"x": torch.randn(20, IN), **mlp()}
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    y = on(device, call)(**inputs)
    first, second = (torch.autograd.grad(y.sum(), leaves.values(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


@pytest.mark.parametrize("ranks", [(3, None, 2), (3, 2, None)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(device: str, ranks: tuple[int | None, ...], dropout_p: float, seed: int) -> None:
    inputs = mlp(ranks=ranks, bias_dtype=torch.float32)
    inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    projections = [p._replace(scaling=0.5) for p in projections_of(inputs)]
    lists, seeds = native_projections(projections), draw_seeds(projections, dropout_p, True, device)
    x = torch.randn(2, 3, IN, device=device, requires_grad=True)
    torch.library.opcheck(ops.lora_mlp, (x, *lists, "silu", dropout_p, seeds))
    flat = [[v.detach() if isinstance(v, Tensor) else v for v in values] for values in lists]
    w, wf, lora_as, lora_bs, scalings, _ = flat
    shapes = (2, 3, OUT), (2, 3, IN), (2, 3, MIDDLE), (2, 3, MIDDLE), (6, 5)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    packed = (w, wf, lora_as, lora_bs, scalings, "silu", dropout_p, seeds)
    for needs in ((True, True, True, True), (False, True, False, False), (True, False, True, False)):
        torch.library.opcheck(ops.lora_mlp_backward, (*tensors, *packed, *needs))


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    inputs = mlp(bias_dtype=torch.float32)
    weights = {name: inputs.pop(name) for name in ("weight0", "weight2")}
    function = on(device, partial(call, dropout_p=0.5, training=True))
    compiled, graphs = compile_counting(lambda **values: function(**values, **weights))
    for rows in (50, 51):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, OUT)
        results = []
        for each in (compiled, partial(function, **weights)):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the C++ kernels")
def test_saves_what_the_cpu_saves(device: str, seed: int) -> None:
    inputs = mlp(("float32",) * 3, bias_dtype=torch.float32)
    lists = native_projections([p._replace(scaling=0.5) for p in projections_of(inputs)])
    x = torch.randn(5, IN)
    results = (each.lora_mlp(x.to(device), *lists, "gelu", 0.0, None) for each in (ops, native_ops))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
