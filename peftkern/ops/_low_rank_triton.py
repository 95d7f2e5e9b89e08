"""Low-rank products in Triton: the passes that adapters make over wide activations, each with all that is beside it.

    down         small = masked(x) factor               sums over columns: h = d(x) A^T, dh = dy B
    up           out = masked(small factor) + ...       y, dx, of one adapter or of several
    reduce       factor = masked(x)^T small             sums over rows, see `_reduce_triton`: dB, dA

Ranks run over tiles of up to 64. Masks are made where they are needed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._activations_triton import activated
from peftkern.ops._reduce_triton import sum_parts
from peftkern.ops._triton import NO_MASK, PARTS, PROGRAMS, Mask, keep_mask, launch, padded_rank, product, rounded

# The depth of a tile of `down` by `PARTS` and the width in ranks: the most that keeps to the 255 registers of sm_80.
DEPTHS = {0: {16: 64, 32: 32, 64: 32}, 2: {16: 128, 32: 64, 64: 32}, 3: {16: 64, 32: 32, 64: 32}}
# Of bf16 and 32 ranks without a mask to make: at 64 the compiler keeps to 128 registers, and spills.
UNMASKED_DEPTH = 128


@triton.jit
def _down(
    small,
    x,
    factor,
    others,
    scaled,
    rest,
    sums,
    scales,
    bias,
    seed,
    rows,
    columns,
    rank,
    x_row,
    other_row,
    factor_column,
    factor_rank,
    chunk,
    scale,
    shift,
    keep_scale,
    dropped,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    # What is not a sum over the columns is stored by the first tile of ranks alone.
    stored = tl.where(tl.program_id(2) == 0, columns, 0)
    first = tl.program_id(1) * chunk
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for start in range(first, tl.minimum(first + chunk, columns), DEPTH):
        column = start + tl.arange(0, DEPTH)
        in_x = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(x + row[:, None] * x_row + column[None, :], mask=in_x, other=0.0).to(tl.float32)
        in_factor = (column[:, None] < columns) & (ranks[None, :] < rank)
        place = factor + column[:, None].to(tl.int64) * factor_column + ranks[None, :].to(tl.int64) * factor_rank
        factors = tl.load(place, mask=in_factor, other=0.0).to(tl.float32)
        element = row[:, None] * columns + column[None, :]
        to_store = (row[:, None] < rows) & (column[None, :] < stored)
        if scales is not None:
            by = tl.load(scales + column, mask=column < columns, other=0.0)
            factors = factors * by[:, None]
            if scaled is not None:
                tl.store(scaled + element, rounded((by - shift)[None, :] * values, scaled), mask=to_store)
        if sums is not None:
            other = tl.load(others + row[:, None] * other_row + column[None, :], mask=in_x, other=0.0).to(tl.float32)
            place = sums + tl.program_id(0).to(tl.int64) * columns + column
            tl.store(place, tl.sum(values * other, 0), mask=column < stored)
        if seed is not None:
            keep = keep_mask(row, start, seed, 0, dropped, ROWS, DEPTH)
            if rest is not None:
                kept = tl.where(keep, values * keep_scale, 0.0)
                tl.store(scaled + element, rounded(kept, scaled), mask=to_store)
                tl.store(rest + element, rounded(values - kept, rest), mask=to_store)
            values = tl.where(keep, values, 0.0)
        total = product(values, factors, total, PARTS)
    total *= scale
    if bias is not None:
        total += tl.load(bias + ranks, mask=ranks < tl.where(first == 0, rank, 0), other=0.0).to(tl.float32)[None, :]
    place = small + (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * rank + ranks[None, :]
    tl.store(place, total, mask=(row[:, None] < rows) & (ranks[None, :] < rank))


class Down(NamedTuple):
    """What a pass over x [rows, columns] gives, None where it was not asked for."""

    small: Tensor  # [rows, rank], fp32
    scaled: Any  # x times (scales - shift), or with a mask what is kept of x
    rest: Any  # x less what is kept
    sums: Any  # [parts, columns]: of x * others over the rows


def down(
    x: Tensor,
    factor: Tensor,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    shift: float = 0.0,
    others: Tensor | None = None,
    need_scaled: bool = False,
) -> Down:
    """scale * masked(x) @ (scales * factor) + bias, for a factor [columns, rank] of any strides."""
    (rows, columns), rank = x.shape, factor.shape[1]
    parts, ranks = PARTS[x.dtype], padded_rank(rank)
    tile_rows, depth = 64 if parts else 32, DEPTHS[parts][ranks]
    stores = need_scaled or others is not None
    if parts == 2 and ranks == 32 and mask.seed is None and not stores:
        depth = UNMASKED_DEPTH
    if stores:
        depth = min(depth, 64)
    row_tiles = triton.cdiv(rows, tile_rows)
    # At least 4 steps each: a part costs as much as reading 2 * rank columns of x.
    steps = triton.cdiv(columns, depth)
    chunk = triton.cdiv(steps, max(1, min(triton.cdiv(steps, 4), PROGRAMS // max(1, row_tiles)))) * depth
    splits = triton.cdiv(columns, chunk) if columns else 0
    small = x.new_empty((splits, rows, rank), dtype=torch.float32)
    scaled = torch.empty_like(x, memory_format=torch.contiguous_format) if need_scaled else None
    rest = None if mask.seed is None or scaled is None else torch.empty_like(scaled)
    sums = None if others is None else x.new_empty((row_tiles, columns), dtype=torch.float32)
    launch(
        _down,
        (row_tiles, splits, triton.cdiv(rank, ranks)),
        *(small, x, factor, others, scaled, rest, sums, scales, bias, mask.seed, rows, columns, rank, x.stride(0)),
        *(0 if others is None else others.stride(0), *factor.stride(), chunk),
        *(scale * mask.scale, shift, mask.scale, mask.dropped),
        ROWS=tile_rows,
        DEPTH=depth,
        RANKS=ranks,
        PARTS=parts,
        num_warps=8 if stores else 4,
        num_stages=1 if stores else 2,
    )
    return Down(sum_parts(small), scaled, rest, sums)


@triton.jit
def low_rank_tile(
    small,
    factor,
    row,
    column,
    rows,
    columns,
    rank,
    small_row,
    small_rank,
    factor_rank,
    factor_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """f(small) @ factor [ROWS, COLUMNS] at int64 rows and columns."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        in_small = (row[:, None] < rows) & (ranks[None, :] < rank)
        place = small + row[:, None] * small_row + ranks[None, :].to(tl.int64) * small_rank
        values = tl.load(place, mask=in_small, other=0.0).to(tl.float32)
        in_factor = (ranks[:, None] < rank) & (column[None, :] < columns)
        place = factor + ranks[:, None].to(tl.int64) * factor_rank + column[None, :] * factor_column
        factors = tl.load(place, mask=in_factor, other=0.0).to(tl.float32)
        total = product(activated(values, ACTIVATION), factors, total, PARTS)
    return total


@triton.jit
def _up(
    out,
    small,
    factor,
    unscaled,
    inner,
    outer,
    scales,
    bias,
    seeds,
    rows,
    columns,
    rank,
    adapters,
    small_row,
    factor_rank,
    factor_column,
    outer_row,
    scale,
    keep_scale,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    in_columns = column < columns
    in_out = (row[:, None] < rows) & in_columns[None, :]
    element = row[:, None] * columns + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for adapter in range(adapters):
        ranks = tl.cast(adapter, tl.int64) * rank
        part = low_rank_tile(
            small + ranks,
            factor + ranks * factor_rank,
            row,
            column,
            rows,
            columns,
            rank,
            small_row,
            1,
            factor_rank,
            factor_column,
            ROWS,
            COLUMNS,
            RANKS,
            PARTS,
            ACTIVATION,
        )
        part = part * scale
        if inner is not None:
            part += tl.load(inner + element, mask=in_out, other=0.0).to(tl.float32)
        if unscaled is not None:
            tl.store(unscaled + element, rounded(part, unscaled), mask=in_out)
        if scales is not None:
            part = part * tl.load(scales + column, mask=in_columns, other=0.0)[None, :]
        if seeds is not None:
            keep = keep_mask(row, first, seeds + adapter, 0, dropped, ROWS, COLUMNS)
            part = tl.where(keep, part * keep_scale, 0.0)
        total += part
    if outer is not None:
        total += tl.load(outer + row[:, None] * outer_row + column[None, :], mask=in_out, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + element, rounded(total, out), mask=in_out)


def up(
    small: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    bias: Tensor | None = None,
    *,
    adapters: int = 1,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    unscaled: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """masked(scales * u) + outer + bias [rows, columns] in `dtype`; u = scale * f(small) @ factor + inner.

    `unscaled` gets u. Without `out` the result is in the memory of `outer`, or else of `inner`, if that has its dtype;
    all three are contiguous but for a given `out`'s `outer`. Several adapters lie side by side in small, one below the
    other in factor, each with a seed of the mask, and their parts are added: of `inner` and `unscaled` there is one.
    """
    base = inner if outer is None else outer
    if out is None:
        assert base is not None
        out = base if base.dtype == dtype else torch.empty_like(base, dtype=dtype)
    rows, columns = out.shape
    tile_rows, tile_columns = (64, 128) if PARTS[dtype] else (32, 64)
    launch(
        _up,
        (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)),
        *(out, small, factor, unscaled, inner, outer, scales, None if bias is None else bias.contiguous(), mask.seed),
        *(rows, columns, len(factor) // adapters, adapters, small.stride(0), *factor.stride()),
        *(0 if outer is None else outer.stride(0), scale, mask.scale, mask.dropped),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANKS=16,
        PARTS=3 if PARTS[dtype] else 0,
        ACTIVATION=activation,
        num_warps=8 if PARTS[dtype] else 4,
    )
    return out
