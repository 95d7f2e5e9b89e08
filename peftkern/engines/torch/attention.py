"""prefix_attention; the formula is that of `peftkern/ops/prefix_attention.py`.

Tokens are torch's flash or memory-efficient attention with its log-sum-exp. The prefix, which is short, is a softmax of
its own, and the two are merged by their log-sum-exps; in backward torch's kernels get the merged output and
log-sum-exp. Where torch has no such kernel, the two are concatenated. A prefix has at least one row here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.engines.token_attention import TokenAttention
from peftkern.engines.torch.autograd import Function, without_autocast

MERGING = ("cpu", "cuda")


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attention over [prefix; tokens] for query [batch, heads, queries, head_dim]; `mask` is added to the tokens'."""
    whole = key.shape[2] > 0 and query.numel() > 0
    if query.device.type in MERGING and whole and not (is_causal and query.shape[2] != key.shape[2]):
        arguments = (is_causal, scale, query, key, value, prefix_key, prefix_value, mask)
        return _Merged.run(*arguments)[0]  # type: ignore[no-any-return]
    return _concatenated(query, key, value, prefix_key, prefix_value, mask, is_causal, scale)


def _concatenated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    batch, kv_heads, keys, head_dim = key.shape
    length, queries = prefix_key.shape[-2], query.shape[2]

    def joined(prefix: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((prefix.to(tokens.dtype).expand(batch, kv_heads, length, head_dim), tokens), 2)

    if is_causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        mask = F.pad(seen, (length, 0), value=True)
    elif mask is not None:
        mask = F.pad(mask, (length, 0))
    return F.scaled_dot_product_attention(
        query,
        joined(prefix_key, key),
        joined(prefix_value, value),
        mask,
        scale=scale,
        enable_gqa=query.shape[1] != kv_heads,
    )


class _Merged(Function):
    op = "prefix_attention"

    @staticmethod
    def forward(
        is_causal: bool,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(query):
            tokens, tokens_lse = TokenAttention(query, key, value, mask, is_causal, scale).forward()
            scores = _scores(query, prefix_key, scale)
            prefix_lse = scores.logsumexp(-1)
            lse = torch.logaddexp(tokens_lse, prefix_lse)
            weights = scores.sub_(lse.unsqueeze(-1)).exp_()
            out = _times(weights, prefix_value, query)
            out = torch.addcmul(out, tokens, torch.exp(tokens_lse - lse).unsqueeze(-1), out=torch.empty_like(tokens))
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        is_causal, scale, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.scalars = is_causal, scale

    @staticmethod
    def gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
        query, key, value, prefix_key, prefix_value, mask, out, lse = ctx.saved_tensors
        is_causal, scale = ctx.scalars
        needs = ctx.needs_input_grad[2:7]
        weights = _scores(query, prefix_key, scale).sub_(lse.unsqueeze(-1)).exp_()
        delta = torch.linalg.vecdot(grad_out.float(), out.float()).unsqueeze(-1)
        slopes = _scores(grad_out, prefix_value, 1.0).sub_(delta).mul_(weights)
        grads: list[Tensor | None] = [None] * 5
        if any(needs[:3]):
            tokens = TokenAttention(query, key, value, mask, is_causal, scale)
            of_query, grads[1], grads[2] = tokens.backward(grad_out, out, lse)
            grads[0] = torch.add(of_query, _times(slopes, prefix_key, query), alpha=scale)
        if needs[3]:
            grads[3] = _summed(slopes, query, prefix_key, scale)
        if needs[4]:
            grads[4] = _summed(weights, grad_out, prefix_value, 1.0)
        return None, None, *(grad if need else None for grad, need in zip(grads, needs)), None


def _grouped(heads: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, rows, n] as [batch, kv_heads, group * rows, n]."""
    batch, count, rows, n = heads.shape
    return heads.reshape(batch, kv_heads, count // kv_heads * rows, n)


def _scores(query: Tensor, prefix: Tensor, scale: float) -> Tensor:
    """scale * query @ prefix^T in fp32 [batch, heads, rows, length]."""
    batch, heads, rows, _ = query.shape
    grouped = _grouped(query, prefix.shape[-3])
    if query.device.type == "cuda" and query.dtype != torch.float32:
        own = prefix.to(query.dtype).expand(batch, *prefix.shape[-3:]).flatten(0, 1)
        scores = torch.bmm(grouped.flatten(0, 1), own.transpose(1, 2), out_dtype=torch.float32)
    else:
        scores = grouped.float() @ prefix.to(query.dtype).float().transpose(-1, -2)
    return scores.view(batch, heads, rows, prefix.shape[-2]).mul_(scale)


def _times(weights: Tensor, prefix: Tensor, like: Tensor) -> Tensor:
    """weights @ prefix, in `like`'s dtype, as its heads."""
    batch, heads, rows, _ = weights.shape
    dtype = like.dtype
    product = _grouped(weights, prefix.shape[-3]).to(dtype) @ prefix.to(dtype)
    return product.view(batch, heads, rows, prefix.shape[-1])


def _summed(weights: Tensor, heads: Tensor, prefix: Tensor, scale: float) -> Tensor:
    """scale * weights^T @ heads, summed over what shares the prefix, in its shape and dtype."""
    kv_heads = prefix.shape[-3]
    small, wide = _grouped(weights, kv_heads), _grouped(heads, kv_heads)
    if heads.device.type == "cuda" and heads.dtype != torch.float32:
        narrow = small.to(heads.dtype).flatten(0, 1).transpose(1, 2)
        total = torch.bmm(narrow, wide.flatten(0, 1), out_dtype=torch.float32).view(len(heads), *prefix.shape[-3:])
    else:
        total = small.transpose(2, 3) @ wide.float()
    return (total.sum(0) if prefix.dim() == 3 else total).mul_(scale).to(prefix.dtype)
