"""prefix_attention against float64 and against concatenation: sizes, masks, layouts, dtypes, levels; torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import DTYPES, assert_same_bits, compile_counting, gradients, graph_count, only_level
from prefix_cases import (
    FP32_LIMIT,
    MASKS,
    NAMES,
    SIZES,
    SMALL,
    Sizes,
    assert_near_float64,
    concatenated,
    errors,
    exactly,
    inputs_of,
    native,
    reference,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkern import prefix_attention
from peftkern._native import ops


def grad_like(inputs: dict[str, Any]) -> Tensor:
    return torch.randn(inputs["query"].shape).to(inputs["query"].dtype)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "infinite", "numbers"])
@pytest.mark.parametrize("per_batch", [False, True])
def test_reference_gradients(mask: str, per_batch: bool, seed: int) -> None:
    s = Sizes(2, 4, 2, 3, 3, 4, 2)
    inputs = {name: value.double() for name, value in inputs_of(s).items() if name in NAMES}
    if per_batch:
        inputs |= {name: torch.randn(2, 2, 2, 4).double() for name in ("prefix_key", "prefix_value")}
    attn_mask = None if mask == "causal" else MASKS[mask](s, torch.float64)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}

    def function(*values: Tensor) -> Tensor:
        return exactly(True, **dict(zip(leaves, values)), attn_mask=attn_mask, is_causal=mask == "causal")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_concatenation(mask: str, seed: int) -> None:
    inputs = {**inputs_of(SMALL), "attn_mask": MASKS[mask](SMALL, torch.float32)}
    torch.testing.assert_close(reference(**inputs), concatenated(**inputs))


@pytest.mark.parametrize("s", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(isa: str, dtype: torch.dtype, s: Sizes, seed: int) -> None:
    with only_level(isa):
        for is_causal in (False, True):
            inputs = inputs_of(s, dtype, is_causal=is_causal)
            assert_near_float64(inputs, grad_like(inputs))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: torch.dtype, mask: str, seed: int) -> None:
    for s in (SIZES[1], SIZES[2], SIZES[4]):
        inputs = inputs_of(s, dtype, attn_mask=MASKS[mask](s, dtype))
        assert_near_float64(inputs, grad_like(inputs))


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest", "all hidden at first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_queries_takes_the_keys_that_its_mask_shows(dtype: torch.dtype, kind: str, seed: int) -> None:
    """Causal masks with padding, as transformers makes them, of more queries than a block."""
    s = Sizes(3, 4, 2, 400, 400, 16, 3)
    visible = torch.ones(s.queries, s.keys, dtype=torch.bool).tril(-200 if kind == "all hidden at first" else 0)
    attn_mask = (visible & (torch.arange(s.keys) >= torch.tensor([0, 7, 300])[:, None, None]))[:, None]
    if kind in ("infinite", "lowest"):
        lowest = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
        attn_mask = torch.zeros(attn_mask.shape, dtype=dtype).masked_fill(~attn_mask, lowest)
    inputs = inputs_of(s, dtype, attn_mask=attn_mask)
    assert_near_float64(inputs, grad_like(inputs))
    strided = torch.cat([attn_mask, attn_mask], -1)[..., : s.keys].expand(3, 4, -1, -1)
    assert torch.equal(native(**{**inputs, "attn_mask": strided}), native(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_of_each(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Of the batch, in query's dtype and strided."""
    for s in (SIZES[2], SIZES[4]):
        prefix = {
            name: torch.randn(s.batch, s.length, s.kv_heads, s.head_dim).to(dtype).transpose(1, 2)
            for name in ("prefix_key", "prefix_value")
        }
        inputs = inputs_of(s, dtype, **prefix)
        assert_near_float64(inputs, grad_like(inputs))


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0])
def test_a_scale(scale: float, seed: int) -> None:
    inputs = inputs_of(SMALL, scale=scale)
    grad_out = grad_like(inputs)
    if scale != 0:
        assert_near_float64(inputs, grad_out)
    else:
        actual, expected = (gradients(function, inputs, grad_out, NAMES) for function in (native, reference))
        torch.testing.assert_close(actual, expected)
    assert not torch.allclose(native(**inputs), native(**{**inputs, "scale": None}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("falling", [False, True])
def test_the_largest_score_may_come_late(isa: str, falling: bool, dtype: torch.dtype, seed: int) -> None:
    """Scores that grow over many blocks of keys, so that each block scales down what the earlier ones gave."""
    inputs = inputs_of(Sizes(1, 2, 1, 60, 1200, 16, 2), dtype)
    direction = inputs["query"].float().mean((0, 1, 2)).sign()
    growing = torch.linspace(0, 10, 1200)[:, None] * direction
    inputs["query"] = (direction + inputs["query"] / 8).to(dtype)
    inputs["key"] = (inputs["key"] / 8 + (growing.flip(0) if falling else growing)).to(dtype)
    error = errors(native, inputs, grad_like(inputs))["y"]
    assert error < (FP32_LIMIT if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, seed: int) -> None:
    """Contiguous, expanded, every second column; a grad_out of one element."""
    s = SIZES[2]
    base = inputs_of(s, dtype)
    dense = {name: base[name].contiguous() for name in NAMES}
    wide = {name: torch.cat([base[name]] * 2, -1)[..., ::2] for name in NAMES}
    one = {name: base[name][:1].expand_as(base[name]) for name in NAMES[:3]}
    for change in (dense, wide, one):
        inputs = {**base, **change}
        assert_near_float64(inputs, grad_like(inputs))
        assert_near_float64(inputs, torch.ones((), dtype=dtype).expand(inputs["query"].shape))


@pytest.mark.parametrize("kind", ["bool", "infinite", "lowest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_any_token_the_prefix_is_left(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    """Rows of padding are finite, and nothing flows into the tokens that they hide."""
    s = SIZES[2]
    visible = torch.arange(s.queries) >= 3
    attn_mask = visible[:, None].expand(s.queries, s.keys)
    if kind != "bool":
        lowest = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
        attn_mask = torch.zeros(s.queries, s.keys, dtype=dtype).masked_fill(~attn_mask, lowest)
    inputs = inputs_of(s, dtype, attn_mask=attn_mask)
    grad_out = grad_like(inputs)
    assert_near_float64(inputs, grad_out)
    grad_out[:, :, 3:] = 0
    actual = gradients(native, inputs, grad_out, NAMES)
    assert not actual["key"].any() and not actual["value"].any()
    nothing = {**inputs, "attn_mask": None, "key": inputs["key"][:, :, :0], "value": inputs["value"][:, :, :0]}
    assert torch.equal(actual["y"][:, :, :3], native(**nothing)[:, :, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimension", ["batch", "queries", "keys"])
def test_empty(isa: str, dimension: str, dtype: torch.dtype, seed: int) -> None:
    s = SMALL._replace(**{dimension: 0})
    inputs = inputs_of(s, dtype)
    grad_out = grad_like(inputs)
    actual, expected = (gradients(function, inputs, grad_out, NAMES) for function in (native, reference))
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_prefix(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Attention as such."""
    with only_level(isa):
        for s in SIZES[1:]:
            for is_causal in (False, s.queries > 1):  # the weight of a single key is 1: its gradients are rounding
                inputs = inputs_of(s._replace(length=0), dtype, is_causal=is_causal)
                assert_near_float64(inputs, grad_like(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_prefix_and_rows_that_see_nothing(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Zeros, as torch's attention has it: padding on the left, whole blocks of rows, more hidden keys than a block."""
    s = Sizes(3, 4, 2, 700, 700, 16, 0)
    hidden = torch.tensor([0, 7, 650])[:, None, None]
    visible = torch.ones(s.queries, s.keys, dtype=torch.bool).tril() & (torch.arange(s.keys) >= hidden)
    inputs = inputs_of(s, dtype, attn_mask=visible[:, None])
    grad_out = grad_like(inputs)
    with only_level(isa):
        assert_near_float64(inputs, grad_out)
        actual = gradients(native, inputs, grad_out, NAMES)
    for row, count in ((1, 7), (2, 650)):
        assert not actual["y"][row, :, :count].any() and not actual["query"][row, :, :count].any()
        assert not actual["key"][row, :, :count].any()
    plain = {name: value for name, value in inputs.items() if not name.startswith("prefix")}
    tolerance = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}  # of values up to 4
    torch.testing.assert_close(actual["y"], F.scaled_dot_product_attention(**plain), **tolerance)


def test_nothing_is_saved_for_the_batch(seed: int) -> None:
    """A longer prefix costs its own bytes, not the batch's; nothing is as long as tokens and prefix together."""

    def saved(length: int) -> dict[int, int]:
        inputs = inputs_of(Sizes(8, 4, 2, 32, 32, 16, length), is_causal=True)
        leaves = {name: inputs[name].requires_grad_() for name in NAMES}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            native(**{**inputs, **leaves})
        return kept

    assert sum(saved(12).values()) - sum(saved(4).values()) == 2 * 2 * 8 * 16 * 4
    tokens = 8 * 32 * 16 * 4
    assert sum(saved(4).values()) == (4 + 4 + 2 + 2) * tokens + 8 * 4 * 32 * 4 + 2 * 2 * 4 * 16 * 4


@pytest.mark.parametrize("needs", [*[(name,) for name in NAMES], ("prefix_key", "prefix_value"), NAMES[:3], ()])
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    """And the same as when all is asked for."""
    inputs = inputs_of(SIZES[3], torch.bfloat16, is_causal=True)
    grad_out = grad_like(inputs)
    expected = gradients(native, inputs, grad_out, NAMES)
    leaves = {name: inputs[name].clone().requires_grad_(name in needs) for name in NAMES}
    out = native(**{**inputs, **leaves})
    assert out.requires_grad == bool(needs)
    if needs:
        out.backward(grad_out)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        assert not native(**{**inputs, **leaves}).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    for s in (Sizes(3, 8, 4, 200, 200, 64, 16), Sizes(9, 8, 2, 1, 300, 32, 16)):
        inputs = inputs_of(s, dtype)
        grad_out = grad_like(inputs)
        results = []
        for threads in (1, 1, 2, 3):
            set_threads(threads)
            results.append(gradients(native, inputs, grad_out, NAMES))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, seed: int) -> None:
    inputs = inputs_of(SMALL)
    grad_out = grad_like(inputs)
    expected = gradients(native, inputs, grad_out, NAMES)
    leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    call = partial(native, enable_gqa=True)
    out = checkpoint(lambda *values: call(**dict(zip(NAMES, values))), *leaves.values(), use_reentrant=use_reentrant)
    out.backward(grad_out)
    assert_same_bits({"y": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}, expected)


def test_long_contexts_do_not_lose_the_prefix(seed: int) -> None:
    """A prefix that all attend to, beside thousands of tokens that hardly weigh."""
    inputs = inputs_of(Sizes(1, 2, 1, 3, 4096, 64, 4))
    inputs["prefix_key"] = inputs["query"].mean((0, 1, 2)).expand(1, 4, 64) * 50
    assert errors(native, inputs, grad_like(inputs))["y"] < 3e-5


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
def test_opcheck(with_mask: bool, per_batch: bool, seed: int) -> None:
    inputs = inputs_of(SMALL)
    if per_batch:
        inputs |= {name: torch.randn(2, 2, 3, 8) for name in ("prefix_key", "prefix_value")}
    tensors = [inputs[name].requires_grad_() for name in NAMES]
    mask = torch.randn(6, 6).expand(2, 4, 6, 6) if with_mask else None
    torch.library.opcheck(ops.prefix_attention, (*tensors, mask, not with_mask, 0.5))
    plain = [tensor.detach() for tensor in tensors]
    out, lse = ops.prefix_attention(*plain, mask, not with_mask, 0.5)
    grad_out = torch.randn(out.shape)
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (grad_out, *plain, mask, out, lse, not with_mask, 0.5, *needs)
        torch.library.opcheck(ops.prefix_attention_backward, arguments)


@pytest.mark.parametrize("mask", ["none", "causal", "padding of every query"])
def test_compile_without_graph_breaks(mask: str, seed: int) -> None:
    """One graph for any number of queries and keys."""
    compiled, graphs = compile_counting(native)
    for tokens in (50, 51, 60):
        s = SMALL._replace(queries=tokens, keys=tokens)
        attn_mask = None if mask == "causal" else MASKS[mask](s, torch.float32)
        inputs = inputs_of(s, attn_mask=attn_mask, is_causal=mask == "causal")
        grad_out = grad_like(inputs)
        assert_same_bits(*(gradients(each, inputs, grad_out, NAMES) for each in (compiled, native)))
    assert graph_count(graphs) == 1


def test_autocast(seed: int) -> None:
    """Query, key and value are cast; the prefix and its gradients stay fp32."""
    inputs = inputs_of(SMALL)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}
    with torch.autocast("cpu", torch.bfloat16):
        out = native(**inputs)
    halved = {**inputs, **{name: inputs[name].detach().bfloat16() for name in NAMES[:3]}}
    assert out.dtype == torch.bfloat16 and torch.equal(out, native(**halved))
    out.sum().backward()
    assert {name: leaf.grad.dtype for name, leaf in leaves.items()} == dict.fromkeys(leaves, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward(name: str, seed: int) -> None:
    inputs = inputs_of(SMALL)
    leaf = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="prefix_attention: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()
    (grad,) = torch.autograd.grad(reference(**inputs).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    assert second.shape == leaf.shape and second.any()


def test_a_trained_mask_runs_on_the_reference(seed: int) -> None:
    mask = torch.randn(6, 6, requires_grad=True)
    inputs = inputs_of(SMALL, attn_mask=mask)
    prefix_attention(**inputs).sum().backward()
    assert mask.grad is not None and mask.grad.shape == (6, 6)
    with torch.no_grad():
        native(**inputs)
    with pytest.raises(RuntimeError, match="backend 'cpu' gives attn_mask no gradient"):
        native(**inputs)
