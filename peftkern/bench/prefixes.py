"""Attention with a prefix, beside torch's over concatenated keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.bench.contenders import normal
from peftkern.bench.measure import Run
from peftkern.ops.prefix_attention import prefix_attention

BATCH, LENGTH, CONTEXT = 4, 16, 512


def contenders(case: str, out_features: int, in_features: int, rows: int) -> dict[str, Run]:
    """Name -> run(i). The model's key projection has this shape; `rows` tokens, or one with a cache of CONTEXT."""
    dtype = torch.float32 if case.endswith("fp32") else torch.bfloat16
    sizes = _sizes(out_features, in_features, rows)
    functions: dict[str, Callable[..., Tensor]] = {
        "peftkern": prefix_attention,
        "torch concatenated": concatenated_attention,
    }
    causal = _is_causal(case, rows)
    return {name: _run(function, sizes, dtype, causal, "backward" in case) for name, function in functions.items()}


def work(case: str, out_features: int, in_features: int, rows: int) -> tuple[float, float]:
    """Bytes and operations: half of the products with tokens where attention is causal."""
    sizes = _sizes(out_features, in_features, rows)
    element = 4 if case.endswith("fp32") else 2
    queries = BATCH * sizes.heads * sizes.queries * sizes.head_dim
    keys = BATCH * sizes.kv_heads * sizes.keys * sizes.head_dim
    forward = 4.0 * queries * ((sizes.keys / 2 if _is_causal(case, rows) else sizes.keys) + LENGTH)
    if "backward" in case:
        return (4.0 * queries + 4.0 * keys) * element, 3.5 * forward
    return (2.0 * queries + 2.0 * keys) * element, forward


class _Sizes(NamedTuple):
    """Of an attention with a prefix."""

    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int


def _sizes(out_features: int, in_features: int, rows: int) -> _Sizes:
    common = math.gcd(out_features, in_features)
    head_dim = math.gcd(common, 128)
    keys = CONTEXT if rows == 1 else rows
    return _Sizes(in_features // head_dim, common // head_dim, rows, keys, head_dim)


def _is_causal(case: str, rows: int) -> bool:
    return rows > 1 and "encoder" not in case


def _run(function: Callable[..., Tensor], sizes: _Sizes, dtype: torch.dtype, causal: bool, backward: bool) -> Run:
    """One call of an attention with a prefix, in transformers' layout of heads."""
    generator = torch.Generator().manual_seed(sizes.queries)

    def heads(count: int, rows: int) -> Tensor:
        shape = BATCH, rows, count, sizes.head_dim
        return normal(generator, *shape).to(dtype).transpose(1, 2)

    query, key, value = heads(sizes.heads, sizes.queries), *(heads(sizes.kv_heads, sizes.keys) for _ in range(2))
    prefix = [normal(generator, sizes.kv_heads, LENGTH, sizes.head_dim) for _ in range(2)]
    grad_out, leaves = torch.randn_like(query), (query, key, value, *prefix)

    def run(_: int) -> None:
        if not backward:
            with torch.no_grad():
                function(*leaves, is_causal=causal, enable_gqa=True)
            return
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        function(*leaves, is_causal=causal, enable_gqa=True).backward(grad_out)

    return run


def concatenated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
) -> Tensor:
    """torch's attention over [prefix; tokens]; its own causality begins at the first key, so the mask is one."""
    shape = query.shape[0], *prefix_key.shape
    key = torch.cat([prefix_key.to(key.dtype).expand(shape), key], dim=2)
    value = torch.cat([prefix_value.to(value.dtype).expand(shape), value], dim=2)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(shape[2]) if is_causal else None
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=enable_gqa)
