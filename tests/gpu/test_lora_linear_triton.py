"""lora_linear in Triton against float64: dtypes, sizes, ranks, layouts; the CPU's dropout mask; torch's tools."""

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
    lora_inputs,
    random_nf4,
)
from torch import Tensor

from peftkern import NF4Weight, lora_linear
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.lora_linear import lora_linear_reference

OUT, IN = 7, 33
# Of a product in two parts of 8 bits, and FP32_SUM.
PRODUCT_ERROR = 2**-17 + 5e-6
ops = NAMESPACES["triton"].library


def on_device(device: str, **options: Any) -> Any:
    """lora_linear on the device for inputs, results and gradients on the CPU."""

    def run(**inputs: Any) -> Tensor:
        moved = {k: v.to(device) if isinstance(v, Tensor | NF4Weight) else v for k, v in inputs.items()}
        return lora_linear(**moved, **options, backend="triton").cpu()

    return run


def check(device: str, inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x, out_features = inputs["x"], inputs["weight"].shape[0]
    grad_y = torch.randn(*x.shape[:-1], out_features).to(x.dtype) if grad_y is None else grad_y
    function = on_device(device)
    assert_near_float64(function, lora_linear_reference, inputs, grad_y, product_error=PRODUCT_ERROR)


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    return random_nf4(shape) if kind == "nf4" else torch.randn(shape).to(getattr(torch, kind))


def small(kind: str = "nf4", dtype: torch.dtype = torch.float32, rows: int = 5, **options: Any) -> dict[str, Any]:
    return lora_inputs(random_weight(kind, (OUT, IN)), torch.randn(rows, IN).to(dtype), bias_dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, seed: int) -> None:
    """Sizes beside a tile's and below any; adapters in either dtype."""
    for rank, rows, shape in ((1, 1, (1, 1)), (16, 70, (130, 65)), (40, 33, (33, 320))):
        check(device, lora_inputs(random_nf4(shape), torch.randn(rows, shape[1]).to(dtype), rank, torch.float32, dtype))
    check(device, small("nf4", dtype, adapter_dtype=dtype))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights(device: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    """They get a gradient too."""
    check(device, small(kind, dtype))


@pytest.mark.parametrize("rank", [17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranks(device: str, dtype: torch.dtype, rank: int, seed: int) -> None:
    """Several tiles of ranks, the last in part; also a number for the scaling."""
    check(device, {**lora_inputs(random_nf4((40, 64)), torch.randn(20, 64).to(dtype), rank), "scaling": -0.7})


def test_partial_sums(device: str, seed: int) -> None:
    """Long enough that every sum is in parts: over the features of x, the features of y and the rows."""
    check(device, lora_inputs(torch.randn(80, 1100), torch.randn(70, 1100)))


def test_rank_zero_is_the_base(device: str, seed: int) -> None:
    inputs = small()
    empty = {**inputs, "lora_a": torch.ones(0, IN), "lora_b": torch.ones(OUT, 0)}
    assert torch.equal(on_device(device)(**empty), on_device(device)(**{**inputs, "scaling": 0.0}))
    assert gradients(on_device(device), empty, torch.ones(5, OUT))["lora_b"].shape == (OUT, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[layout](torch.randn, features) for features in (OUT, IN))
    check(device, lora_inputs(random_nf4((OUT, IN)), x), grad_y)


def test_strided_parameters(device: str, seed: int) -> None:
    """Transposed, sliced and expanded weights, adapters and bias."""
    inputs = lora_inputs(torch.randn(IN, OUT).t(), torch.randn(5, IN))
    check(device, {**inputs, "lora_a": torch.randn(IN, 3).t(), "lora_b": torch.randn(OUT, 9)[:, 4:7]})
    check(device, {**inputs, "weight": torch.randn(OUT, IN + 4)[:, 2:-2], "bias": torch.randn(OUT, 2)[:, 0]})
    check(device, {**inputs, "weight": torch.randn(IN).expand(OUT, IN), "lora_a": torch.randn(3, 1).expand(3, IN)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device: str, dtype: torch.dtype, seed: int) -> None:
    """The mask of the reference, forward and in every gradient. The seed is the generator's next draw."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return on_device(device, dropout_p=0.3, training=True)(**inputs)

    torch.manual_seed(seed + 1)
    mask_seed = draw_seed(device).cpu()
    for kind, rank, rows, shape in (("nf4", 3, 70, (65, 130)), ("bfloat16", 40, 20, (OUT, IN))):
        inputs = lora_inputs(random_weight(kind, shape), torch.randn(rows, shape[1]).to(dtype), rank, bias_dtype=dtype)
        expected = {**inputs, "dropout_p": 0.3, "seed": mask_seed}
        grad_y = torch.randn(rows, shape[0]).to(dtype)
        assert_near_float64(dropping, lora_linear_reference, inputs, grad_y, expected, product_error=PRODUCT_ERROR)


@pytest.mark.parametrize(("p", "value"), [(0.5, 0), (0.1, -1), (2**-16, 2**63 - 1), (1.0, -(2**63))])
def test_the_mask_of_the_cpu(device: str, p: float, value: int) -> None:
    """In each of its three places, alone: x, A and B of ones and zeros."""
    rows, columns, mask_seed, eye = 70, 65, torch.tensor(value, device=device), torch.eye(65, device=device)
    expected = keep_mask(mask_seed, rows, columns, p).float() * torch.tensor(keep_scale(p), device=device)
    x, weight = torch.ones(rows, columns, device=device), native_weight(torch.zeros_like(eye))
    _, h = ops.lora_linear(x, *weight, eye, eye, 1.0, None, p, mask_seed)
    grad_x, _, _ = ops.lora_linear_backward(x, x, h, *weight, eye, eye, 1.0, p, mask_seed, True, True, False)
    one_per_row = torch.eye(rows, columns, device=device)
    _, grad_a, _ = ops.lora_linear_backward(one_per_row, x, h, *weight, eye, eye, 1.0, p, mask_seed, True, True, False)
    assert torch.equal(h, expected) and torch.equal(grad_x, expected) and torch.equal(grad_a, expected[:columns])


def test_no_rows(device: str, seed: int) -> None:
    for options in ({}, {"dropout_p": 0.5, "training": True}):
        actual = gradients(on_device(device, **options), small(rows=0), torch.ones(0, OUT))
        assert actual["y"].shape == (0, OUT) and not actual["lora_a"].any() and not actual["lora_b"].any()


TENSORS = ("x", "weight", "lora_a", "lora_b", "scaling", "bias")


@pytest.mark.parametrize("needs", [*[(name,) for name in TENSORS], ("x", "lora_b"), ("lora_a", "lora_b"), ()])
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    """And the same as when all is asked for."""
    inputs = small("float32")
    expected = gradients(on_device(device), inputs, torch.ones(5, OUT))
    leaves = {name: inputs[name].clone().requires_grad_(name in needs) for name in TENSORS}
    y = on_device(device)(**leaves)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "float32"])
def test_opcheck(device: str, kind: str, seed: int) -> None:
    """With and without nested scales, bias and seed."""
    dense = torch.randn(OUT, IN, device=device, requires_grad=True)
    w, wf = native_weight(random_nf4((OUT, IN), 32).to(device) if kind == "nf4" else dense)
    shapes = ((2, 3, IN), (4, IN), (OUT, 4), (OUT,))
    x, lora_a, lora_b, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    dropout = (0.5, draw_seed(device)) if kind == "nf4" else (0.0, None)
    arguments = (x, w, wf, lora_a, lora_b, 0.5, bias if kind == "nf4" else None, *dropout)
    torch.library.opcheck(ops.lora_linear, arguments)
    h, grad_y = torch.randn(6, 4, device=device), torch.randn(2, 3, OUT, device=device)
    backward = (grad_y, x, h, [part.detach() for part in w], wf, lora_a, lora_b, 0.5, *dropout, True, False, True)
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in backward)
    torch.library.opcheck(ops.lora_linear_backward, detached)


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    """In training, with one graph for any number of rows."""
    inputs = small()
    weight = inputs.pop("weight")
    function = partial(on_device(device, dropout_p=0.5, training=True), weight=weight)
    compiled, graphs = compile_counting(lambda **values: function(**values))
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, OUT)
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


def test_same_bits_every_time(device: str, seed: int) -> None:
    inputs, grad_y = lora_inputs(torch.randn(80, 1100), torch.randn(70, 1100)), torch.randn(70, 80)
    assert_same_bits(*(gradients(on_device(device), inputs, grad_y) for _ in range(2)))


def test_autocast(device: str, seed: int) -> None:
    """x and bias are cast; adapters and their gradients stay fp32."""
    inputs = small()
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    with torch.autocast(device, torch.bfloat16):
        y = on_device(device)(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, on_device(device)(**halved))
    y.sum().backward()
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == dict.fromkeys(leaves, torch.float32)


def test_double_backward(device: str, seed: int) -> None:
    inputs = small()
    leaf = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(on_device(device)(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_tensors_on_different_devices(device: str, name: str) -> None:
    inputs = {key: value.to("meta" if key == name else device) for key, value in small().items()}
    with pytest.raises(RuntimeError, match=f"lora_linear: {name} must be on x's device {device}.*, got meta"):
        lora_linear(**inputs, backend="triton")


def test_float64_is_not_for_the_kernels(device: str) -> None:
    values = {name: value.to(device) for name, value in small("float32").items()}
    values = {name: value.double() for name, value in values.items()}
    with pytest.raises(
        RuntimeError, match=r"lora_linear: backend 'triton' takes fp32, bf16 or fp16, got torch.float64"
    ):
        lora_linear(**values, backend="triton")
