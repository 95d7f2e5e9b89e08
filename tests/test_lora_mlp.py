"""lora_mlp against float64 and against separate ops: activations, dtypes, levels, masks, gradients, torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import (
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    only_level,
    random_nf4,
    relative_error,
)
from projection_cases import Inputs, projection_inputs, projections_of, random_weight
from torch import Tensor

from peftkern import NF4Weight, lora_linear, lora_mlp
from peftkern._native import ops
from peftkern.ops._projections import draw_seeds, native_projections
from peftkern.ops.lora_mlp import ACTIVATIONS, lora_mlp_reference

IN, MIDDLE, OUT = 33, 70, 9
# The weights are small enough for gates around 1, where the activations bend.
SCALE = 0.3


def call(x: Tensor, activation: str = "silu", backend: str | None = "cpu", **inputs: Any) -> Tensor:
    dropout = {name: inputs.pop(name) for name in ("dropout_p", "training") if name in inputs}
    projections = projections_of(inputs)
    adapters = [None if p.lora_a is None else (p.lora_a, p.lora_b, p.scaling) for p in projections]
    biases = [p.bias for p in projections]
    gate, up, down = (p.weight for p in projections)
    return lora_mlp(x, gate, up, down, adapters, activation, **dropout, biases=biases, backend=backend)


def activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def separate(x: Tensor, activation: str = "silu", **inputs: Any) -> Tensor:
    """lora_linear calls and torch's activation, all projections with an adapter."""
    dropout = {name: inputs.pop(name) for name in ("dropout_p", "training") if name in inputs}
    gate, up, down = (
        partial(lora_linear, weight=w, lora_a=a, lora_b=b, scaling=s, bias=bias, **dropout)
        for w, a, b, s, bias in projections_of(inputs)
    )
    first = gate(x)
    return down(activate(first, activation) * up(x))


def mlp(
    kinds: tuple[str, ...] = ("nf4", "float32", "flat nf4"),
    sizes: tuple[int, int, int] = (IN, MIDDLE, OUT),
    ranks: tuple[int | None, ...] = (3, 1, 16),
    **options: Any,
) -> Inputs:
    columns, middle, out = sizes
    inputs: Inputs = {}
    for i, shape in enumerate(((middle, columns), (middle, columns), (out, middle))):
        inputs |= projection_inputs(i, small(kinds[i], shape), ranks[i], **options) | {f"scaling{i}": 0.5 + i}
    return inputs


def small(kind: str, shape: tuple[int, int]) -> Any:
    weight = random_weight(kind, shape)
    return weight if isinstance(weight, NF4Weight) else weight * SCALE


def exact(inputs: Inputs, grad_y: Tensor, **options: Any) -> dict[str, Tensor]:
    """y and every gradient in float64."""
    wide = {n: v.dequantize(torch.float64) if isinstance(v, NF4Weight) else v for n, v in inputs.items()}
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in wide.items()}

    def function(x: Tensor, **values: Any) -> Tensor:
        return lora_mlp_reference(x, projections_of(values), **options)

    return gradients(function, wide, grad_y.double(), float_tensors(inputs))


# Between the products gate, up, their product and its gradients are rounded to x's dtype: some roundings meet in each
# result, and bf16 products round a weight of 4 bits. fp32 results have the sums' errors and gelu's, 2e-7.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def check(inputs: Inputs, grad_y: Tensor, options: Inputs, expected_options: Inputs) -> None:
    before = {name: value.clone() for name, value in float_tensors(inputs).items()}
    actual = gradients(partial(call, **options), inputs, grad_y)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written over"
    for name, value in exact(inputs, grad_y, **expected_options).items():
        like = inputs["x" if name == "y" else name]
        assert actual[name].dtype == like.dtype and actual[name].shape == value.shape, name
        if value.norm():
            # torch's matmul gives a dense weight's gradient, in the weight's dtype
            limit = max(LIMITS[inputs["x"].dtype], LIMITS[actual[name].dtype])
            assert relative_error(actual[name], value) <= limit, name
        else:
            assert not actual[name].any(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_shapes(isa: str, rows: int, dtype: torch.dtype, activation: str, seed: int) -> None:
    with only_level(isa):
        for kinds, sizes, ranks, options in (
            (("nf4", "nf4", "nf4"), (96, 160, 96), (16, 16, 16), {}),
            (("nf4", "float32", "flat nf4"), (IN, MIDDLE, OUT), (3, 1, 16), {"bias_dtype": dtype}),
            (("bfloat16", "float16", "nf4"), (5, 7, 64), (2, None, None), {"adapter_dtype": dtype}),
            (("float32", "nf4", "nf4"), (64, 65, 1), (None, None, 2), {}),
        ):
            inputs = {"x": torch.randn(rows, sizes[0]).to(dtype), **mlp(kinds, sizes, ranks, **options)}
            grad_y, act = torch.randn(rows, sizes[2]).to(dtype), {"activation": activation}
            check(inputs, grad_y, act, act)


@pytest.mark.parametrize("p", [0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(isa: str, dtype: torch.dtype, p: float, seed: int) -> None:
    """The masks that lora_linear calls for gate, up and down would have."""
    for ranks in ((3, 2, 16), (3, None, 2)):
        inputs = mlp(ranks=ranks)
        torch.manual_seed(5)
        seeds = draw_seeds(projections_of(inputs), p, True)

        def dropping(**values: Any) -> Tensor:
            torch.manual_seed(5)
            return call(**values, dropout_p=p, training=True)

        for rows in (3, 50):
            given = {"x": torch.randn(rows, IN).to(dtype), **inputs}
            grad_y = torch.randn(rows, OUT).to(dtype)
            actual = gradients(dropping, given, grad_y)
            for name, value in exact(given, grad_y, dropout_p=p, seeds=seeds).items():
                if value.norm():
                    assert relative_error(actual[name], value) <= LIMITS[dtype], name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_everywhere(isa: str, activation: str, seed: int) -> None:
    """Values and slopes of the pass alone: the identity around it. Also where exp leaves fp32's range."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, -1e30, 1e30, -88.5, 89.5, 1e-30])])
    eye = torch.ones(1, 1)
    inputs = {"x": x[:, None], "weight0": eye, "weight1": torch.zeros(1, 1), "weight2": eye, "bias1": torch.ones(1)}
    actual = gradients(partial(call, activation=activation), inputs, torch.ones(len(x), 1), ("x",))
    wide = x.double().requires_grad_()
    value = activate(wide, activation)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    for ours, theirs in ((actual["y"], value.detach()), (actual["x"], slope)):
        torch.testing.assert_close(ours[:, 0].double(), theirs, rtol=5e-7, atol=1e-6 if activation == "silu" else 3e-6)
    inputs["x"] = torch.full((3, 1), float("nan"))
    assert call(**inputs, activation=activation).isnan().all()


def test_gradcheck_of_the_reference(seed: int) -> None:
    inputs = {"x": torch.randn(2, 2, 5), **mlp(("float32",) * 3, (5, 7, 3), (2, 1, 2), bias_dtype=torch.float32)}
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}
    for activation in ACTIVATIONS:

        def function(*values: Tensor, activation: str = activation) -> Tensor:
            return call(**dict(zip(leaves, values)), activation=activation, backend="reference")

        assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (OUT, IN))
    check({"x": x, **mlp(bias_dtype=torch.float32)}, grad_y, {}, {})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_the_separate_ops(isa: str, dtype: torch.dtype, dropout_p: float, activation: str, seed: int) -> None:
    """From the same generator state."""
    inputs = {"x": torch.randn(40, IN).to(dtype), **mlp(bias_dtype=dtype)}
    results = []
    for function in (call, separate):
        torch.manual_seed(seed)
        function = partial(function, activation=activation, dropout_p=dropout_p, training=True)
        results.append(gradients(function, inputs, torch.ones(40, OUT).to(dtype)))
    for name, value in results[1].items():
        assert relative_error(results[0][name], value.double()) <= 2 * LIMITS[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    inputs = mlp(("nf4",) * 3, (96, 1600, 130))
    for rows in (1, 40, 300):
        inputs["x"], grad_y = torch.randn(rows, 96).to(dtype), torch.randn(rows, 130).to(dtype)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(gradients(call, inputs, grad_y))
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


NEEDS = [("x",), ("lora_a0",), ("lora_b1",), ("lora_a2",), ("lora_b2",), ("weight0",), ("weight2",), ("bias1",), ()]


@pytest.mark.parametrize("needs", NEEDS)
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    inputs = {"x": torch.randn(40, IN), **mlp(("float32",) * 3, bias_dtype=torch.float32)}
    expected = gradients(call, inputs, torch.ones(40, OUT))
    leaves = {name: value.clone().requires_grad_(name in needs) for name, value in float_tensors(inputs).items()}
    y = call(**{**inputs, **leaves})
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def saved_bytes(function: Any, inputs: Inputs) -> int:
    """Of distinct tensors that backward keeps, without the parameters."""
    own = {value.data_ptr() for name, value in float_tensors(inputs).items() if name != "x"}
    own |= {part.data_ptr() for p in projections_of(inputs) for part in p.weight.tensors if part is not None}
    leaves = {name: value.detach().requires_grad_() for name, value in float_tensors(inputs).items()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(**{**inputs, **leaves})
    assert y.requires_grad
    return sum(sizes.values())


def test_saves_neither_the_activation_nor_the_product(seed: int) -> None:
    inputs = {"x": torch.randn(50, 64).bfloat16(), **mlp(("nf4",) * 3, (64, 320, 64), (16, 16, 16))}
    own = 50 * 64 * 2 + 50 * 48 * 4
    assert saved_bytes(call, inputs) == own + 2 * 50 * 320 * 2
    assert saved_bytes(separate, inputs) == own + 4 * 50 * 320 * 2


@pytest.mark.parametrize("kinds", [("nf4",) * 3, ("float32",) * 3])
@pytest.mark.parametrize("ranks", [(3, None, 2), (3, 2, None)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(kinds: tuple[str, ...], ranks: tuple[int | None, ...], dropout_p: float, seed: int) -> None:
    inputs = mlp(kinds, ranks=ranks, bias_dtype=torch.float32)
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    projections = [p._replace(scaling=0.5) for p in projections_of(inputs)]
    lists, seeds = native_projections(projections), draw_seeds(projections, dropout_p, True)
    x = torch.randn(2, 3, IN, requires_grad=True)
    torch.library.opcheck(ops.lora_mlp, (x, *lists, "silu", dropout_p, seeds))
    flat = [[v.detach() if isinstance(v, Tensor) else v for v in values] for values in lists]
    w, wf, lora_as, lora_bs, scalings, _ = flat
    gate, up, h = torch.randn(2, 3, MIDDLE), torch.randn(2, 3, MIDDLE), torch.randn(6, 5)
    for needs in ((True, True, True, True), (False, True, False, False), (True, False, True, False)):
        packed = (w, wf, lora_as, lora_bs, scalings)
        arguments = (torch.randn(2, 3, OUT), x.detach(), gate, up, h, *packed, "silu", dropout_p, seeds, *needs)
        torch.library.opcheck(ops.lora_mlp_backward, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_without_graph_breaks(dropout_p: float, seed: int) -> None:
    inputs = mlp(bias_dtype=torch.float32)
    weights = {name: inputs.pop(name) for name in ("weight0", "weight2")}

    def function(**values: Any) -> Tensor:
        return call(**values, **weights, dropout_p=dropout_p, training=True)

    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, OUT)
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


def test_autocast(isa: str, seed: int) -> None:
    inputs = {"x": torch.randn(5, IN), **mlp(bias_dtype=torch.float32)}
    halved = {name: v.bfloat16() if name == "x" or name.startswith("bias") else v for name, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = call(**inputs)
    assert y.dtype == torch.bfloat16 and torch.equal(y, call(**halved))


def test_double_backward(seed: int) -> None:
    inputs = {"x": torch.randn(5, IN, requires_grad=True), **mlp()}
    with pytest.raises(RuntimeError, match="lora_mlp: double backward is not implemented"):
        (grad,) = torch.autograd.grad(call(**inputs).square().sum(), inputs["x"], create_graph=True)
        grad.sum().backward()


def test_adapters_by_name(seed: int) -> None:
    x, gate, up, down = torch.randn(3, IN), torch.randn(7, IN), torch.randn(7, IN), torch.randn(5, 7)
    adapter = torch.randn(2, 7), torch.randn(5, 2), 0.5
    expected = lora_mlp(x, gate, up, down, (None, None, adapter))
    assert torch.equal(lora_mlp(x, gate, up, down, {"down": adapter, "up": None}), expected)
    torch.testing.assert_close(
        expected, lora_linear(F.silu(x @ gate.t()) * (x @ up.t()), down, *adapter), rtol=1e-4, atol=1e-4
    )


GOOD: Inputs = {
    "x": torch.ones(3, IN),
    "gate": random_nf4((7, IN)),
    "up": torch.ones(7, IN),
    "down": torch.ones(5, 7),
    "adapters": [None, (torch.ones(2, IN), torch.ones(7, 2), 1.0), None],
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, " gate: x must be a Tensor, got list"),
        ({"x": torch.ones(3, 4)}, ValueError, r" gate: x must have shape \[..., 33\] .*, got \[3, 4\]"),
        ({"up": torch.ones(8, IN)}, ValueError, r" up: lora_b must have shape \[8, 2\] .*, got \[7, 2\]"),
        (
            {"up": torch.ones(8, IN), "adapters": {}},
            ValueError,
            r": up must have shape \[7, in\] as gate, got \[8, 33\]",
        ),
        ({"down": torch.ones(5, 8)}, ValueError, r" down: x must have shape \[..., 8\] .*, got \[1, 7\]"),
        ({"adapters": [None]}, ValueError, ": adapters must have 3 entries, for gate, up and down, got 1"),
        ({"adapters": {"q": None}}, ValueError, r": adapters must be of gate, up, down, got \['q'\]"),
        ({"adapters": [(1, 2), None, None]}, ValueError, r": gate's adapter must be \(A, B, scaling\), got 2 values"),
        ({"adapters": [(1, 2, 3), None, None]}, TypeError, " gate: lora_a must be a Tensor, got int"),
        ({"biases": [None]}, ValueError, ": biases must have 3 entries, for gate, up and down, got 1"),
        ({"biases": [None, None, torch.ones(4)]}, ValueError, r" down: bias must have shape \[5\] .*, got \[4\]"),
        ({"activation": "relu"}, ValueError, ": activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"dropout_p": -1}, ValueError, " up: dropout_p must be from 0 to 1, got -1"),
    ],
)
def test_bad_arguments_raise(change: Inputs, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"lora_mlp{message}"):
        lora_mlp(**{**GOOD, **change}, backend=backend)
