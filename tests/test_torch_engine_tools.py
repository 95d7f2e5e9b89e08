"""The engine composed of torch's ops under autocast, torch.compile and torch.func; what it saves and refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import (
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    lora_inputs,
    random_nf4,
)
from torch import Tensor
from torch_engine_cases import IN, OPS, OUT, of_op

import peftkern


@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, seed: int) -> None:
    """x is cast, as for the kernels; products of fp32 adapters stay fp32."""
    function, _, inputs = of_op(op, "nf4", torch.randn(5, IN), OUT, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(**inputs)
    inputs = {**inputs, "x": inputs["x"].bfloat16()}
    inputs = {k: v.bfloat16() if k.startswith("bias") and isinstance(v, Tensor) else v for k, v in inputs.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, function(**inputs))


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_breaks(op: str, decoded_by: str, seed: int) -> None:
    function, _, inputs = of_op(op, "nf4", torch.randn(5, IN), OUT, 3, torch.float32)
    compiled, graphs = compile_counting(function)
    names = [name for name in float_tensors(inputs) if not name.startswith("weight")]
    for rows in (5, 8):
        inputs["x"] = torch.randn(rows, IN)
        grad_y = torch.randn_like(function(**inputs))
        eager, traced = (gradients(run, inputs, grad_y, names) for run in (function, compiled))
        for name, value in eager.items():
            torch.testing.assert_close(traced[name], value)
    assert graph_count(graphs) <= 2


@pytest.mark.parametrize("op", OPS)
def test_transforms(op: str, seed: int) -> None:
    """torch.func.grad is autograd's gradient."""
    function, _, inputs = of_op(op, "float32", torch.randn(5, IN), OUT, 3, torch.float32)
    names = [name for name in float_tensors(inputs) if not name.startswith("weight")]
    expected = gradients(function, inputs, torch.ones_like(function(**inputs)), names)
    for name in names:
        actual = torch.func.grad(lambda value, name=name: function(**{**inputs, name: value}).sum())(inputs[name])
        torch.testing.assert_close(actual, expected[name])


@pytest.mark.parametrize("op", OPS)
def test_double_backward_names_the_op(op: str, seed: int) -> None:
    function, _, inputs = of_op(op, "float32", torch.randn(5, IN), OUT, 3, torch.float32)
    x = inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(function(**inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\w+: double backward is not implemented; use backend='reference'"):
        grad.sum().backward()


class _GivesNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, other: Tensor) -> Tensor:
        return y + other

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@pytest.mark.parametrize("op", OPS)
def test_an_undefined_gradient_is_none(op: str, seed: int) -> None:
    function, _, inputs = of_op(op, "float32", torch.randn(5, IN), OUT, 3, torch.float32)
    x, other = inputs["x"].requires_grad_(), torch.zeros((), requires_grad=True)
    _GivesNone.apply(function(**inputs), other).sum().backward()
    assert x.grad is None or not x.grad.any()
    assert other.grad is not None


def saved_bytes(run: Callable[[], Tensor], own: list[Tensor]) -> int:
    """Of storages kept for backward, those of `own` aside."""
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in own}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    del y
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_saved(dtype: torch.dtype, seed: int) -> None:
    """x is there already; h, a byte of mask an element; nothing of the weight's size."""
    rows, features, rank = 64, 256, 4
    weight = random_nf4((features, features))
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    inputs = lora_inputs(weight, x, rank)
    own = [x, inputs["lora_a"], inputs["lora_b"], *(part for part in weight.tensors if part is not None)]
    inputs["scaling"] = 2.0
    for name in ("lora_a", "lora_b"):
        inputs[name].requires_grad_()
    h = rows * rank * 4
    assert saved_bytes(lambda: peftkern.lora_linear(**inputs, backend="torch"), own) == h
    drop = {"dropout_p": 0.1, "training": True, "backend": "torch"}
    assert saved_bytes(lambda: peftkern.lora_linear(**inputs, **drop), own) == h + rows * features


def test_float64_is_the_references(seed: int) -> None:
    with pytest.raises(RuntimeError, match=r"nf4_linear: backend 'torch' takes fp32, .* got torch.float64"):
        peftkern.nf4_linear(torch.randn(2, IN).double(), random_nf4((OUT, IN)), backend="torch")
