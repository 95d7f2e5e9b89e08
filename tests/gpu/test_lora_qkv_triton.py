"""lora_qkv in Triton against float64: dtypes, sizes, ranks, layouts, masks; only what is asked for; torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
)
from projection_cases import Inputs, projections_of, together
from test_lora_qkv import IN, WEIGHTS, call, qkv, reference
from torch import Tensor
from triton_cases import on

from peftkern.ops._linear import formats_of
from peftkern.ops._op import NAMESPACES
from peftkern.ops._projections import draw_seeds, native_projections

# Of a product in two parts of 8 bits, and of dx in 16 bits, which is rounded after each of three GEMMs, some times.
PRODUCT_ERROR = 2**-17 + 5e-6
ROUNDINGS = 3
ops = NAMESPACES["triton"].library


def run(**inputs: Any) -> Tensor:
    return together(call(**inputs))


def check(device: str, inputs: Inputs, grad_y: Tensor | None = None, function: Any = run, **expected: Any) -> None:
    x, width = inputs["x"], sum(p.weight.shape[0] for p in projections_of(inputs))
    grad_y = torch.randn(*x.shape[:-1], width).to(x.dtype) if grad_y is None else grad_y
    error = PRODUCT_ERROR if x.dtype == torch.float32 else ROUNDINGS * torch.finfo(x.dtype).eps / 2
    expected_inputs = {**inputs, **expected}
    options = {"through_x": WEIGHTS, "product_error": error}
    assert_near_float64(on(device, function), reference, inputs, grad_y, expected_inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, seed: int) -> None:
    """Grouped-query sizes, every kind of weight, adapters of either dtype and none, ranks in several tiles."""
    for rows, kinds, outs, columns, ranks, options in (
        (1, ("bfloat16", "float16", "nf4"), (1, 33, 64), 72, (2, None, 5), {"adapter_dtype": dtype}),
        (65, ("nf4", "nf4", "nf4"), (70, 8, 8), 96, (16, 17, 70), {}),
        (20, ("nf4", "float32", "flat nf4"), (65, 130, 7), 130, (3, 1, 40), {"bias_dtype": dtype}),
    ):
        check(device, {"x": torch.randn(rows, columns).to(dtype), **qkv(kinds, outs, columns, ranks, **options)})


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_projections(device: str, count: int, seed: int) -> None:
    check(device, {"x": torch.randn(20, IN), **qkv(("nf4",) * count, tuple(range(3, 3 + count)), IN, (2,) * count)})


def test_no_adapter(device: str, seed: int) -> None:
    check(device, {"x": torch.randn(5, IN), **qkv(ranks=(None,) * 3)})


def test_partial_sums(device: str, seed: int) -> None:
    """Long enough that sums are in parts, twice with the same bits."""
    inputs = {"x": torch.randn(70, 1100), **qkv(("float32",) * 3, (300, 40, 7), 1100)}
    check(device, inputs)
    assert_same_bits(*(gradients(on(device, run), inputs, torch.ones(70, 347)) for _ in range(2)))


@pytest.mark.parametrize("layout", ["many dimensions", "transposed", "one element expanded", "no rows"])
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (13, IN))
    check(device, {"x": x, **qkv(bias_dtype=torch.float32)}, grad_y)


def test_strided_parameters(device: str, seed: int) -> None:
    inputs = qkv()
    inputs["lora_a0"], inputs["lora_b1"] = torch.randn(IN, 3).t(), torch.randn(5, 9)[:, 4:5]
    inputs["lora_a2"], inputs["weight1"] = torch.randn(16, 1).expand(16, IN), torch.randn(IN, 5).t()
    check(device, {"x": torch.randn(20, IN), **inputs})


@pytest.mark.parametrize("ranks", [(3, 1, 16), (3, None, 40), (None, 2, None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device: str, dtype: torch.dtype, ranks: tuple[int | None, ...], seed: int) -> None:
    """A mask for each adapter, that of the reference, also in the one sum of the gradients of x."""

    def dropping(**values: Any) -> Tensor:
        torch.manual_seed(5)
        return run(**values, dropout_p=0.3, training=True)

    inputs = {"x": torch.randn(40, IN).to(dtype), **qkv(ranks=ranks)}
    torch.manual_seed(5)
    seeds = draw_seeds(projections_of(inputs), 0.3, True, device)
    assert seeds is not None
    check(device, inputs, None, dropping, dropout_p=0.3, seeds=seeds.cpu())


@pytest.mark.parametrize("needs", [("x",), ("lora_a1",), ("lora_b2",), ("weight1",), ("bias0",), ("x", "lora_b0"), ()])
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    inputs = {"x": torch.randn(20, IN), **qkv(bias_dtype=torch.float32)}
    expected = gradients(on(device, run), inputs, torch.ones(20, 13))
    leaves = {name: value.clone().requires_grad_(name in needs) for name, value in float_tensors(inputs).items()}
    y = on(device, run)(**{**inputs, **leaves})
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(device: str, dropout_p: float, seed: int) -> None:
    inputs = qkv(ranks=(3, None, 2), bias_dtype=torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    projections = [p._replace(scaling=0.5) for p in projections_of(inputs)]
    lists, seeds = native_projections(projections), draw_seeds(projections, dropout_p, True, device)
    x = torch.randn(2, 3, IN, device=device, requires_grad=True)
    torch.library.opcheck(ops.lora_qkv, (x, *lists, dropout_p, seeds))
    flat = [[v.detach() if isinstance(v, Tensor) else v for v in values] for values in lists]
    w, wf, lora_as, lora_bs, scalings, _ = flat
    grad_ys = [torch.randn(2, 3, out, device=device) for out in (weight.out_features for weight in formats_of(wf))]
    h = torch.randn(6, 5, device=device)
    packed = (w, wf, lora_as, lora_bs, scalings)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        torch.library.opcheck(ops.lora_qkv_backward, (grad_ys, x.detach(), h, *packed, dropout_p, seeds, *needs))


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    inputs = qkv(bias_dtype=torch.float32)
    weights = {name: inputs.pop(name) for name in ("weight0", "weight2")}
    function = on(device, partial(run, dropout_p=0.5, training=True))
    compiled, graphs = compile_counting(lambda **values: function(**values, **weights))
    for rows in (50, 51):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, 13)
        results = []
        for each in (compiled, partial(function, **weights)):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1
