"""The engine composed of torch's ops, on the CPU, where the same code runs: linear layers against float64.

What it does on a GPU, op by op, is in test_torch_engine_cuda.py.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Inputs,
    assert_near_float64,
    float_tensors,
    gradients,
    lora_inputs,
    random_nf4,
    relative_error,
)
from projection_cases import projections_of, together
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_engine_cases import FP32_SUM, IN, OPS, OUT, ROUNDINGS, check, dora_inputs, of_op, random_weight

import peftkern
from peftkern.engines.torch import decode, products
from peftkern.ops.lora_linear import lora_linear_reference


@pytest.mark.parametrize("kind", ["nf4", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_shapes(op: str, dtype: torch.dtype, kind: str, decoded_by: str, seed: int) -> None:
    for rank, shape in zip((1, 3, 16, 40, 130), SHAPES):
        for rows, adapter_dtype in ((1, torch.float32), (40, dtype)):
            check(op, kind, torch.randn(rows, shape[1]).to(dtype), shape[0], rank, adapter_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str, seed: int) -> None:
    for dtype in DTYPES:
        randn = partial(torch.randn, dtype=dtype)
        grad_y, x = (LAYOUTS[layout](randn, features) for features in (OUT, IN))
        sizes = {"lora_qkv": 2 * OUT + 9, "lora_mlp": 9, "bottleneck_adapter": IN}
        if op in sizes:
            grad_y = torch.randn(*x.shape[:-1], sizes[op]).to(dtype)
        check(op, "bfloat16", x, OUT, 3, torch.float32, grad_y)


def test_accuracy_of_inputs_with_a_mean(decoded_by: str, seed: int) -> None:
    """4e-3, as of the kernels: an error common to all of a table's values would be 1e-2 here."""
    weight = random_nf4((512, 2048))
    exact = weight.dequantize(torch.float64)
    x = (torch.randn(64, 2048) + 1).bfloat16().requires_grad_()
    y = peftkern.nf4_linear(x, weight, backend="torch")
    (grad,) = torch.autograd.grad(y, x, y.detach())
    assert relative_error(y.detach(), x.detach().double() @ exact.t()) <= 4e-3
    assert relative_error(grad, y.detach().double() @ exact) <= 4e-3


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_look_up(dtype: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """fp32 and float64 are exact; 16 bits are within one rounding of the table and one of the product."""
    monkeypatch.setattr(decode, "route_of", lambda device: "gather")
    for shape, block_size in zip((*SHAPES, (128, 256)), (64, 32, 128, 64, 64, 64)):
        weight = random_nf4(shape, block_size, nested)
        actual = decode.Weight.of(weight).dense(dtype)
        exact = weight.dequantize(torch.float64)
        assert actual.dtype == dtype and actual.shape == shape
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(actual, weight.dequantize(dtype))
        else:
            assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("nested", [True, False])
def test_rows_of_a_weight(nested: bool, seed: int) -> None:
    for shape, block_size in (((200, 96), 32), ((513, 72), 64), ((5, 4096), 64)):
        weight = decode.Weight.of(random_nf4(shape, block_size, nested))
        dense, step = weight.dense(torch.float32), weight.row_step
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            assert torch.equal(weight.rows(start, stop).dense(torch.float32), dense[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_fp32_factors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Where a library multiplies 16 bits into fp32: here it multiplies them in fp32, which is the same number."""
    if dtype == torch.float32:
        return

    def mm(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None) -> Tensor:
        assert a.dtype == b.dtype == dtype
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    x, small = torch.randn(300, 130).to(dtype), torch.randn(300, 5)
    factor, wide = torch.randn(5, 130), torch.randn(130, 5)
    monkeypatch.setattr(products, "takes_parts", lambda x: True)
    monkeypatch.setattr(torch, "mm", mm)
    limit = 2**-16 if dtype == torch.bfloat16 else 2**-20
    assert relative_error(products.down(x, factor), x.double() @ factor.double().t()) <= limit
    sums = products.outer_sums(small, x, 0.7, torch.float32)
    assert relative_error(sums, 0.7 * small.double().t() @ x.double()) <= limit
    sums = products.outer_sums(small, x, 0.7, torch.float32, columns_first=True)
    assert relative_error(sums, 0.7 * x.double().t() @ small.double()) <= limit
    rounding = torch.finfo(dtype).eps / 2
    assert relative_error(products.up(small, wide, dtype), small.double() @ wide.double().t()) <= rounding
    y = torch.zeros_like(x)
    products.add_up(y, small, wide, 0.7)
    assert relative_error(y, 0.7 * small.double() @ wide.double().t()) <= rounding
    for narrow in (small.to(dtype), wide.to(dtype)):  # one of two factors in 16 bits
        pair = (narrow, wide) if narrow.shape[0] == 300 else (small, narrow)
        exact = pair[0].double() @ pair[1].double().t()
        assert relative_error(products.up(*pair, dtype), exact) <= rounding


# Dropout


def kept(x: Tensor, p: float, seed: int) -> Tensor:
    """What torch's dropout multiplies x by under a seed."""
    torch.manual_seed(seed)
    return torch.native_dropout(torch.ones_like(x.reshape(-1, x.shape[-1])), p, True)[0].view(x.shape)


@pytest.mark.parametrize("kind", ["nf4", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype, kind: str, seed: int) -> None:
    """By the mask of `torch.manual_seed`, forward and in every gradient."""
    p = 0.5  # whose factor is exact

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return peftkern.lora_linear(**inputs, dropout_p=p, training=True, backend="torch")

    def reference(x: Tensor, mask: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Any, **rest: Any) -> Tensor:
        base = lora_linear_reference(x, lora_a=lora_a[:0], lora_b=lora_b[:, :0], **rest)
        return base + scaling * F.linear(F.linear(x * mask, lora_a), lora_b)

    for rows in (1, 40):
        x = torch.randn(rows, 96).to(dtype)
        inputs = lora_inputs(random_weight(kind, (70, 96)), x, 16, torch.float32, dtype)
        expected = {**inputs, "mask": kept(x, p, seed + 1)}
        rounding = ROUNDINGS * torch.finfo(dtype).eps
        error = FP32_SUM if dtype == torch.float32 else rounding + FP32_SUM
        grad_y = torch.randn(rows, 70).to(dtype)
        assert_near_float64(dropping, reference, inputs, grad_y, expected, through_x=tuple(inputs), product_error=error)


@pytest.mark.parametrize("mode", ["peft", "lora_only"])
def test_dora_dropout(mode: str, seed: int) -> None:
    p, x = 0.5, torch.randn(20, 96)
    inputs = dora_inputs(torch.randn(70, 96), x, 3, torch.float32, torch.float32)
    mask, grad_y = kept(x, p, seed + 1), torch.randn(20, 70)

    def reference(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, **rest: Any) -> Tensor:
        scaling, dropped = rest["scaling"], x * mask.to(x.dtype)
        norm = (weight + scaling * lora_b @ lora_a).norm(dim=1).detach()
        through = dropped if mode == "peft" else x
        z = F.linear(through, weight) + scaling * F.linear(F.linear(dropped, lora_a), lora_b)
        return rest["magnitude"] / norm * z + F.linear(x - through, weight) + rest["bias"]

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        options = {"dropout_p": p, "training": True, "dropout_mode": mode}
        return peftkern.dora_linear(**inputs, **options, backend="torch")

    names = [name for name in float_tensors(inputs) if name != "weight"]
    exact = gradients(reference, {name: value.double() for name, value in inputs.items()}, grad_y.double(), names)
    for name, value in gradients(dropping, inputs, grad_y, names).items():
        assert relative_error(value, exact[name]) <= 1e-5, name


@pytest.mark.parametrize("op", ["lora_linear", "lora_qkv", "lora_mlp", "dora_linear"])
def test_checkpointing_replays_the_mask(op: str, seed: int) -> None:
    x = torch.randn(6, 24)
    function, _, inputs = of_op(op, "float32", x, 24, 3, torch.float32)
    if op == "lora_qkv":
        inputs = {name: value for name, value in inputs.items()}

    def run(**values: Any) -> Tensor:
        if op in ("lora_linear", "dora_linear"):
            return function(**values, dropout_p=0.5, training=True)
        parts = [list(each) for each in zip(*projections_of(values))]
        if op == "lora_qkv":
            ys = peftkern.lora_qkv(values["x"], *parts, dropout_p=0.5, training=True, backend="torch")
            return together(ys)
        adapters = [None if a is None else (a, b, s) for a, b, s in zip(*parts[1:4])]
        return peftkern.lora_mlp(values["x"], *parts[0], adapters, "silu", 0.5, True, biases=parts[4], backend="torch")

    names = [name for name in float_tensors(inputs) if not name.startswith("weight")]
    grad_y = torch.randn_like(run(**inputs))
    torch.manual_seed(seed + 3)
    plain = gradients(run, inputs, grad_y, names)
    torch.manual_seed(seed + 3)
    again = gradients(lambda **v: checkpoint(run, use_reentrant=False, **v), inputs, grad_y, names)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


# Batches of many adapters


def multi_inputs(dtype: torch.dtype, adapter_dtype: torch.dtype = torch.float32) -> Inputs:
    ranks = (3, 16, 5)
    lora_as = [torch.randn(rank, IN).to(adapter_dtype) for rank in ranks]
    lora_bs = [(torch.randn(OUT, rank) / rank**0.5).to(adapter_dtype) for rank in ranks]
    return {
        "lora_as": lora_as,
        "lora_bs": lora_bs,
        "x": torch.randn(6, 4, IN).to(dtype),
        "weight": torch.randn(OUT, IN),
    }


def many(x: Tensor, bias: Tensor, *factors: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Samples of an adapter apart and together, of none, and an adapter without samples."""
    indices, scalings = torch.tensor([0, -1, 0, 0, 2, 0]), [0.7, 2.0, torch.tensor(-1.5)]
    options = {"bias": bias, "backend": backend}
    return peftkern.multi_lora_linear(x, weight.to(x.dtype), factors[:3], factors[3:], scalings, indices, **options)


@pytest.mark.parametrize("known", ["to the host", "to the device"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_adapters(dtype: torch.dtype, known: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The adapter without samples gets zeros, not nothing."""
    if known == "to the device":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for adapter_dtype in {torch.float32, dtype}:
        inputs = multi_inputs(dtype, adapter_dtype)
        bias = torch.randn(OUT).to(dtype)
        leaves = [t.requires_grad_() for t in (inputs["x"], bias, *inputs["lora_as"], *inputs["lora_bs"])]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        run = partial(many, weight=inputs["weight"].to(dtype))
        y, exact = run(*leaves, backend="torch"), run(*wide, backend="reference")
        grad_y = torch.randn_like(y)
        grads = torch.autograd.grad(y, leaves, grad_y)
        exact_grads = torch.autograd.grad(exact, wide, grad_y.double())
        for actual, expected in zip((y.detach(), *grads), (exact.detach(), *exact_grads)):
            limit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
            assert (actual.double() - expected).norm() <= limit * expected.norm()


def test_no_adapters_at_all(seed: int) -> None:
    x, weight = torch.randn(3, IN), torch.randn(OUT, IN)
    y = peftkern.multi_lora_linear(x, weight, [], [], [], torch.full((3,), -1), backend="torch")
    torch.testing.assert_close(y, x @ weight.t())
