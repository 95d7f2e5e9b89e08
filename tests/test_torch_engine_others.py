"""The engine composed of torch's ops: norms, attention, loss, prompts and quantising."""

import sys
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    gradients,
    lora_inputs,
    relative_error,
)
from prefix_cases import FP32_LIMIT, MASKS, SIZES, concatenated, errors
from prefix_cases import inputs_of as attention_inputs
from torch_engine_cases import composed, random_weight

import peftkern
from peftkern.engines.torch import attention, cross_entropy, dora
from peftkern.ops.dora_linear import dora_norm, weight_square_norm


@pytest.mark.parametrize("kind", ["nf4", "float32", "bfloat16"])
def test_norms(kind: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In tiles of rows, with their gradients, however much of the weight the adapter cancels."""
    monkeypatch.setattr(dora, "TILE_ELEMENTS", 1 << 10)
    for shape in ((65, 130), (513, 72), (200, 64)):
        inputs = lora_inputs(random_weight(kind, shape), torch.randn(1, shape[1]), 5)
        names, grad = ("lora_a", "lora_b", "scaling"), torch.randn(shape[0])
        inputs = {name: inputs[name] for name in ("weight", *names)}
        wide = {name: value.double() for name, value in inputs.items() if name in names}
        weight = inputs["weight"]
        wide["weight"] = weight.dequantize(torch.float64) if kind == "nf4" else weight.double()
        exact = gradients(composed(dora_norm, backend="reference", dtype=torch.float64), wide, grad.double(), names)
        for name, value in gradients(composed(dora_norm), inputs, grad, names).items():
            assert relative_error(value, exact[name]) <= 2e-6, name
        square = weight_square_norm(weight, backend="torch")
        assert relative_error(square, wide["weight"].square().sum(1)) <= 1e-6


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merges", [True, False])
def test_attention(merges: bool, dtype: torch.dtype, mask: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Merged by log-sum-exps, and concatenated where torch's attention has none."""
    monkeypatch.setattr(attention, "MERGING", ("cpu",) if merges else ())
    # Not the first, of one key and one row of the prefix, where what is left of a gradient is what cancelled.
    for sizes in SIZES[1:]:
        options: dict[str, Any] = {"attn_mask": MASKS[mask](sizes, dtype)}
        if options["attn_mask"] is None:
            options["is_causal"] = sizes.queries == sizes.keys
        inputs = attention_inputs(sizes, dtype, **options)
        grad_out = torch.randn(sizes.batch, sizes.heads, sizes.queries, sizes.head_dim).to(dtype)
        eps = torch.finfo(dtype).eps
        limits = {name: 1.5 * error + eps for name, error in errors(concatenated, inputs, grad_out).items()}
        for name, error in errors(composed(peftkern.prefix_attention), inputs, grad_out).items():
            assert error <= max(limits[name], FP32_LIMIT), (sizes, name, error, limits[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In blocks of rows; ignored rows have loss 0 and no gradient."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", 5 * 33)
    logits, target = (3 * torch.randn(12, 40)).to(dtype)[:, 2:35], torch.randint(0, 33, (12,))
    target[[1, 4, 11]] = -100
    for reduction in ("none", "mean", "sum"):
        leaves = [t.detach().requires_grad_() for t in (logits, logits.double())]
        losses = [
            peftkern.cross_entropy(leaf, target, reduction=reduction, backend=backend)
            for leaf, backend in zip(leaves, ("torch", "reference"))
        ]
        grad = torch.randn_like(losses[0])
        actual, exact = (torch.autograd.grad(*each)[0] for each in zip(losses, leaves, (grad, grad.double())))
        assert losses[0].dtype == torch.float32 and actual.dtype == dtype
        torch.testing.assert_close(losses[0].detach().double(), losses[1].detach(), rtol=2e-6, atol=2e-6)
        assert not actual[[1, 4, 11]].any()
        assert relative_error(actual, exact) <= torch.finfo(dtype).eps + 2e-6


@pytest.mark.parametrize("prompts", ["one", "of each sample", "at places"])
def test_prompts(prompts: str, seed: int) -> None:
    """The bits of the reference, whose embeddings are in their own dtype as well."""
    ids, embedding = torch.randint(0, 11, (3, 5)), torch.randn(11, 8).bfloat16()
    prompt = torch.randn(4, 8) if prompts != "of each sample" else torch.randn(2, 4, 8)
    options: dict[str, Any] = {
        "attention_mask": torch.ones(3, 5, dtype=torch.int64),
        "labels": ids,
        "position_ids": torch.arange(5)[None],
    }
    if prompts == "of each sample":
        options["prompt_ids"] = torch.tensor([1, 0, 1])
    if prompts == "at places":
        options["prompt_places"] = torch.tensor([0, 2, 3, 8])
    results = []
    for backend in ("torch", "reference"):
        leaves = [t.detach().requires_grad_() for t in (embedding, prompt)]
        found = peftkern.prompt_embedding(ids, *leaves, **options, backend=backend)
        results.append([*found, *torch.autograd.grad(found[0].float().square().sum(), leaves)])
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("nested", [True, False])
def test_quantising_in_chunks(nested: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The bytes of the reference."""
    monkeypatch.setattr(sys.modules["peftkern.ops.nf4_quantize"], "CHUNK_ELEMENTS", 4096)
    for shape in ((7, 33), (100, 130), (64, 128)):
        weight = torch.randn(shape)
        actual, expected = (
            peftkern.nf4_quantize(weight, 64, nested, backend=backend) for backend in ("torch", "reference")
        )
        for part, same in zip(actual.tensors, expected.tensors):
            assert (part is None) == (same is None) and (part is None or torch.equal(part, same))
        dense = peftkern.nf4_dequantize(actual, torch.float32, backend="torch")
        assert torch.equal(dense, peftkern.nf4_dequantize(expected, torch.float32, backend="reference"))
