"""dora_linear in Triton and its norm against float64: dtypes, ranks, both dropouts; where the adapter cancels W."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import LAYOUTS, assert_near_float64, assert_same_bits, compile_counting, gradients, graph_count
from test_dora_linear import THROUGH_X, dora_inputs, exact_norm, random_weight, reference, small
from torch import Tensor
from triton_cases import on

from peftkern import dora_linear
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import dense_weight, native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.dora_linear import DROPOUT_MODES, dora_norm, weight_square_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the product with the base gives is rounded to x's dtype before the pass that follows it.
ROUNDED = (*THROUGH_X, "x", "y")


def check(device: str, inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype) if grad_y is None else grad_y
    run = on(device, dora_linear, detach_norm=False)
    assert_near_float64(run, reference, inputs, grad_y, None, ("weight",), ROUNDED)


@pytest.mark.parametrize(
    ("kind", "rank", "shape"), [("nf4", 3, (70, 33)), ("float32", 1, (1, 1)), ("nf4", 70, (9, 64))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, kind: str, rank: int, shape: tuple[int, int], seed: int) -> None:
    x = 0.5 + torch.randn(67, shape[1])
    check(device, dora_inputs(random_weight(kind, shape), x.to(dtype), rank, bias_dtype=dtype))


def test_a_wider_weight_is_not_rounded(device: str, seed: int) -> None:
    """To x's dtype, which here has not its range."""
    x, grad_y = (1e-4 * torch.randn(5, features) for features in (33, 7))
    inputs = dora_inputs(1e5 * random_weight("float32", (7, 33)), x.half(), bias_dtype=torch.float16)
    check(device, inputs, grad_y.half())


def test_sums_in_several_parts(device: str, seed: int) -> None:
    """Of features, of rows; twice with the same bits."""
    run, names = on(device, dora_linear), ("x", "lora_a", "lora_b", "magnitude")
    for rows, features in ((3, 1040), (130, 33)):
        inputs = dora_inputs(random_weight("float32", (7, features)), torch.randn(rows, features), 2)
        check(device, inputs)
        assert_same_bits(*(gradients(run, inputs, torch.ones(rows, 7), names) for _ in range(2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (7, 33))
    check(device, dora_inputs(random_weight("float32", (7, 33)), x), grad_y)


@pytest.mark.parametrize("dropout_mode", DROPOUT_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device: str, dtype: torch.dtype, dropout_mode: Any, seed: int) -> None:
    """The reference's mask, forward and in every gradient."""
    options = {"dropout_p": 0.4, "dropout_mode": dropout_mode}
    inputs = dora_inputs(random_weight("nf4", (9, 130)), torch.randn(67, 130).to(dtype), 3, bias_dtype=dtype)
    run = on(device, dora_linear, detach_norm=False, training=True, **options)

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return run(**inputs)

    torch.manual_seed(seed + 1)
    expected = {**inputs, **options, "seed": draw_seed()}
    grad_y = torch.randn(67, 9).to(dtype)
    assert_near_float64(dropping, reference, inputs, grad_y, expected, ("weight",), ROUNDED)


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_mask_is_the_one_of_the_cpu(device: str, p: float, seed: int) -> None:
    """Bit for bit: A is the identity, so that h is what is kept of x."""
    inputs = {"x": torch.ones(70, 40), "weight": torch.zeros(40, 40), "lora_a": torch.eye(40), "lora_b": torch.eye(40)}
    inputs |= {"magnitude": torch.ones(40), "norm": torch.ones(40)}
    results = []
    for run in (on(device, dora_linear), partial(dora_linear, backend="cpu")):
        torch.manual_seed(seed)
        results.append(run(**inputs, dropout_p=p, training=True) != 0)
    assert torch.equal(*results)
    assert results[0].any() == (p < 1)


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16"])
def test_square_norm(device: str, kind: str, seed: int) -> None:
    for shape in ((7, 33), (66, 128)):
        weight: Any = random_weight(kind, shape)
        expected = dense_weight(weight, torch.float64).square().sum(1)
        actual = weight_square_norm(weight.to(device), backend="triton").cpu()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradients(device: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    for rank, shape in ((3, (7, 33)), (70, (66, 128))):
        inputs = dora_inputs(random_weight(kind, shape), torch.randn(1, shape[1]), rank)
        names = ("lora_a", "lora_b", "scaling")
        run = on(device, dora_norm, dtype=dtype)
        arguments = {name: inputs[name] for name in ("weight", *names)}
        actual = gradients(run, arguments, torch.ones(shape[0]), names)
        wide = {"weight": dense_weight(inputs["weight"], torch.float64), **{n: inputs[n].double() for n in names}}
        run = partial(dora_norm, dtype=torch.float64, backend="reference")
        exact = gradients(run, wide, torch.ones(shape[0]).double(), names)
        torch.testing.assert_close(actual["y"].double(), exact_norm(inputs), rtol=1e-5, atol=0)
        for name in names:
            torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.03, 1e-3])
def test_norm_where_the_adapter_cancels_the_weight(device: str, share: float, dtype: torch.dtype, seed: int) -> None:
    """B A = -(1 - share) W of rank 2: the factored form would lose every digit."""
    lora_b, lora_a = torch.randn(65, 2), torch.randn(2, 130)
    weight = -(lora_b @ lora_a) / (1 - share)
    expected = (weight.double() + lora_b.double() @ lora_a.double()).norm(dim=1)
    norm = on(device, dora_norm, dtype=dtype)(weight=weight, lora_a=lora_a, lora_b=lora_b).double()
    torch.testing.assert_close(norm, expected, rtol=1e-5 / share**0.5, atol=0)


def test_norm_of_the_layer_itself(device: str, seed: int) -> None:
    """Computed by the same kernels when it is not given, and differentiated if asked to."""
    inputs = small("float32")
    del inputs["norm"]
    wide = {name: value.double() for name, value in inputs.items()}
    names = [name for name in inputs if name != "weight"]
    for detach in (True, False):
        actual = gradients(on(device, dora_linear, detach_norm=detach), inputs, torch.ones(5, 7), names)
        exact = gradients(partial(dora_linear, detach_norm=detach), wide, torch.ones(5, 7).double(), names)
        for name, value in actual.items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)


TENSORS = ("x", "lora_a", "lora_b", "magnitude", "bias")


@pytest.mark.parametrize("needs", [*[(name,) for name in TENSORS], ("x", "lora_b"), ()])
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    inputs, run = small(), on(device, dora_linear)
    expected = gradients(run, inputs, torch.ones(5, 7), TENSORS)
    leaves = {**inputs, **{name: inputs[name].clone().requires_grad_(name in needs) for name in TENSORS}}
    y = run(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name in TENSORS if leaves[name].grad is not None} == set(needs)
    for name in needs:
        # dg alone is summed by another pass.
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-6, atol=1e-6)


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    inputs = small("float32")
    del inputs["norm"]
    function = on(device, dora_linear, training=True, dropout_p=0.5)
    compiled, graphs = compile_counting(function)
    for rows in (50, 51):
        inputs["x"], grad_y = torch.randn(rows, 33), torch.randn(rows, 7)
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y, TENSORS))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


def test_opcheck(device: str, seed: int) -> None:
    inputs = small()
    weight = native_weight(inputs["weight"].to(device))
    names = ("x", "lora_a", "lora_b", "magnitude", "bias")
    x, a, b, scale, bias = (inputs[name].detach().to(device).requires_grad_() for name in names)
    ops = NAMESPACES["triton"].library
    for dropout in ((0.0, None, True, True), (0.5, draw_seed(), True, True)):
        torch.library.opcheck(ops.dora_linear, (x, *weight, a, b, scale, 0.5, bias, *dropout))
    torch.library.opcheck(ops.dora_linear_norm, (*weight, a, b, 0.5, torch.ones(7, device=device), False))
