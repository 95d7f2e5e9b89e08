"""lora_linear against float64: every dtype, level, layout, rank and size; dropout, gradients and torch's tools."""

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
    lora_inputs,
    only_level,
    random_nf4,
    relative_error,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkern import lora_linear
from peftkern._native import ops
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import native_weight
from peftkern.ops.lora_linear import lora_linear_reference

OUT, IN = 7, 33
RANKS = (1, 3, 16, 40, 130)


def native(**inputs: Any) -> Tensor:
    return lora_linear(**inputs, backend="cpu")


def check(inputs: dict[str, Any]) -> None:
    x, out_features = inputs["x"], inputs["weight"].shape[0]
    grad_y = torch.randn(*x.shape[:-1], out_features).to(x.dtype)
    assert_near_float64(native, lora_linear_reference, inputs, grad_y)


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    return random_nf4(shape) if kind == "nf4" else torch.randn(shape).to(getattr(torch, kind))


def small(kind: str = "nf4", dtype: torch.dtype = torch.float32, rows: int = 5, **options: Any) -> dict[str, Any]:
    return lora_inputs(random_weight(kind, (OUT, IN)), torch.randn(rows, IN).to(dtype), bias_dtype=dtype, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_gradients(dropout_p: float, seed: int) -> None:
    """In every floating input, under one fixed mask."""
    inputs = lora_inputs(torch.randn(OUT, IN), torch.randn(2, 3, IN), bias_dtype=torch.float32)
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}
    mask_seed = draw_seed()

    def function(*values: Tensor) -> Tensor:
        return lora_linear_reference(**dict(zip(leaves, values)), dropout_p=dropout_p, seed=mask_seed)

    assert set(leaves) == {"x", "weight", "lora_a", "lora_b", "scaling", "bias"}
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_is_the_formula(seed: int) -> None:
    """W + scaling B A, and a 4-bit weight is its dense values."""
    inputs = small("float32", torch.float32)
    x, weight, lora_a, lora_b, scaling, bias = (value.double() for value in inputs.values())
    expected = x @ (weight + scaling * lora_b @ lora_a).t() + bias
    torch.testing.assert_close(lora_linear_reference(x, weight, lora_a, lora_b, scaling, bias), expected)
    q = random_nf4((OUT, IN))
    torch.testing.assert_close(
        lora_linear_reference(x, q, lora_a, lora_b),
        lora_linear_reference(x, q.dequantize(torch.float64), lora_a, lora_b),
    )


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    """Dense weights get a gradient too."""
    with only_level(isa):
        for rank, shape in zip(RANKS, SHAPES):
            weight = random_weight(kind, shape)
            for rows, adapter_dtype, bias_dtype in ((1, torch.float32, dtype), (64, dtype, torch.float32)):
                x = torch.randn(rows, shape[1]).to(dtype)
                check(lora_inputs(weight, x, rank, adapter_dtype, bias_dtype))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(isa: str, dtype: torch.dtype, rank: int, seed: int) -> None:
    """Also a number for the scaling, and more rows than a tile has."""
    weight = random_nf4((70, 96))
    with only_level(isa):
        for rows, adapter_dtype in ((4, dtype), (300, torch.float32)):
            x = torch.randn(rows, 96).to(dtype)
            check({**lora_inputs(weight, x, rank, adapter_dtype), "scaling": -0.7})


@pytest.mark.parametrize("kind", ["nf4", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    weight = random_weight(kind, (70, 96))
    with only_level(isa):
        for rows in range(1, 26):
            check(lora_inputs(weight, torch.randn(rows, 96).to(dtype)))


@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_rank_zero_is_the_base(isa: str, kind: str, seed: int) -> None:
    inputs = small(kind)
    empty = {**inputs, "lora_a": torch.ones(0, IN), "lora_b": torch.ones(OUT, 0)}
    assert torch.equal(native(**empty), native(**{**inputs, "scaling": 0.0}))
    assert gradients(native, empty, torch.ones(5, OUT))["lora_b"].shape == (OUT, 0)


def test_accuracy_of_inputs_with_a_mean(isa: str, seed: int) -> None:
    weight = random_nf4((2048, 2048))
    dense = weight.dequantize(torch.float64)
    for rows in (4, 64):
        x = (torch.randn(rows, 2048) + 1).bfloat16()
        inputs = {**lora_inputs(weight, x, 16), "scaling": 2.0}
        exact_weight = dense + 2 * inputs["lora_b"].double() @ inputs["lora_a"].double()
        actual = gradients(native, inputs, x)
        assert relative_error(actual["y"], x.double() @ exact_weight.t()) <= 4e-3
        assert relative_error(actual["x"], x.double() @ exact_weight) <= 4e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    for kind in ("nf4", "bfloat16"):
        grad_y, x = (LAYOUTS[layout](randn, features) for features in (OUT, IN))
        assert_near_float64(native, lora_linear_reference, lora_inputs(random_weight(kind, (OUT, IN)), x), grad_y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_parameters(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Transposed, sliced and expanded weights, adapters and bias."""
    inputs = lora_inputs(torch.randn(IN, OUT).to(dtype).t(), torch.randn(5, IN).to(dtype))
    check({**inputs, "lora_a": torch.randn(IN, 3).t(), "lora_b": torch.randn(OUT, 9)[:, 4:7]})
    check({**inputs, "weight": torch.randn(OUT, IN + 4).to(dtype)[:, 2:-2], "bias": torch.randn(OUT, 2)[:, 0]})
    check({**inputs, "weight": torch.randn(IN).expand(OUT, IN), "lora_a": torch.randn(3, 1).expand(3, IN)})


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(isa: str, dtype: torch.dtype, p: float, seed: int) -> None:
    """The mask of the reference, forward and in every gradient. The seed is the generator's next draw."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return native(**inputs, dropout_p=p, training=True)

    torch.manual_seed(seed + 1)
    mask_seed = draw_seed()
    for kind, rank, shape in (("nf4", 3, (65, 130)), ("bfloat16", 40, (OUT, IN)), ("nf4", 16, (70, 96))):
        for rows in (1, 4, 20, 270):
            x = torch.randn(rows, shape[1]).to(dtype)
            inputs = lora_inputs(random_weight(kind, shape), x, rank, bias_dtype=dtype)
            expected_inputs = {**inputs, "dropout_p": p, "seed": mask_seed}
            grad_y = torch.randn(rows, shape[0]).to(dtype)
            assert_near_float64(dropping, lora_linear_reference, inputs, grad_y, expected_inputs)


def test_dropout_follows_the_generator(isa: str, seed: int) -> None:
    inputs = small()
    drop = partial(native, **inputs, dropout_p=0.5, training=True)
    first, second = drop(), drop()
    torch.manual_seed(seed + 1)
    third = drop()
    torch.manual_seed(seed + 1)
    assert torch.equal(drop(), third)
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"training": True}, {"dropout_p": 0.0, "training": True}])
def test_no_dropout(isa: str, options: dict[str, Any], seed: int) -> None:
    """Nor is a number drawn for it."""
    inputs = small()
    state = torch.get_rng_state()
    assert torch.equal(native(**inputs, **options), native(**inputs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_of_no_rows(isa: str, backend: str, seed: int) -> None:
    inputs = small(rows=0)
    actual = gradients(partial(lora_linear, dropout_p=0.5, training=True, backend=backend), inputs, torch.ones(0, OUT))
    assert actual["y"].shape == (0, OUT) and not actual["lora_a"].any() and not actual["lora_b"].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_everything_dropped(isa: str, backend: str, seed: int) -> None:
    inputs = small()
    grad_y = torch.randn(5, OUT)
    drop_all = partial(lora_linear, dropout_p=1.0, training=True, backend=backend)
    actual = gradients(drop_all, inputs, grad_y)
    base = gradients(partial(lora_linear, backend=backend), {**inputs, "scaling": 0.0}, grad_y)
    for name in ("y", "x", "bias"):
        torch.testing.assert_close(actual[name], base[name], rtol=0, atol=0)
    for name in ("lora_a", "lora_b", "scaling"):
        assert not actual[name].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_mask(isa: str, use_reentrant: bool, seed: int) -> None:
    inputs, grad_y = small(), torch.randn(5, OUT)

    def dropping(*values: Any) -> Tensor:
        return native(**dict(zip(inputs, values)), dropout_p=0.5, training=True)

    results = []
    for function in (dropping, partial(checkpoint, dropping, use_reentrant=use_reentrant)):
        torch.manual_seed(seed)
        leaves = {name: value.clone().requires_grad_() for name, value in float_tensors(inputs).items()}
        y = function(*{**inputs, **leaves}.values())
        draw_seed()  # so that the generator is elsewhere when backward runs
        y.backward(grad_y)  # a reentrant checkpoint has no torch.autograd.grad
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    weight = random_nf4((513, 320))

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed)
        return native(**inputs, dropout_p=0.1, training=True)

    for rows in (1, 4, 16, 300):
        inputs = {**lora_inputs(weight, torch.randn(rows, 320).to(dtype), 16), "scaling": 0.5}
        grad_y = torch.randn(rows, 513).to(dtype)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            results.append(gradients(dropping, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


TENSORS = ("x", "weight", "lora_a", "lora_b", "scaling", "bias")


@pytest.mark.parametrize("needs", [*[(name,) for name in TENSORS], ("x", "lora_b"), ("lora_a", "lora_b"), ()])
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    """And the same as when all is asked for."""
    inputs = small("float32")
    expected = gradients(native, inputs, torch.ones(5, OUT))
    leaves = {name: inputs[name].clone().requires_grad_(name in needs) for name in TENSORS}
    y = native(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        assert not native(**leaves).requires_grad


def test_frozen_base_and_input(isa: str, seed: int) -> None:
    """QLoRA's first layer: nothing but the adapter learns."""
    inputs = small("nf4", torch.bfloat16)
    expected = gradients(native, inputs, torch.ones(5, OUT).bfloat16())
    adapter = {name: inputs[name].clone().requires_grad_() for name in ("lora_a", "lora_b")}
    native(**{**inputs, **adapter}).sum().backward()
    for name, leaf in adapter.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "flat nf4", "float32"])
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(kind: str, with_options: bool, seed: int) -> None:
    """With and without nested scales, bias and seed."""
    if kind == "float32":
        weight = native_weight(torch.randn(OUT, IN, requires_grad=True))
    else:
        weight = native_weight(random_nf4((OUT, IN), 32, kind == "nf4"))
    x, lora_a = torch.randn(2, 3, IN, requires_grad=True), torch.randn(4, IN, requires_grad=True)
    lora_b = torch.randn(OUT, 4, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True) if with_options else None
    dropout = (0.5, draw_seed()) if with_options else (0.0, None)
    torch.library.opcheck(ops.lora_linear, (x, *weight, lora_a, lora_b, 0.5, bias, *dropout))
    h, grad_y = torch.randn(6, 4), torch.randn(2, 3, OUT)
    for needs in ((True, True, True), (False, True, False)):
        arguments = (grad_y, x, h, *weight, lora_a, lora_b, 0.5, *dropout, *needs)
        torch.library.opcheck(ops.lora_linear_backward, tuple(detached(value) for value in arguments))


def detached(value: Any) -> Any:
    if isinstance(value, list):
        return [detached(each) for each in value]
    return value.detach() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("kind", ["nf4", "float32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_without_graph_breaks(kind: str, dropout_p: float, seed: int) -> None:
    """In training, with one graph for any number of rows."""
    inputs = small(kind)
    weight = inputs.pop("weight")

    def function(**values: Any) -> Tensor:
        return lora_linear(**values, weight=weight, dropout_p=dropout_p, training=True)

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
    """x and bias are cast; adapters, scaling and their gradients stay fp32."""
    inputs = small()
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = native(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, native(**halved))
    y.sum().backward()
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == dict.fromkeys(leaves, torch.float32)
    expected = gradients(native, halved, torch.ones(5, OUT).bfloat16())
    for name in ("lora_a", "lora_b", "scaling"):
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_autocast_with_adapters_in_its_dtype(isa: str, seed: int) -> None:
    """They are in x's dtype once x is cast."""
    inputs = small(adapter_dtype=torch.bfloat16)
    expected = native(**{**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(native(**inputs), expected)


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b"])
def test_double_backward(name: str, seed: int) -> None:
    inputs = small()
    leaf = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()
    y = lora_linear(**inputs, backend="reference")
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    assert second.shape == leaf.shape and second.any()


def test_scaling_is_read_at_every_call(isa: str, seed: int) -> None:
    inputs = small()
    doubled = native(**{**inputs, "scaling": 1.4})
    y = native(**inputs)
    inputs["scaling"].mul_(2)
    torch.testing.assert_close(native(**inputs), doubled)
    assert not torch.allclose(y, doubled)
    for scaling in (torch.tensor(2), torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0).bfloat16(), 2):
        torch.testing.assert_close(native(**{**inputs, "scaling": scaling}), native(**{**inputs, "scaling": 2.0}))
