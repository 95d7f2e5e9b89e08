"""Products with a small matrix [rows, rank] in Triton: the three passes that adapters make over wide activations.

    down    small = values factor^T        the sum runs over features: h = d(x) A^T, dh = dy B
    up      values = small factor          with everything around it in one pass: y, dx
    outer   factor = values^T small        the sum runs over rows: dB = dy^T h, dA = dh^T d(x)

Sums of more than one program come in parts, added in order by `sum_parts`. Where activations have 16 bits the
products run on tensor cores, fp32 factors in two parts (see `product`); those of fp32 activations are fp32 products.
Masks are those of `_dropout.keep_mask`, stream 0.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._activations_triton import activated
from peftkern.ops._dropout import keep_scale, threshold
from peftkern.ops._linear_triton import rows_per_program, sum_parts
from peftkern.ops._triton import keep_mask, launch, padded_rank, product, rounded

ROWS, OUTER_ROWS, OUTER_COLUMNS = 64, 32, 128
# `down` is cut along the features into no more parts than this, of no fewer than this many features.
MOST_SPLITS, LEAST_DEPTH, ENOUGH_PROGRAMS = 8, 512, 256


class Mask(NamedTuple):
    """The dropout of a pass; none without a seed."""

    seed: Tensor | None
    dropped: int
    scale: float


NO_MASK = Mask(None, 0, 1.0)


def mask_of(dropout_p: float, seed: Tensor | None, like: Tensor) -> Mask:
    """The mask of a seed, on the device of `like`: drawn there it costs no copy, which a CUDA graph could not hold."""
    if seed is None or not threshold(dropout_p):
        return NO_MASK
    return Mask(seed.to(like.device), threshold(dropout_p), keep_scale(dropout_p))


def _parts(dtype: torch.dtype, small: bool) -> int:
    """The terms of `product`: 3 where what is multiplied with the factor, x or a `small` matrix, is wider than bf16."""
    if dtype == torch.float32:
        return 0
    return 2 if dtype == torch.bfloat16 and not small else 3


@triton.jit
def _down(
    values,
    factor,
    small,
    others,
    scaled,
    rest,
    partials,
    factors,
    bias,
    seed,
    dropped,
    keep_scale,
    scale,
    shift,
    rows,
    features,
    rank,
    value_stride,
    other_stride,
    depth_stride,
    rank_stride,
    features_per_split,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    rank_index = tl.program_id(2) * RANK + tl.arange(0, RANK)
    in_rank = rank_index < rank
    # What is not a sum over the rank is stored by the first of its tiles alone.
    stored = tl.where(tl.program_id(2) == 0, features, 0)
    begin = tl.program_id(1) * features_per_split
    total = tl.zeros([ROWS, RANK], tl.float32)
    for start in range(begin, begin + features_per_split, DEPTH):
        column = start + tl.arange(0, DEPTH)
        in_columns = column < features
        inside = in_rows[:, None] & in_columns[None, :]
        value = tl.load(values + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        address = factor + column.to(tl.int64)[:, None] * depth_stride + rank_index.to(tl.int64)[None, :] * rank_stride
        tile = tl.load(address, mask=in_columns[:, None] & in_rank[None, :], other=0.0).to(tl.float32)
        at = row[:, None] * features + column[None, :]
        to_store = in_rows[:, None] & (column < stored)[None, :]
        if factors is not None:
            by = tl.load(factors + column, mask=in_columns, other=0.0)
            tile = tile * by[:, None]
            if scaled is not None:
                tl.store(scaled + at, rounded((by - shift)[None, :] * value, scaled), mask=to_store)
        if partials is not None:
            other = tl.load(others + row[:, None] * other_stride + column[None, :], mask=inside, other=0.0)
            sums = tl.sum(value * other.to(tl.float32), 0)
            tl.store(partials + tl.program_id(0).to(tl.int64) * features + column, sums, mask=column < stored)
        if seed is not None:
            keep = keep_mask(row, start, seed, 0, dropped, ROWS, DEPTH)
            if scaled is not None:
                kept = tl.where(keep, value * keep_scale, 0.0)
                tl.store(scaled + at, rounded(kept, scaled), mask=to_store)
                tl.store(rest + at, rounded(value - kept, rest), mask=to_store)
            value = tl.where(keep, value, 0.0)
        total = product(value, tile, total, PARTS)
    total = total * scale
    if bias is not None:
        total += tl.load(bias + rank_index, mask=rank_index < tl.where(begin == 0, rank, 0), other=0.0).to(tl.float32)[
            None, :
        ]
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * rank + rank_index[None, :]
    tl.store(small + at, total, mask=in_rows[:, None] & in_rank[None, :])


class Down(NamedTuple):
    """What a pass over values [rows, features] gives, None where it was not asked for."""

    small: Tensor  # [rows, rank], fp32
    scaled: Any  # values times (factors - shift), or with the mask what is kept of them
    rest: Any  # values less what is kept
    partials: Any  # [parts, features]: parts of the sum of values * others


def down(
    values: Tensor,
    factor: Tensor,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    bias: Tensor | None = None,
    *,
    factors: Tensor | None = None,
    shift: float = 0.0,
    others: Tensor | None = None,
    need_scaled: bool = False,
) -> Down:
    """scale * masked(values) @ (factors * factor) + bias, for a factor [features, rank] of any strides."""
    (rows, features), rank = values.shape, factor.shape[1]
    row_tiles, width = triton.cdiv(rows, ROWS), padded_rank(rank)
    rank_tiles, splits = max(1, triton.cdiv(rank, width)), 1
    programs = row_tiles * rank_tiles
    while splits < MOST_SPLITS and features >= 2 * splits * LEAST_DEPTH and programs * splits < ENOUGH_PROGRAMS:
        splits *= 2
    wide = values.dtype == torch.float32
    depth = 32 if wide or (width > 32 and (need_scaled or others is not None)) else 64
    small = values.new_empty((splits, rows, rank), dtype=torch.float32)
    scaled = values.new_empty((rows, features)) if need_scaled else None
    rest = values.new_empty((rows, features)) if need_scaled and mask.seed is not None else None
    partials = None if others is None else small.new_empty((row_tiles, features))
    launch(
        _down,
        (row_tiles, splits, rank_tiles),
        values,
        factor,
        small,
        others,
        scaled,
        rest,
        partials,
        factors,
        bias,
        *mask,
        scale * mask.scale,
        shift,
        rows,
        features,
        rank,
        values.stride(0),
        0 if others is None else others.stride(0),
        *factor.stride(),
        triton.cdiv(triton.cdiv(features, splits), depth) * depth,
        num_warps=8 if width > 32 else 4,
        num_stages=1 if mask.seed is not None or depth == 32 else 3,
        ROWS=ROWS,
        DEPTH=depth,
        RANK=width,
        PARTS=_parts(values.dtype, small=False),
    )
    total = small[0] if splits == 1 else sum_parts(small, small.new_empty((rows, rank)))
    return Down(total, scaled, rest, partials)


@triton.jit
def _up(
    small,
    factor,
    out,
    unscaled,
    inner,
    outer,
    factors,
    bias,
    seed,
    dropped,
    keep_scale,
    scale,
    rows,
    features,
    rank,
    rank_stride,
    column_stride,
    outer_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows, column < features
    inside = in_rows[:, None] & in_columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANK):
        rank_index = start + tl.arange(0, RANK).to(tl.int64)
        in_rank = rank_index < rank
        address = small + row[:, None] * rank + rank_index[None, :]
        left = tl.load(address, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        address = factor + rank_index[:, None] * rank_stride + column.to(tl.int64)[None, :] * column_stride
        right = tl.load(address, mask=in_rank[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        total = product(activated(left, ACTIVATION), right, total, PARTS)
    total = total * scale
    at = row[:, None] * features + column[None, :]
    if inner is not None:
        total += tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    if unscaled is not None:
        tl.store(unscaled + at, rounded(total, unscaled), mask=inside)
    if factors is not None:
        total = total * tl.load(factors + column, mask=in_columns, other=0.0)[None, :]
    if seed is not None:
        keep = keep_mask(row, first_column, seed, 0, dropped, ROWS, COLUMNS)
        total = tl.where(keep, total * keep_scale, 0.0)
    if outer is not None:
        address = outer + row[:, None] * outer_stride + column[None, :]
        total += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, rounded(total, out), mask=inside)


def up(
    small: Tensor,
    factor: Tensor,
    out: Tensor,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    bias: Tensor | None = None,
    *,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    factors: Tensor | None = None,
    unscaled: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Writes masked(factors * u) + outer + bias into `out` [rows, features]; u = scale * f(small) @ factor + inner.

    `unscaled` gets u. `inner` and `unscaled` are contiguous; `inner` or `outer` may be `out` itself.
    """
    rows, features = out.shape
    width = padded_rank(small.shape[1])
    wide = out.dtype == torch.float32
    columns = 64 if wide or mask.seed is not None else 128
    launch(
        _up,
        (triton.cdiv(rows, ROWS), triton.cdiv(features, columns)),
        small,
        factor,
        out,
        unscaled,
        inner,
        outer,
        factors,
        bias,
        *mask,
        scale,
        rows,
        features,
        small.shape[1],
        *factor.stride(),
        0 if outer is None else outer.stride(0),
        num_warps=8 if columns == 128 else 4,
        ROWS=ROWS,
        COLUMNS=columns,
        RANK=min(width, 16 if wide else 32),
        PARTS=_parts(out.dtype, small=True),
        ACTIVATION=activation,
    )
    return out


@triton.jit
def _outer(
    values,
    small,
    partials,
    factors,
    seed,
    dropped,
    scale,
    rows,
    features,
    rank,
    value_stride,
    rows_per_program,
    column_stride,
    rank_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    in_columns = column < features
    rank_index = tl.program_id(2) * RANK + tl.arange(0, RANK)
    in_rank = rank_index < rank
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        in_rows = row < rows
        inside = in_rows[:, None] & in_columns[None, :]
        value = tl.load(values + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            value = tl.where(keep_mask(row, first_column, seed, 0, dropped, ROWS, COLUMNS), value, 0.0)
        address = small + row[:, None] * rank + rank_index[None, :]
        right = tl.load(address, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        total = product(tl.trans(value), activated(right, ACTIVATION), total, PARTS)
    total = total * scale
    if factors is not None:
        total = total * tl.load(factors + column, mask=in_columns, other=0.0)[:, None]
    at = tl.program_id(0).to(tl.int64) * features * rank
    at += column.to(tl.int64)[:, None] * column_stride + rank_index.to(tl.int64)[None, :] * rank_stride
    tl.store(partials + at, total, mask=in_columns[:, None] & in_rank[None, :])


def outer(
    values: Tensor,
    small: Tensor,
    like: Tensor,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    *,
    factors: Tensor | None = None,
    activation: str = "",
    transposed: bool = False,
) -> Tensor:
    """scale * factors * (masked(values)^T @ f(small)), [features, rank] or, transposed, [rank, features], as `like`."""
    (rows, features), rank = values.shape, small.shape[1]
    wide = values.dtype == torch.float32
    width = padded_rank(rank, 32 if wide else 64)
    per_program = rows_per_program(rows, features, OUTER_COLUMNS, 128, ENOUGH_PROGRAMS)
    parts = triton.cdiv(rows, per_program)
    partials = small.new_empty((parts, *like.shape))
    launch(
        _outer,
        (parts, triton.cdiv(features, OUTER_COLUMNS), triton.cdiv(rank, width)),
        values,
        small,
        partials,
        factors,
        *mask[:2],
        scale * mask.scale,
        rows,
        features,
        rank,
        values.stride(0),
        per_program,
        *((1, features) if transposed else (rank, 1)),
        num_warps=8 if width > 32 else 4,
        num_stages=1 if mask.seed is not None or wide else 2,
        ROWS=16 if wide else OUTER_ROWS,
        COLUMNS=OUTER_COLUMNS,
        RANK=width,
        PARTS=_parts(values.dtype, small=False),
        ACTIVATION=activation,
    )
    return sum_parts(partials, like.new_empty(like.shape))
