"""prefix_attention: attention with more, trained keys and values (prefix tuning, arXiv 2101.00190; P-tuning v2).

Formula, for each query q, with the tokens' keys and values K, V and the prefix's K_p, V_p:
    o = softmax([s_p, s]) [V_p; V]      s = scale * q K^T + mask      s_p = scale * q K_p^T
On the CPU prefix and tokens are the keys of one flash attention (arXiv 2205.14135) that reads them where they lie:
nothing is concatenated, and keys that no query of a block sees are skipped. With L the log-sum-exp of [s_p, s] and
delta = dy . o, backward has the weights a = e^(s - L), and a_p likewise, and
    dV   = a^T dy      ds   = a   * (dy V^T   - delta)    dK   = scale * ds^T q      dq  = scale * ds K
    dV_p = a_p^T dy    ds_p = a_p * (dy V_p^T - delta)    dK_p = scale * ds_p^T q    dq += scale * ds_p K_p
With bf16 inputs, a CPU that multiplies bf16 rounds a, ds and an fp32 prefix to it; sums are fp32, rounded once.
Saved for backward: query, key, value, prefix, out and L [B, H, T]; the prefix is never repeated over the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch import attention as composed
from peftkern.ops._linear import (
    FLOATING,
    NUMBER,
    accumulate_dtype,
    check_tensor,
    computing_dtype,
    empty_like,
    number,
    oracle,
)
from peftkern.ops._op import NAMESPACES, Op

# No score makes up for such a mask.
_HIDDEN = -1e30


@oracle
def prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`prefix_attention` by concatenation, in plain torch, differentiable: fp32 (float64 for float64), rounded once."""
    compute = accumulate_dtype(query)
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    length = prefix_key.shape[-2]

    def joined(prefix: Tensor, tokens: Tensor) -> Tensor:
        prefix = prefix.to(compute).expand(batch, kv_heads, length, head_dim)
        joint = torch.cat([prefix, tokens.to(compute)], dim=2)
        return joint.repeat_interleave(heads // kv_heads, dim=1) if heads != kv_heads else joint

    scores = query.to(compute) @ joined(prefix_key, key).transpose(2, 3)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=compute, device=query.device).masked_fill(
                ~attn_mask, -torch.inf
            )
        attn_mask = attn_mask.to(compute).expand(*attn_mask.shape[:-2], queries, keys)
        scores = scores + F.pad(attn_mask, (length, 0))
        if length == 0:
            # A query that sees nothing gets zeros, not the NaN of an empty softmax, and gives no gradients.
            sees_nothing = (attn_mask <= _HIDDEN).all(-1, keepdim=True)
            weights = scores.masked_fill(sees_nothing, 0).softmax(-1).masked_fill(sees_nothing, 0)
            return (weights @ joined(prefix_value, value)).to(query.dtype)
    return (scores.softmax(-1) @ joined(prefix_value, value)).to(query.dtype)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention in which every query also sees a prefix of trained keys and values (prefix tuning, arXiv 2101.00190).

    `F.scaled_dot_product_attention` over `[prefix; tokens]`, where the mask is that of the tokens alone and no key or
    value is copied. Without a prefix (length 0) it is attention as such: on the CPU by the same kernels, elsewhere by
    that function.

    Args:
        query: [batch, heads, queries, head_dim] in fp32, bf16 or fp16; float64 on the reference.
        key, value: [batch, kv_heads, keys, head_dim] in query's dtype.
        prefix_key, prefix_value: [kv_heads, length, head_dim], shared by the batch, or [batch, kv_heads, length,
            head_dim]; query's dtype or fp32.
        attn_mask: of the tokens, broadcastable to [batch, heads, queries, keys]: bool (True: takes part) or added to
            the scores. A query that it hides from all tokens attends to the prefix; without one it gets zeros.
        is_causal: query i takes part with tokens 0 to i; not with attn_mask.
        scale: of the scores; 1 / sqrt(head_dim) by default.
        enable_gqa: whether heads may be a multiple of kv_heads, in consecutive groups.
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs. A mask that requires
            grad needs the reference.

    Returns:
        [batch, heads, queries, head_dim] in query's dtype. Differentiable in query, key, value and both prefixes, whose
        gradients are summed over what shares them in fp32.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    op = "prefix_attention"
    scale = number(scale)
    _check(op, query, key, value, prefix_key, prefix_value, attn_mask, is_causal, scale, enable_gqa)
    dtype = computing_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    choice = backends.choose(op, query, backend)
    trained_mask = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if prefix_key.shape[-2] == 0 and choice.implementation not in ("cpu", "reference"):
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
            attn_mask = attn_mask.to(dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if trained_mask and choice.implementation != "reference" and choice.asked:
        name = choice.implementation
        raise RuntimeError(f"{op}: backend {name!r} gives attn_mask no gradient; use backend='reference'")
    if trained_mask or choice.implementation == "reference":
        return prefix_attention_reference(query, key, value, prefix_key, prefix_value, attn_mask, is_causal, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else _additive(attn_mask, (*query.shape[:3], key.shape[2]), dtype)
    if choice.implementation == "torch":
        return composed.prefix_attention(query, key, value, prefix_key, prefix_value, mask, is_causal, scale)
    run = NAMESPACES[choice.implementation].prefix_attention
    return run(query, key, value, prefix_key, prefix_value, mask, is_causal, scale)[0]


def _additive(attn_mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add, finite so that a query without any token has a log-sum-exp near -max, not NaN."""
    if dtype == torch.float16:
        dtype = torch.float32  # 65504 is not yet infinite
    lowest = torch.finfo(dtype).min
    if attn_mask.dtype == torch.bool:
        mask = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill(~attn_mask, lowest)
    else:
        mask = attn_mask.detach().to(dtype).clamp(min=lowest)
    return mask.expand(shape)


def _check(
    op: str,
    query: Any,
    key: Any,
    value: Any,
    prefix_key: Any,
    prefix_value: Any,
    attn_mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
) -> None:
    """Checks every argument of an attention with a prefix."""
    if not isinstance(query, Tensor):
        raise TypeError(f"{op}: query must be a Tensor, got {type(query).__name__}")
    device = query.device
    check_tensor(op, "query", query, FLOATING, device)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(op, name, tensor, (query.dtype,), device)
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        check_tensor(op, name, tensor, tuple(dict.fromkeys((torch.float32, computing_dtype(query)))), device)
    if query.dim() != 4 or query.shape[3] == 0:
        raise ValueError(f"{op}: query must have shape [batch, heads, queries, head_dim], got {list(query.shape)}")
    batch, heads, queries, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != head_dim:
        wanted = f"[{batch}, kv_heads, keys, {head_dim}] (query's batch and head_dim)"
        raise ValueError(f"{op}: key must have shape {wanted}, got {list(key.shape)}")
    kv_heads, keys = key.shape[1], key.shape[2]
    if value.shape != key.shape:
        raise ValueError(f"{op}: value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    if type(enable_gqa) is not bool:
        raise TypeError(f"{op}: enable_gqa must be a bool, got {type(enable_gqa).__name__}")
    if heads != kv_heads and (not enable_gqa or kv_heads == 0 or heads % kv_heads != 0):
        what = f"a multiple of key's {kv_heads}" if enable_gqa else f"key's {kv_heads} (or set enable_gqa)"
        raise ValueError(f"{op}: query's heads must be {what}, got {heads}")
    _check_prefix(op, prefix_key, prefix_value, batch, kv_heads, head_dim)
    if type(is_causal) is not bool:
        raise TypeError(f"{op}: is_causal must be a bool, got {type(is_causal).__name__}")
    if scale is not None and not isinstance(scale, NUMBER):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError(f"{op}: attn_mask must be None with is_causal")
    check_tensor(op, "attn_mask", attn_mask, (torch.bool, *FLOATING), device)
    shape = (batch, heads, queries, keys)
    fits = attn_mask.dim() <= 4 and all(m in (1, n) for m, n in zip(reversed(attn_mask.shape), reversed(shape)))
    if not fits or attn_mask.dim() < 2:
        raise ValueError(f"{op}: attn_mask must be broadcastable to {list(shape)}, got {list(attn_mask.shape)}")


def _check_prefix(op: str, prefix_key: Tensor, prefix_value: Tensor, batch: int, kv_heads: int, head_dim: int) -> None:
    shared = prefix_key.dim() == 3 and prefix_key.shape[0] == kv_heads
    each = prefix_key.dim() == 4 and prefix_key.shape[0] == batch and prefix_key.shape[1] == kv_heads
    if not (shared or each) or prefix_key.shape[-1] != head_dim:
        wanted = f"[{kv_heads}, length, {head_dim}] or [{batch}, {kv_heads}, length, {head_dim}]"
        raise ValueError(f"{op}: prefix_key must have shape {wanted}, got {list(prefix_key.shape)}")
    if prefix_value.shape != prefix_key.shape:
        wanted = f"prefix_key's shape {list(prefix_key.shape)}"
        raise ValueError(f"{op}: prefix_value must have {wanted}, got {list(prefix_value.shape)}")


def _empty_heads(like: Tensor, shape: Any) -> Tensor:
    """[batch, heads, rows, columns], laid out as [batch, rows, heads, columns] like torch's flash attention."""
    batch, heads, rows, columns = shape
    return like.new_empty((batch, rows, heads, columns)).transpose(1, 2)


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    query = call.query
    return _empty_heads(query, query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_backward(call: Any) -> tuple[Tensor, ...]:
    tokens, prefix = (call.query, call.key, call.value), (call.prefix_key, call.prefix_value)
    return (
        *(_empty_heads(t, t.shape) if call.need_tokens else t.new_empty(0) for t in tokens),
        *(empty_like(t, call.need_prefix) for t in prefix),
    )


def _backward(run: Any, call: Any, needs: Any, grad_out: Tensor) -> dict[str, Any]:
    need_tokens, need_prefix = needs.query or needs.key or needs.value, needs.prefix_key or needs.prefix_value
    grads = run(grad_out=grad_out, need_tokens=need_tokens, need_prefix=need_prefix)
    return dict(zip(("query", "key", "value", "prefix_key", "prefix_value"), grads))


_saves = ("query", "key", "value", "prefix_key", "prefix_value", "attn_mask", "out", "lse")
Op("prefix_attention", _fake, _backward, _saves, _fake_backward, triton="prefix_attention_triton")
