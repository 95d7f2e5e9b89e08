"""prefix_attention in Triton: torch's attention over the tokens, and kernels for the prefix and the merge.

Forward, one pass over the queries goes on where the tokens' softmax ended: their output is a value whose score is their
log-sum-exp. Backward, torch's kernel gives the tokens' gradients from the joint output and log-sum-exp, one pass adds
the prefix's part to the queries' and one makes the prefix's own, in partials that are added in order. Logarithms are
natural. A prefix may have any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.engines.token_attention import TokenAttention
from peftkern.ops._reduce_triton import sum_parts
from peftkern.ops._triton import PROGRAMS, dot_operand, launch, rounded

# More does not fit the registers and shared memory that all of the chips have.
LONGEST_HEADS = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


@triton.jit
def rows_at(base, row, column, in_rows, head_dim, row_stride):
    """A tile of fp32 [rows, columns] at int64 offsets of rows; zeros beyond the head."""
    inside = in_rows[:, None] & (column[None, :] < head_dim)
    return tl.load(base + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def multiplied(left, right, total, like):
    """total + left @ right, of operands rounded to the dtype that `like` points to, as torch's attention has them."""
    return tl.dot(dot_operand(left, like), dot_operand(right, like), total, input_precision="ieee")


@triton.jit
def tile_of(heads, row_tiles, ROWS: tl.constexpr):
    """The batch, the head and the int64 rows of a program whose number counts tiles of rows, heads and batches."""
    head = tl.program_id(0).to(tl.int64) // row_tiles
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return head // heads, head % heads, row


@triton.jit
def _merge(
    out,
    lse,
    query,
    prefix_key,
    prefix_value,
    tokens,
    tokens_lse,
    heads,
    kv_heads,
    queries,
    length,
    head_dim,
    row_tiles,
    out_batch,
    out_head,
    out_row,
    query_batch,
    query_head,
    query_row,
    prefix_batch,
    tokens_batch,
    tokens_head,
    tokens_row,
    lse_batch,
    lse_head,
    lse_row,
    scale,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    batch, head, row = tile_of(heads, row_tiles, ROWS)
    in_rows = row < queries
    column = tl.arange(0, HEAD)
    values = rows_at(query + batch * query_batch + head * query_head, row, column, in_rows, head_dim, query_row)
    if tokens is None:
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, HEAD], tl.float32)
    else:
        place = tokens_lse + batch * lse_batch + head * lse_head + row * lse_row
        most = tl.load(place, mask=in_rows, other=0.0)
        total = tl.full([ROWS], 1.0, tl.float32)
        base = tokens + batch * tokens_batch + head * tokens_head
        sums = rows_at(base, row, column, in_rows, head_dim, tokens_row)
    prefix = batch * prefix_batch + head // (heads // kv_heads) * length * head_dim
    for start in range(0, length, LENGTH):
        position = (start + tl.arange(0, LENGTH)).to(tl.int64)
        in_prefix = position < length
        keys = rows_at(prefix_key + prefix, position, column, in_prefix, head_dim, head_dim)
        scores = multiplied(values, tl.trans(keys), tl.zeros([ROWS, LENGTH], tl.float32), query) * scale
        scores = tl.where(in_prefix[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        total = total * kept + tl.sum(weights, 1)
        loaded = rows_at(prefix_value + prefix, position, column, in_prefix, head_dim, head_dim)
        sums = multiplied(weights, loaded, sums * kept[:, None], query)
        most = now
    inside = in_rows[:, None] & (column[None, :] < head_dim)
    place = out + batch * out_batch + head * out_head + row[:, None] * out_row + column[None, :]
    tl.store(place, rounded(sums / total[:, None], out), mask=inside)
    place = (batch * heads + head) * queries + row
    tl.store(lse + place, most + tl.log(total), mask=in_rows)


@triton.jit
def _add_grad_query(
    grad_query,
    tokens,
    grad_out,
    query,
    prefix_key,
    prefix_value,
    out,
    lse,
    heads,
    kv_heads,
    queries,
    length,
    head_dim,
    row_tiles,
    grad_batch,
    grad_head,
    grad_row,
    tokens_batch,
    tokens_head,
    tokens_row,
    grad_out_batch,
    grad_out_head,
    grad_out_row,
    query_batch,
    query_head,
    query_row,
    out_batch,
    out_head,
    out_row,
    prefix_batch,
    scale,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    batch, head, row = tile_of(heads, row_tiles, ROWS)
    in_rows = row < queries
    column = tl.arange(0, HEAD)
    values = rows_at(query + batch * query_batch + head * query_head, row, column, in_rows, head_dim, query_row)
    base = grad_out + batch * grad_out_batch + head * grad_out_head
    grads = rows_at(base, row, column, in_rows, head_dim, grad_out_row)
    delta = tl.sum(
        grads * rows_at(out + batch * out_batch + head * out_head, row, column, in_rows, head_dim, out_row), 1
    )
    joint = tl.load(lse + (batch * heads + head) * queries + row, mask=in_rows, other=0.0)
    prefix = batch * prefix_batch + head // (heads // kv_heads) * length * head_dim
    sums = tl.zeros([ROWS, HEAD], tl.float32)
    for start in range(0, length, LENGTH):
        position = (start + tl.arange(0, LENGTH)).to(tl.int64)
        in_prefix = position < length
        keys = rows_at(prefix_key + prefix, position, column, in_prefix, head_dim, head_dim)
        scores = multiplied(values, tl.trans(keys), tl.zeros([ROWS, LENGTH], tl.float32), query) * scale
        weights = tl.exp(tl.where(in_prefix[None, :], scores, float("-inf")) - joint[:, None])
        loaded = rows_at(prefix_value + prefix, position, column, in_prefix, head_dim, head_dim)
        slopes = multiplied(grads, tl.trans(loaded), tl.zeros([ROWS, LENGTH], tl.float32), query)
        sums = multiplied(weights * (slopes - delta[:, None]), keys, sums, query)
    sums *= scale
    if tokens is not None:
        base = tokens + batch * tokens_batch + head * tokens_head
        sums += rows_at(base, row, column, in_rows, head_dim, tokens_row)
    inside = in_rows[:, None] & (column[None, :] < head_dim)
    place = grad_query + batch * grad_batch + head * grad_head + row[:, None] * grad_row + column[None, :]
    tl.store(place, rounded(sums, grad_query), mask=inside)


@triton.jit
def _grad_prefix(
    key_partials,
    value_partials,
    grad_out,
    query,
    prefix_key,
    prefix_value,
    out,
    lse,
    heads,
    kv_heads,
    queries,
    length,
    head_dim,
    owners,
    rows,
    rows_per_program,
    grad_out_batch,
    grad_out_head,
    grad_out_row,
    query_batch,
    query_head,
    query_row,
    out_batch,
    out_head,
    out_row,
    scale,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    HEAD: tl.constexpr,
):
    owner = tl.program_id(0).to(tl.int64) % owners
    chunk = tl.program_id(0).to(tl.int64) // owners
    group = heads // kv_heads
    column = tl.arange(0, HEAD)
    position = (tl.program_id(1) * LENGTH + tl.arange(0, LENGTH)).to(tl.int64)
    in_prefix = position < length
    prefix = owner * length * head_dim
    keys = rows_at(prefix_key + prefix, position, column, in_prefix, head_dim, head_dim)
    loaded = rows_at(prefix_value + prefix, position, column, in_prefix, head_dim, head_dim)
    key_sums = tl.zeros([LENGTH, HEAD], tl.float32)
    value_sums = tl.zeros([LENGTH, HEAD], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        # Every query that this prefix has: of the heads of its group, and of all of the batch that shares it.
        index = chunk * rows_per_program + start + tl.arange(0, ROWS)
        in_rows = index < rows
        row = index % queries
        head = index // queries % group + owner % kv_heads * group
        batch = index // queries // group + owner // kv_heads
        place = batch * query_batch + head * query_head + row * query_row
        values = rows_at(query, place, column, in_rows, head_dim, 1)
        place = batch * grad_out_batch + head * grad_out_head + row * grad_out_row
        grads = rows_at(grad_out, place, column, in_rows, head_dim, 1)
        place = batch * out_batch + head * out_head + row * out_row
        delta = tl.sum(grads * rows_at(out, place, column, in_rows, head_dim, 1), 1)
        joint = tl.load(lse + (batch * heads + head) * queries + row, mask=in_rows, other=float("inf"))
        scores = multiplied(values, tl.trans(keys), tl.zeros([ROWS, LENGTH], tl.float32), query) * scale
        weights = tl.exp(tl.where(in_prefix[None, :], scores, float("-inf")) - joint[:, None])
        slopes = multiplied(grads, tl.trans(loaded), tl.zeros([ROWS, LENGTH], tl.float32), query)
        value_sums = multiplied(tl.trans(weights), grads, value_sums, query)
        key_sums = multiplied(tl.trans(weights * (slopes - delta[:, None])), values, key_sums, query)
    inside = in_prefix[:, None] & (column[None, :] < head_dim)
    place = ((chunk * owners + owner) * length + position[:, None]) * head_dim + column[None, :]
    tl.store(key_partials + place, key_sums, mask=inside)
    tl.store(value_partials + place, value_sums, mask=inside)


def _dense(heads: Tensor) -> Tensor:
    """The last dimension, as the kernels read it."""
    return heads if heads.stride(3) == 1 else heads.contiguous()


def _empty_heads(like: Tensor) -> Tensor:
    """Laid out as [batch, rows, heads, columns], like torch's flash attention."""
    batch, heads, rows, columns = like.shape
    return like.new_empty((batch, rows, heads, columns)).transpose(1, 2)


def _tiles(query: Tensor, length: int) -> dict[str, int]:
    head = max(16, triton.next_power_of_2(query.shape[3]))
    if query.dtype == torch.float32:
        rows, prefix, warps = (16, 16, 8) if head > 64 else (32, 16, 4)
    else:
        rows, prefix, warps = {256: (16, 16, 8), 128: (32, 32, 8)}.get(head, (64, 32, 4))
    return {"ROWS": rows, "LENGTH": min(prefix, 16 if length <= 16 else 32), "HEAD": head, "num_warps": warps}


def _check(query: Tensor) -> None:
    longest = LONGEST_HEADS[query.dtype]
    if query.shape[3] > longest:
        raise RuntimeError(
            f"prefix_attention: backend 'triton' takes a head_dim up to {longest} in {query.dtype}, "
            f"got {query.shape[3]}; use backend='reference'"
        )


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    _check(query)
    batch, heads, queries, head_dim = query.shape
    out, lse = _empty_heads(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if not out.numel():
        return out, lse
    tokens = tokens_lse = None
    strides: tuple[int, ...] = (0,) * 6
    if key.shape[2]:
        tokens, tokens_lse = TokenAttention(query, key, value, attn_mask, is_causal, scale).forward()
        tokens = _dense(tokens)
        strides = (*tokens.stride()[:3], *tokens_lse.stride())
    query, prefix_key, prefix_value = _dense(query), prefix_key.contiguous(), prefix_value.contiguous()
    length = prefix_key.shape[-2]
    tiles = _tiles(query, length)
    row_tiles = triton.cdiv(queries, tiles["ROWS"])
    launch(
        _merge,
        (batch * heads * row_tiles,),
        *(out, lse, query, prefix_key, prefix_value, tokens, tokens_lse),
        *(heads, key.shape[1], queries, length, head_dim, row_tiles, *out.stride()[:3], *query.stride()[:3]),
        *(prefix_key.stride(0) if prefix_key.dim() == 4 else 0, *strides, scale),
        **tiles,
    )
    return out, lse


def prefix_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    need_tokens: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`. Gradients that are not needed are empty."""
    grads = [_empty_heads(t) if need_tokens else t.new_empty(0) for t in (query, key, value)]
    grad_prefix = [t.new_zeros(t.shape if need_prefix else (0,)) for t in (prefix_key, prefix_value)]
    if not query.numel():
        return (*(grad.zero_() for grad in grads), *grad_prefix)  # type: ignore[return-value]
    dense_query, grad_out, out, lse = _dense(query), _dense(grad_out), _dense(out), lse.contiguous()
    keys, values = prefix_key.contiguous(), prefix_value.contiguous()
    batch, heads, queries, head_dim = query.shape
    kv_heads, length = prefix_key.shape[-3:-1]
    tiles = _tiles(query, length)
    inputs = (grad_out, dense_query, keys, values, out, lse)
    sizes = (heads, kv_heads, queries, length, head_dim)
    strides = (*grad_out.stride()[:3], *dense_query.stride()[:3], *out.stride()[:3])
    if need_tokens:
        tokens = None
        if key.shape[2]:
            attention = TokenAttention(query, key, value, attn_mask, is_causal, scale)
            tokens, *of_tokens = attention.backward(grad_out, out, lse)
            tokens = _dense(tokens)
            for grad, part in zip(grads[1:], of_tokens):
                grad.copy_(part)
        row_tiles = triton.cdiv(queries, tiles["ROWS"])
        launch(
            _add_grad_query,
            (batch * heads * row_tiles,),
            *(grads[0], tokens, *inputs, *sizes, row_tiles, *grads[0].stride()[:3]),
            *((0,) * 3 if tokens is None else tokens.stride()[:3]),
            *(*strides, keys.stride(0) if keys.dim() == 4 else 0, scale),
            **tiles,
        )
    if need_prefix:
        owners = kv_heads if keys.dim() == 3 else batch * kv_heads
        rows = batch * heads * queries // owners
        length_tiles, rows_per_program = triton.cdiv(length, tiles["LENGTH"]), tiles["ROWS"]
        programs = owners * length_tiles
        while rows_per_program < rows and programs * triton.cdiv(rows, 2 * rows_per_program) >= PROGRAMS:
            rows_per_program *= 2
        chunks = triton.cdiv(rows, rows_per_program)
        partials = [query.new_empty((chunks, *keys.shape), dtype=torch.float32) for _ in range(2)]
        launch(
            _grad_prefix,
            (owners * chunks, length_tiles),
            *(*partials, *inputs, *sizes, owners, rows, rows_per_program, *strides, scale),
            **tiles,
        )
        factors = (scale, 1.0)
        grad_prefix = [sum_parts(p, f, dtype=t.dtype) for p, f, t in zip(partials, factors, (prefix_key, prefix_value))]
    return (*grads, *grad_prefix)  # type: ignore[return-value]


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    for dtype, head_dim, length, shared in (
        (torch.bfloat16, 64, 20, True),
        (torch.bfloat16, 128, 16, True),
        (torch.float16, 128, 64, False),
        (torch.bfloat16, 256, 64, True),
        (torch.float32, 64, 20, True),
        (torch.float32, 128, 20, True),
    ):
        query = torch.empty(4, 2048, 32, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        key = torch.empty(4, 2048, 8, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        prefix = torch.empty(*(() if shared else (4,)), 8, length, head_dim, device="meta")
        inputs = (query, key, key, prefix, prefix, None)
        out, lse = prefix_attention(*inputs, True, 0.125)
        prefix_attention_backward(query, *inputs, out, lse, True, 0.125, True, True)
