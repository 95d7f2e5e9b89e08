"""What `peftkern.ops._op.Op` gives every op: gradients that are not there, torch.func, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import random_nf4
from torch import Tensor
from torch.autograd import forward_ad

import peftkern
from peftkern.ops.dora_linear import dora_norm

OUT, IN = 6, 16
WEIGHT: dict[str, Any] = {"dense": torch.randn(OUT, IN), "nf4": random_nf4((OUT, IN), 32)}
IDS, TARGETS = torch.tensor([[1, 4, 2], [0, 3, 1]]), torch.tensor([1, 0, 5, -100])
SQUARE: Any = [torch.randn(IN, IN) for _ in range(3)]


def _lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, weight: str = "dense", **options: Any) -> Tensor:
    return peftkern.lora_linear(x, WEIGHT[weight], lora_a, lora_b, 0.5, bias, **options)


def _multi(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, **options: Any) -> Tensor:
    indices = torch.tensor([1, -1, 0, 1])[: x.shape[0]]
    adapters = [lora_a, 2 * lora_a], [lora_b, lora_b], [0.5, 0.7]
    return peftkern.multi_lora_linear(x, WEIGHT["nf4"], *adapters, indices, bias, **options)


def _dora(x: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, **options: Any) -> Tensor:
    return peftkern.dora_linear(x, WEIGHT["nf4"], lora_a, lora_b, magnitude, 0.5, detach_norm=False, **options)


def _qkv(x: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, **options: Any) -> Tensor:
    weights, adapters = (
        [WEIGHT["nf4"], WEIGHT["dense"], WEIGHT["nf4"]],
        ([lora_a, None, lora_a], [lora_b, None, lora_b]),
    )
    return torch.cat(peftkern.lora_qkv(x, weights, *adapters, [0.5, 0, 2.0], [None, bias, None], **options), -1)


def _mlp(x: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Any) -> Tensor:
    adapters = {"gate": (lora_a, lora_b, 0.5), "down": (lora_a, lora_b, 2.0)}
    return peftkern.lora_mlp(x, SQUARE[0], SQUARE[1], SQUARE[2], adapters, **options)


def _bottleneck(x: Tensor, down: Tensor, up: Tensor, residual: Tensor, **options: Any) -> Tensor:
    zeros = torch.zeros(3), torch.zeros(IN)
    return peftkern.bottleneck_adapter(x, down, zeros[0], up, zeros[1], "tanh", residual=residual, **options)


def _prefix(query: Tensor, key: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    return peftkern.prefix_attention(query, key, key.square(), prefix, prefix.cos(), **options)


# Function, shapes of what is differentiated.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "nf4_linear": (lambda x, b, **o: peftkern.nf4_linear(x, WEIGHT["nf4"], b, **o), [(4, IN), (OUT,)]),
    "lora_linear": (_lora, [(4, IN), (2, IN), (OUT, 2), (OUT,)]),
    "lora_linear nf4": (
        lambda x, a, b, bias, **o: _lora(x, a, b, bias, "nf4", **o),
        [(4, IN), (2, IN), (OUT, 2), (OUT,)],
    ),
    "multi_lora_linear": (_multi, [(4, IN), (2, IN), (OUT, 2), (OUT,)]),
    "dora_linear": (_dora, [(4, IN), (2, IN), (OUT, 2), (OUT,)]),
    "dora_linear_norm": (lambda a, b, **o: dora_norm(WEIGHT["nf4"], a, b, 0.5, **o), [(2, IN), (OUT, 2)]),
    "ia3_linear": (
        lambda x, scale, b, **o: peftkern.ia3_linear(x, WEIGHT["nf4"], scale, b, **o),
        [(4, IN), (OUT,), (OUT,)],
    ),
    "ia3_linear input": (
        lambda x, scale, b, **o: peftkern.ia3_linear(x, WEIGHT["dense"], scale, b, True, **o),
        [(4, IN), (IN,), (OUT,)],
    ),
    "lora_qkv": (_qkv, [(4, IN), (2, IN), (OUT, 2), (OUT,)]),
    "lora_mlp": (_mlp, [(4, IN), (2, IN), (IN, 2)]),
    "bottleneck_adapter": (_bottleneck, [(4, IN), (3, IN), (IN, 3), (4, IN)]),
    "prefix_attention": (_prefix, [(1, 2, 3, 8), (1, 2, 5, 8), (2, 4, 8)]),
    "cross_entropy": (
        lambda x, **o: peftkern.cross_entropy(x, TARGETS, reduction="none", **o),
        [(4, 7)],
    ),
    "prompt_embedding": (
        lambda weight, prompt, **o: peftkern.prompt_embedding(IDS, weight, prompt, **o).inputs_embeds,
        [(5, 8), (2, 8)],
    ),
}


def leaves_of(case: str) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in CASES[case][1]]


class _Ends(torch.autograd.Function):
    """Gives what it takes no gradient, as a later op may."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        return None


@pytest.mark.parametrize("case", CASES)
def test_no_gradient_is_none(case: str, seed: int) -> None:
    """Not a crash, nor the work of a backward on zeros."""
    leaves = leaves_of(case)
    _Ends.apply(CASES[case][0](*leaves, backend="cpu")).sum().backward()  # type: ignore[no-untyped-call]
    assert [leaf.grad for leaf in leaves] == [None] * len(leaves)


def test_one_of_several_results_is_used(seed: int) -> None:
    """The gradients of the others are zeros."""
    x, lora_a, lora_b, _ = leaves = leaves_of("lora_qkv")
    grads = []
    for backend in ("cpu", "reference"):
        adapters = [lora_a, 2 * lora_a], [lora_b, lora_b], [0.5, 2.0]
        _, y = peftkern.lora_qkv(x, [WEIGHT["nf4"], WEIGHT["dense"]], *adapters, backend=backend)
        grads.append(torch.autograd.grad(y.sum(), leaves[:3]))
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_torch_func(case: str, seed: int) -> None:
    """grad, vmap over every tensor and one inside the other are what autograd gives call by call."""
    function, leaves = CASES[case][0], leaves_of(case)

    def loss(*values: Tensor) -> Tensor:
        return function(*values, backend="cpu").square().sum()

    every = tuple(range(len(leaves)))
    expected = torch.autograd.grad(loss(*leaves), leaves)
    values = [leaf.detach() for leaf in leaves]
    assert all(torch.equal(*pair) for pair in zip(torch.func.grad(loss, every)(*values), expected, strict=True))
    batches = [torch.stack([value, 2 * value, -value]) for value in values]
    each = [loss(*(batch[i] for batch in batches)) for i in range(3)]
    if case == "cross_entropy":  # reads its targets' values
        return
    assert torch.equal(torch.vmap(loss)(*batches), torch.stack(each))
    batched = torch.vmap(torch.func.grad(loss, every))(*batches)
    inside = torch.func.grad(lambda *values: torch.vmap(loss)(*values).sum(), every)(*batches)
    for i in range(3):
        own = [batch[i].requires_grad_() for batch in map(Tensor.clone, batches)]
        for position, grad in enumerate(torch.autograd.grad(loss(*own), own)):
            assert torch.equal(batched[position][i], grad) and torch.equal(inside[position][i], grad)


@pytest.mark.parametrize("case", CASES)
def test_batched_gradients(case: str, seed: int) -> None:
    """is_grads_batched, and with it jacobian(vectorize=True)."""
    leaves = leaves_of(case)
    y = CASES[case][0](*leaves, backend="cpu")
    grad_ys = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, grad_ys, is_grads_batched=True, retain_graph=True)
    for i, grad_y in enumerate(grad_ys):
        grads = torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
        assert all(torch.equal(all_of_it[i], grad) for all_of_it, grad in zip(batched, grads, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_and_forward_mode_are_refused(case: str, seed: int) -> None:
    function, leaves = CASES[case][0], leaves_of(case)
    name = case.split()[0]

    def loss(value: Tensor) -> Tensor:
        return function(value, *leaves[1:], backend="cpu").square().sum()

    with pytest.raises(RuntimeError, match=rf"{name}\w*: double backward is not implemented; use backend='reference'"):
        torch.func.grad(lambda value: torch.func.grad(loss)(value).square().sum())(leaves[0].detach())
    refused = pytest.raises(RuntimeError, match=rf"{name}\w*: forward mode is not implemented; use backend='reference'")
    with refused:
        torch.func.jvp(loss, (leaves[0].detach(),), (torch.ones_like(leaves[0]),))
    with refused, forward_ad.dual_level(), torch.no_grad():
        loss(forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0])))
