"""Inputs for prefix_attention, and how near float64 its results and gradients are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from linear_cases import gradients
from torch import Tensor

from peftkern import prefix_attention
from peftkern.ops.prefix_attention import prefix_attention_reference

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


class Sizes(NamedTuple):
    """Of one call."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    length: int


# One; odd; grouped heads; more rows than a block; one query for grouped heads; more keys than a block; fewer keys than
# queries; many elements that share a prefix; wide heads.
SIZES = (
    Sizes(1, 1, 1, 1, 1, 1, 1),
    Sizes(2, 3, 3, 5, 7, 33, 5),
    Sizes(2, 6, 2, 9, 9, 8, 3),
    Sizes(1, 4, 2, 70, 70, 16, 17),
    Sizes(3, 8, 2, 1, 9, 20, 2),
    Sizes(1, 2, 1, 130, 600, 40, 40),
    Sizes(1, 2, 1, 400, 390, 16, 3),
    Sizes(9, 2, 2, 3, 3, 24, 33),
    Sizes(1, 2, 1, 2, 5, 530, 2),
)
SMALL = Sizes(2, 4, 2, 6, 6, 8, 3)

Inputs = dict[str, Any]
# Of a call's sizes and dtype; what each hides, and how it is broadcast.
MASKS: dict[str, Callable[[Sizes, torch.dtype], Tensor | None]] = {
    "none": lambda s, dtype: None,
    "padding": lambda s, dtype: _padding(s)[:, None, None, :],
    "padding of every query": lambda s, dtype: _padding(s)[:, None, None, :].expand(-1, 1, s.queries, -1),
    "two dimensions": lambda s, dtype: torch.rand(s.queries, s.keys) < 0.7,
    "one column": lambda s, dtype: torch.randn(s.batch, 1, s.queries, 1).to(dtype),
    "numbers": lambda s, dtype: torch.randn(s.batch, s.heads, s.queries, s.keys).to(dtype),
    "infinite": lambda s, dtype: torch.zeros(s.batch, 1, s.queries, s.keys, dtype=dtype).masked_fill(
        torch.rand(s.queries, s.keys) < 0.3, -torch.inf
    ),
    "lowest": lambda s, dtype: torch.zeros(1, 1, s.queries, s.keys, dtype=dtype).masked_fill(
        torch.rand(s.queries, s.keys) < 0.5, torch.finfo(dtype).min
    ),
    "strided": lambda s, dtype: torch.randn(s.keys, s.queries).to(dtype).t(),
    "any number of keys": lambda s, dtype: torch.arange(s.keys) < torch.randint(s.keys + 1, (s.heads, s.queries, 1)),
}


def _padding(s: Sizes) -> Tensor:
    """The first rows have fewer and fewer tokens, from none on."""
    return torch.arange(s.keys) >= s.keys - torch.arange(s.batch)[:, None].clamp(max=s.keys)


def inputs_of(s: Sizes, dtype: torch.dtype = torch.float32, **options: Any) -> Inputs:
    """Keyword arguments of prefix_attention in transformers' layout; the prefix in fp32 and as heavy as the tokens."""

    def heads(count: int, rows: int) -> Tensor:
        return torch.randn(s.batch, rows, count, s.head_dim).to(dtype).transpose(1, 2)

    prefix = (s.kv_heads, s.length, s.head_dim)
    return {
        "query": heads(s.heads, s.queries),
        "key": heads(s.kv_heads, s.keys),
        "value": heads(s.kv_heads, s.keys) + 0.5,
        "prefix_key": torch.randn(prefix),
        "prefix_value": torch.randn(prefix) - 0.5,
        "enable_gqa": True,
        **options,
    }


def native(**inputs: Any) -> Tensor:
    return prefix_attention(**inputs, backend="cpu")


def reference(**inputs: Any) -> Tensor:
    return prefix_attention(**inputs, backend="reference")


def concatenated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What one writes without prefix_attention: torch's attention over [prefix; tokens]."""
    batch, _, queries, _ = query.shape
    shape = (batch, *prefix_key.shape[-3:])
    key = torch.cat([prefix_key.to(key.dtype).expand(shape), key], dim=2)
    value = torch.cat([prefix_value.to(value.dtype).expand(shape), value], dim=2)
    if is_causal:
        attn_mask = torch.ones(queries, key.shape[2] - shape[2], dtype=torch.bool).tril()
    if attn_mask is not None:
        if attn_mask.shape[-1] != key.shape[2] - shape[2]:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[2] - shape[2])
        attn_mask = F.pad(attn_mask, (shape[2], 0), value=attn_mask.dtype == torch.bool)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)


def errors(function: Callable[..., Tensor], inputs: Inputs, grad_out: Tensor) -> dict[str, float]:
    """Of the result and every gradient, relative to float64 in the norm."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.dtype != torch.bool else value
        for name, value in inputs.items()
    }
    exact = gradients(exactly, wide, grad_out.double(), NAMES)
    actual = gradients(function, inputs, grad_out, NAMES)
    for name, value in actual.items():
        assert value.dtype == inputs["query" if name == "y" else name].dtype and value.shape == exact[name].shape, name
        assert torch.isfinite(value).all(), name
    # Of an empty prefix there is nothing to be wrong.
    norms = {name: exact[name].norm().clamp(min=torch.finfo(torch.double).tiny) for name in actual}
    return {name: ((value.double() - exact[name]).norm() / norms[name]).item() for name, value in actual.items()}


def exactly(enable_gqa: bool, **inputs: Any) -> Tensor:
    """The reference, in the dtype of its inputs."""
    return prefix_attention_reference(**inputs)


# fp32: weights are good to about 1e-6, which cancels in the gradients by up to some ten times.
FP32_LIMIT = 3e-5


def assert_near_float64(inputs: Inputs, grad_out: Tensor) -> None:
    """The error is one of rounding, in 16 bits no more than half again that of torch's attention by concatenation."""
    actual = errors(native, inputs, grad_out)
    limits = dict.fromkeys(actual, FP32_LIMIT)
    if inputs["query"].dtype != torch.float32:
        eps = torch.finfo(inputs["query"].dtype).eps
        limits = {name: 1.5 * error + eps / 2 for name, error in errors(concatenated, inputs, grad_out).items()}
    for name, error in actual.items():
        assert error <= limits[name], f"{name}: relative error {error:.2e} > {limits[name]:.2e}"
