"""prefix_attention in Triton against float64: dtypes, sizes, grouped heads, masks; only what is asked for."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, assert_same_bits, compile_counting, gradients, graph_count
from prefix_cases import (
    FP32_LIMIT,
    MASKS,
    NAMES,
    SIZES,
    SMALL,
    Inputs,
    Sizes,
    concatenated,
    errors,
    inputs_of,
)
from torch import Tensor
from triton_cases import on

from peftkern import prefix_attention
from peftkern.ops._op import NAMESPACES

ops = NAMESPACES["triton"].library


def check(device: str, inputs: Inputs, grad_out: Tensor | None = None) -> None:
    """In 16 bits no more than half again the error of torch's attention by concatenation."""
    grad_out = torch.randn(inputs["query"].shape).to(inputs["query"].dtype) if grad_out is None else grad_out
    before = {name: inputs[name].clone() for name in NAMES}
    actual = errors(on(device, prefix_attention), inputs, grad_out)
    assert all(torch.equal(inputs[name], value) for name, value in before.items()), "an input was written over"
    limits = dict.fromkeys(actual, FP32_LIMIT)
    if inputs["query"].dtype != torch.float32:
        eps = torch.finfo(inputs["query"].dtype).eps
        limits = {name: 1.5 * error + eps / 2 for name, error in errors(concatenated, inputs, grad_out).items()}
    for name, error in actual.items():
        assert error <= limits[name], f"{name}: relative error {error:.2e} > {limits[name]:.2e}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES[:5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(device: str, dtype: torch.dtype, sizes: Sizes, is_causal: bool, seed: int) -> None:
    check(device, inputs_of(sizes, dtype, is_causal=is_causal))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 128), (torch.float16, 130), (torch.bfloat16, 256)])
def test_long_prefix_and_wide_heads(device: str, dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Several tiles of the prefix, the last in part; as wide a head as may be."""
    check(device, inputs_of(Sizes(1, 2, 1, 40, 33, head_dim, 50), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_for_each_of_the_batch(device: str, dtype: torch.dtype, seed: int) -> None:
    inputs = inputs_of(SMALL, dtype)
    check(device, {**inputs, **{name: torch.randn(2, 2, 3, 8).to(dtype) for name in NAMES[3:]}})


def test_many_rows_are_summed_in_order(device: str, seed: int) -> None:
    """In several parts, twice with the same bits."""
    inputs = inputs_of(Sizes(9, 4, 2, 70, 5, 8, 3))
    check(device, inputs)
    run, grad_out = on(device, prefix_attention), torch.ones(9, 4, 70, 8)
    assert_same_bits(*(gradients(run, inputs, grad_out, NAMES) for _ in range(2)))


@pytest.mark.parametrize("mask", MASKS)
def test_masks(device: str, mask: str, seed: int) -> None:
    sizes = SIZES[1]
    check(device, inputs_of(sizes, attn_mask=MASKS[mask](sizes, torch.float32), scale=0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_any_token_the_prefix_is_left(device: str, dtype: torch.dtype, seed: int) -> None:
    """Rows of padding are finite, and nothing flows into the tokens that they hide."""
    s = SIZES[2]
    attn_mask = (torch.arange(s.queries) >= 3)[:, None].expand(s.queries, s.keys)
    inputs = inputs_of(s, dtype, attn_mask=attn_mask)
    grad_out = torch.randn(inputs["query"].shape).to(dtype)
    check(device, inputs, grad_out)
    grad_out[:, :, 3:] = 0
    actual = gradients(on(device, prefix_attention), inputs, grad_out, NAMES)
    assert not actual["key"].any() and not actual["value"].any()


def test_layouts(device: str, seed: int) -> None:
    """Heads that are transposed, expanded or dense; the gradient of a sum is expanded."""
    inputs = inputs_of(SMALL)
    inputs["query"] = torch.randn(2, 4, 8, 6).transpose(2, 3)
    inputs["key"] = torch.randn(2, 1, 6, 8).expand(2, 2, 6, 8)
    inputs["prefix_key"] = torch.randn(2, 8, 3).transpose(1, 2)
    inputs["prefix_value"] = torch.randn(1, 3, 8).expand(2, 3, 8)
    check(device, inputs, torch.ones(1).expand(2, 4, 6, 8))


@pytest.mark.parametrize("dimension", ["batch", "queries", "keys"])
def test_empty(device: str, dimension: str, seed: int) -> None:
    inputs = inputs_of(SMALL._replace(**{dimension: 0}))
    grad_out = torch.randn(inputs["query"].shape)
    actual = gradients(on(device, prefix_attention), inputs, grad_out, NAMES)
    expected = gradients(partial(prefix_attention, backend="reference"), inputs, grad_out, NAMES)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [*[(name,) for name in NAMES], ("prefix_key", "prefix_value"), NAMES[:3], ()])
def test_only_what_is_asked_for_gets_a_gradient(device: str, needs: tuple[str, ...], seed: int) -> None:
    inputs, run = inputs_of(SMALL, torch.float16, is_causal=True), on(device, prefix_attention)
    grad_out = torch.randn(inputs["query"].shape).half()
    expected = gradients(run, inputs, grad_out, NAMES)
    leaves = {name: inputs[name].clone().requires_grad_(name in needs) for name in NAMES}
    out = run(**{**inputs, **leaves})
    assert out.requires_grad == bool(needs)
    if needs:
        out.backward(grad_out)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("with_mask", [False, True])
def test_opcheck(device: str, with_mask: bool, seed: int) -> None:
    inputs = inputs_of(SMALL)
    tensors = [inputs[name].to(device).requires_grad_() for name in NAMES]
    mask = torch.randn(6, 6, device=device).expand(2, 4, 6, 6) if with_mask else None
    torch.library.opcheck(ops.prefix_attention, (*tensors, mask, not with_mask, 0.5))
    plain = [tensor.detach() for tensor in tensors]
    out, lse = ops.prefix_attention(*plain, mask, not with_mask, 0.5)
    for needs in ((True, True), (False, True), (True, False)):
        arguments: Any = (torch.randn_like(out), *plain, mask, out, lse, not with_mask, 0.5, *needs)
        torch.library.opcheck(ops.prefix_attention_backward, arguments)


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    run = on(device, prefix_attention)
    compiled, graphs = compile_counting(run)
    for tokens in (50, 51):
        inputs = inputs_of(SMALL._replace(queries=tokens, keys=tokens), is_causal=True)
        grad_out = torch.randn(inputs["query"].shape)
        assert_same_bits(*(gradients(each, inputs, grad_out, NAMES) for each in (compiled, run)))
    assert graph_count(graphs) == 1


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 128), (torch.float16, 256)])
def test_heads_that_are_too_wide(device: str, dtype: torch.dtype, longest: int, seed: int) -> None:
    with pytest.raises(RuntimeError, match=f"backend 'triton' takes a head_dim up to {longest} in {dtype}, got 257"):
        on(device, prefix_attention)(**inputs_of(SMALL._replace(head_dim=257), dtype))


def test_a_mask_that_requires_grad(device: str, seed: int) -> None:
    inputs = inputs_of(SMALL, attn_mask=torch.randn(6, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="prefix_attention: backend 'triton' gives attn_mask no gradient"):
        on(device, prefix_attention)(**inputs)
