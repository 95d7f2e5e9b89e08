"""dora_linear and its norm against float64: every dtype, level, layout and size; both dropouts; torch's tools."""

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
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkern import dora_linear, lora_linear
from peftkern._native import ops
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import dense_weight, native_weight
from peftkern.ops.dora_linear import DROPOUT_MODES, dora_linear_reference, dora_norm, weight_square_norm

OUT, IN = 7, 33
# z and the gradient of what W multiplies are kept in x's dtype.
THROUGH_X = ("magnitude", "norm")


def native(**inputs: Any) -> Tensor:
    """With the norm given, and differentiable in it: then everything is a sum of products."""
    return dora_linear(**inputs, detach_norm=False, backend="cpu")


def reference(**inputs: Any) -> Tensor:
    return dora_linear_reference(**inputs, detach_norm=False)


def exact_norm(inputs: dict[str, Any]) -> Tensor:
    weight = dense_weight(inputs["weight"], torch.float64)
    change = float(inputs["scaling"]) * inputs["lora_b"].double() @ inputs["lora_a"].double()
    return (weight + change).norm(dim=1)


def dora_inputs(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Keyword arguments of dora_linear: norms and magnitudes that differ."""
    inputs = lora_inputs(*arguments, **options)
    out_features = inputs["weight"].shape[0]
    norm = exact_norm(inputs).float() + 0.1
    return {**inputs, "magnitude": norm * (1 + 0.3 * torch.randn(out_features)), "norm": norm}


def check(inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype) if grad_y is None else grad_y
    assert_near_float64(native, reference, inputs, grad_y, frozen=("weight",), through_x=THROUGH_X)


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    return random_nf4(shape) if kind == "nf4" else torch.randn(shape).to(getattr(torch, kind))


def small(kind: str = "nf4", dtype: torch.dtype = torch.float32, rows: int = 5, **options: Any) -> dict[str, Any]:
    return dora_inputs(random_weight(kind, (OUT, IN)), torch.randn(rows, IN).to(dtype), bias_dtype=dtype, **options)


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dropout_mode", DROPOUT_MODES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_gradients(dropout_p: float, dropout_mode: Any, detach_norm: bool, seed: int) -> None:
    """In every floating input; the detached norm is a constant, so it is given."""
    inputs = dora_inputs(torch.randn(3, 9), torch.randn(2, 9), 2, bias_dtype=torch.float32)
    if not detach_norm:
        del inputs["norm"]
    leaves = {name: value.double().requires_grad_(name != "norm") for name, value in float_tensors(inputs).items()}
    mask_seed = draw_seed()
    options = {"dropout_p": dropout_p, "seed": mask_seed, "dropout_mode": dropout_mode, "detach_norm": detach_norm}

    def function(*values: Tensor) -> Tensor:
        return dora_linear_reference(**dict(zip(leaves, values)), **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_is_the_formula(seed: int) -> None:
    inputs = {name: value.double() for name, value in small("float32").items() if name != "norm"}
    direction = inputs["weight"] + inputs["scaling"] * inputs["lora_b"] @ inputs["lora_a"]
    weight = inputs["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(dora_linear_reference(**inputs), inputs["x"] @ weight.t() + inputs["bias"])


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    with only_level(isa):
        for rank, shape in zip((1, 3, 16, 40, 130), SHAPES):
            weight = random_weight(kind, shape)
            for rows, adapter_dtype, bias_dtype in ((1, torch.float32, dtype), (64, dtype, torch.float32)):
                x = torch.randn(rows, shape[1]).to(dtype)
                check(dora_inputs(weight, x, rank, adapter_dtype, bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype, seed: int) -> None:
    weight = random_nf4((70, 96))
    for rows in (1, 2, 3, 4, 5, 6, 7, 16, 24, 25, 300):
        check(dora_inputs(weight, torch.randn(rows, 96).to(dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    for kind in ("nf4", "bfloat16"):
        grad_y, x = (LAYOUTS[layout](randn, features) for features in (OUT, IN))
        check(dora_inputs(random_weight(kind, (OUT, IN)), x), grad_y)


@pytest.mark.parametrize("dropout_mode", DROPOUT_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(isa: str, dtype: torch.dtype, dropout_mode: Any, seed: int) -> None:
    """The reference's mask, forward and in every gradient."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return native(**inputs, dropout_p=0.4, training=True, dropout_mode=dropout_mode)

    torch.manual_seed(seed + 1)
    options = {"dropout_p": 0.4, "seed": draw_seed(), "dropout_mode": dropout_mode}
    for kind, rank, shape in (("nf4", 3, (65, 130)), ("bfloat16", 40, (OUT, IN)), ("nf4", 16, (70, 96))):
        for rows in (1, 4, 20, 270):
            x = torch.randn(rows, shape[1]).to(dtype)
            inputs = dora_inputs(random_weight(kind, shape), x, rank, bias_dtype=dtype)
            grad_y = torch.randn(rows, shape[0]).to(dtype)
            assert_near_float64(
                dropping, reference, inputs, grad_y, {**inputs, **options}, frozen=("weight",), through_x=THROUGH_X
            )


@pytest.mark.parametrize("dropout_mode", DROPOUT_MODES)
def test_no_dropout_outside_training(isa: str, dropout_mode: Any, seed: int) -> None:
    inputs = small()
    state = torch.get_rng_state()
    options = {"dropout_p": 0.5, "dropout_mode": dropout_mode}
    assert torch.equal(dora_linear(**inputs, **options), dora_linear(**inputs))
    assert torch.equal(torch.get_rng_state(), state)


# The norm


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 256), (3, 4096)])
def test_square_norm(shape: tuple[int, int], kind: str, seed: int) -> None:
    """Rows that are no whole blocks, pieces of several rows, nested and flat."""
    weight = random_weight(kind, shape)
    expected = dense_weight(weight, torch.float64).square().sum(1)
    torch.testing.assert_close(weight_square_norm(weight).double(), expected, rtol=1e-6, atol=0)
    flat = random_nf4(shape, 32, nested=False)
    expected = flat.dequantize(torch.float64).square().sum(1)
    torch.testing.assert_close(weight_square_norm(flat).double(), expected, rtol=1e-6, atol=0)


# fp32 sums of products; bf16 products lose about 6e-5 of ||W||^2 where B A is as large as W.
NORM_TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 5e-4}


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    for rank, shape in zip((1, 3, 16, 40, 130, 16), (*SHAPES, (40, 1024))):
        inputs = lora_inputs(random_weight(kind, shape), torch.randn(1, shape[1]), rank)
        arguments = [inputs[name] for name in ("weight", "lora_a", "lora_b", "scaling")]
        norm = dora_norm(*arguments, dtype=dtype, backend="cpu")
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact_norm(inputs), rtol=NORM_TOLERANCES[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.03, 1e-3, 1e-5])
def test_norm_where_the_adapter_cancels_the_weight(isa: str, share: float, dtype: torch.dtype, seed: int) -> None:
    """B A = -(1 - share) W of rank 2: the factored form would lose every digit."""
    lora_b, lora_a = torch.randn(65, 2), torch.randn(2, 130)
    weight = -(lora_b @ lora_a) / (1 - share)
    expected = (weight.double() + lora_b.double() @ lora_a.double()).norm(dim=1)
    norm = dora_norm(weight, lora_a, lora_b, dtype=dtype, backend="cpu").double()
    # The weight itself was rounded to fp32: 2^-24 / share of what is left.
    tolerance = 1e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(norm, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16"])
def test_norm_gradients(isa: str, kind: str, seed: int) -> None:
    for rank, shape in ((3, (65, 130)), (16, (70, 96))):
        inputs = lora_inputs(random_weight(kind, shape), torch.randn(1, shape[1]), rank)
        grad = torch.randn(shape[0])
        results = []
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
            leaves = [inputs[n].detach().to(dtype).requires_grad_() for n in ("lora_a", "lora_b", "scaling")]
            weight = inputs["weight"] if dtype == torch.float32 else dense_weight(inputs["weight"], torch.float64)
            norm = dora_norm(weight, *leaves, dtype=dtype, backend=backend)
            results.append(torch.autograd.grad(norm, leaves, grad.to(dtype)))
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_full_gradient_reaches_the_factors_through_the_norm(isa: str, seed: int) -> None:
    inputs = small("float32")
    del inputs["norm"]
    wide = {name: value.double() for name, value in inputs.items()}
    grad_y = torch.randn(5, OUT)
    names = [name for name in inputs if name != "weight"]
    for detach in (True, False):
        actual = gradients(partial(dora_linear, detach_norm=detach, backend="cpu"), inputs, grad_y, names)
        exact = gradients(partial(dora_linear, detach_norm=detach), wide, grad_y.double(), names)
        for name, value in actual.items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)


# Behaviour


def test_the_identity_at_the_start(isa: str, seed: int) -> None:
    """B = 0 and m = ||W||: the base layer."""
    weight = random_nf4((OUT, IN))
    x, lora_a = torch.randn(5, IN), torch.randn(3, IN)
    magnitude = weight_square_norm(weight).sqrt()
    y = dora_linear(x, weight, lora_a, torch.zeros(OUT, 3), magnitude)
    torch.testing.assert_close(y, lora_linear(x, weight, lora_a, torch.zeros(OUT, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    weight = random_nf4((513, 320))

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed)
        return dora_linear(**inputs, dropout_p=0.1, training=True)

    for rows in (1, 16, 300):
        inputs = dora_inputs(weight, torch.randn(rows, 320).to(dtype), 16)
        del inputs["norm"]
        grad_y = torch.randn(rows, 513).to(dtype)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(gradients(dropping, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


TENSORS = ("x", "lora_a", "lora_b", "magnitude", "scaling", "bias")


@pytest.mark.parametrize("needs", [*[(name,) for name in TENSORS], ("x", "lora_b"), ()])
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    inputs = small()
    expected = gradients(native, inputs, torch.ones(5, OUT), TENSORS)
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_(name in needs) for name in TENSORS}}
    y = native(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name in TENSORS if leaves[name].grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_saved_for_backward(seed: int) -> None:
    """x, h, z and the parameters; nothing of size [out, in]."""
    inputs = small("nf4", torch.bfloat16, rows=64)
    shapes: list[tuple[int, ...]] = []
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items() if name in TENSORS}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        dora_linear(**{**inputs, **leaves})
    assert sorted(shape for shape in shapes if shape and shape[0] == 64) == [(64, 3), (64, OUT), (64, IN)]
    assert (OUT, IN) not in shapes


@pytest.mark.parametrize("kind", ["nf4", "float32"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"dropout_p": 0.5, "dropout_mode": "lora_only"}])
def test_compile_without_graph_breaks(kind: str, options: dict[str, Any], seed: int) -> None:
    inputs = small(kind)
    weight = inputs.pop("weight")
    del inputs["norm"]

    def function(**values: Any) -> Tensor:
        return dora_linear(**values, weight=weight, training=True, **options)

    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, OUT)
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_opcheck(kind: str, seed: int) -> None:
    inputs = small(kind)
    weight = inputs["weight"]
    x, a, b, scale, bias = (
        value.detach().clone().requires_grad_()
        for value in (inputs["x"], inputs["lora_a"], inputs["lora_b"], inputs["magnitude"], inputs["bias"])
    )
    for dropout in ((0.0, None, True, True), (0.5, draw_seed(), True, True), (0.5, draw_seed(), False, True)):
        torch.library.opcheck(ops.dora_linear, (x, *native_weight(weight), a, b, scale, 0.5, bias, *dropout))
    torch.library.opcheck(ops.dora_linear_norm, (*native_weight(weight), a, b, 0.5, torch.ones(OUT), False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_mask(use_reentrant: bool, seed: int) -> None:
    inputs, grad_y = small(), torch.randn(5, OUT)

    def dropping(*values: Any) -> Tensor:
        return native(**dict(zip(inputs, values)), dropout_p=0.5, training=True)

    results = []
    for function in (dropping, partial(checkpoint, dropping, use_reentrant=use_reentrant)):
        torch.manual_seed(seed)
        leaves = {name: value.clone().requires_grad_() for name, value in float_tensors(inputs).items()}
        y = function(*{**inputs, **leaves}.values())
        y.backward(grad_y)
        results.append({"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
    assert_same_bits(*results)


def test_autocast(seed: int) -> None:
    inputs = small()
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, dora_linear(**halved))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"magnitude": None}, TypeError, "magnitude must be a Tensor, got NoneType"),
        ({"magnitude": torch.ones(OUT + 1)}, ValueError, r"magnitude must have shape \[7\], got \[8\]"),
        ({"norm": torch.ones(OUT, 1)}, ValueError, r"norm must have shape \[7\], got \[7, 1\]"),
        ({"magnitude": torch.ones(OUT).int()}, TypeError, "magnitude must be torch.float32, got torch.int32"),
        ({"lora_a": torch.ones(3, IN + 1)}, ValueError, r"lora_a must have shape \[rank, 33\], got \[3, 34\]"),
        ({"dropout_mode": "both"}, ValueError, "dropout_mode must be one of peft, lora_only, got 'both'"),
        ({"weight": torch.ones(OUT, IN, requires_grad=True)}, ValueError, "weight must be frozen"),
        ({"backend": "cuda"}, RuntimeError, "'cuda' (is not part of this build|needs tensors on a CUDA)"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], error: Any, message: str) -> None:
    inputs = {**small(), **change}
    with pytest.raises(error, match=f"dora_linear: .*{message}"):
        dora_linear(**inputs)
