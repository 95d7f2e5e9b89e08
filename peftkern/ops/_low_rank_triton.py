"""Triton kernels of a low-rank path: each reads its large operand once, and masks are made where they are needed.

    project      h  = d(x) A^T                       [rows, rank], also dS = dY B
    add_product  y  = base + factor * h B^T + bias   [rows, columns], also dX = base + mask * (dS A)
    reduce       dS = dY B and dB = dY^T h in one pass over dY; dA = dS^T d(x)

Sums over a long axis are split into partials by shape alone and added in order by `sum_partials`: no atomics, and the
same bits on every chip. Ranks run over tiles of up to 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._dropout import keep_scale, threshold
from peftkern.ops._triton import keep_mask, launch, padded_rank, product, rounded

# Enough programs for every multiprocessor of any chip; a constant, so that bits do not depend on the chip.
PROGRAMS = 256
SUMS = 1024
# Terms of `product` for a dtype of x: fp16 has 11 bits, which take two bf16.
PARTS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
# The depth of a tile by `PARTS` and the width in ranks: the most that needs no registers beyond the 255 of sm_80.
PROJECT_DEPTHS = {0: {16: 64, 32: 32, 64: 32}, 2: {16: 128, 32: 64, 64: 32}, 3: {16: 64, 32: 32, 64: 32}}
# Of bf16 and 32 ranks without a mask to make: at 64 the compiler keeps to 128 registers, and spills.
UNMASKED_DEPTH = 128


class Dropout:
    """What regenerates a mask; `seed` is None where nothing is dropped."""

    def __init__(self, dropout_p: float = 0.0, seed: Tensor | None = None, stream: int = 0) -> None:
        self.seed = seed
        self.stream = stream
        self.dropped = 0 if seed is None else threshold(dropout_p)
        self.scale = 1.0 if seed is None else keep_scale(dropout_p)


@triton.jit
def _project(
    partials,
    x,
    right,
    seed,
    rows,
    depth,
    rank,
    x_row,
    x_column,
    right_depth,
    right_rank,
    chunk,
    factor,
    stream,
    dropped,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    first = tl.program_id(1) * chunk
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for start in range(first, tl.minimum(first + chunk, depth), DEPTH):
        column = (start + tl.arange(0, DEPTH)).to(tl.int64)
        in_x = (row[:, None] < rows) & (column[None, :] < depth)
        values = tl.load(x + row[:, None] * x_row + column[None, :] * x_column, mask=in_x, other=0.0).to(tl.float32)
        if seed is not None:
            values = tl.where(keep_mask(row, start, seed, stream, dropped, ROWS, DEPTH), values, 0.0)
        in_right = (column[:, None] < depth) & (ranks[None, :] < rank)
        place = right + column[:, None] * right_depth + ranks[None, :].to(tl.int64) * right_rank
        total = product(values, tl.load(place, mask=in_right, other=0.0).to(tl.float32), total, PARTS)
    place = partials + (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * rank + ranks[None, :]
    tl.store(place, total * factor, mask=(row[:, None] < rows) & (ranks[None, :] < rank))


@triton.jit
def low_rank_tile(
    left,
    right,
    row,
    column,
    rows,
    columns,
    rank,
    left_row,
    right_rank,
    right_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """left @ right [ROWS, COLUMNS] at int64 rows and columns."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = start + tl.arange(0, RANKS)
        in_left = (row[:, None] < rows) & (ranks[None, :] < rank)
        values = tl.load(left + row[:, None] * left_row + ranks[None, :], mask=in_left, other=0.0)
        in_right = (ranks[:, None] < rank) & (column[None, :] < columns)
        place = right + ranks[:, None].to(tl.int64) * right_rank + column[None, :] * right_column
        total = product(values, tl.load(place, mask=in_right, other=0.0).to(tl.float32), total, PARTS)
    return total


@triton.jit
def _add_product(
    out,
    base,
    left,
    right,
    bias,
    seed,
    rows,
    columns,
    rank,
    right_rank,
    right_column,
    bias_stride,
    factor,
    stream,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    total = low_rank_tile(
        left, right, row, column, rows, columns, rank, rank, right_rank, right_column, ROWS, COLUMNS, RANKS, PARTS
    )
    total *= factor
    if seed is not None:
        total = tl.where(keep_mask(row, first, seed, stream, dropped, ROWS, COLUMNS), total, 0.0)
    in_out = (row[:, None] < rows) & (column[None, :] < columns)
    element = row[:, None] * columns + column[None, :]
    total += tl.load(base + element, mask=in_out, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column * bias_stride, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + element, rounded(total, out), mask=in_out)


@triton.jit
def _reduce(
    small_partials,
    grad_partials,
    x,
    small,
    right,
    seed,
    rows,
    columns,
    rank,
    x_row,
    x_column,
    small_row,
    right_column,
    grad_column,
    grad_rank,
    rows_per_program,
    stream,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    column = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    in_factor = (column[:, None] < columns) & (ranks[None, :] < rank)
    if right is not None:
        right_place = right + column[:, None] * right_column + ranks[None, :]
        factors = tl.load(right_place, mask=in_factor, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS, RANKS], tl.float32)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        in_x = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(x + row[:, None] * x_row + column[None, :] * x_column, mask=in_x, other=0.0).to(tl.float32)
        if seed is not None:
            kept = keep_mask(row, first_column, seed, stream, dropped, ROWS, COLUMNS)
            values = tl.where(kept, values, 0.0)
        in_small = (row[:, None] < rows) & (ranks[None, :] < rank)
        if right is not None:
            projected = product(values, factors, tl.zeros([ROWS, RANKS], tl.float32), PARTS)
            small_place = (tl.program_id(0).to(tl.int64) * rows + row[:, None]) * rank + ranks[None, :]
            tl.store(small_partials + small_place, projected, mask=in_small)
        if grad_partials is not None:
            weights = tl.load(small + row[:, None] * small_row + ranks[None, :], mask=in_small, other=0.0)
            total = product(tl.trans(values), weights, total, PARTS)
    if grad_partials is not None:
        grad_place = tl.program_id(1).to(tl.int64) * columns * rank
        grad_place += column[:, None] * grad_column + ranks[None, :].to(tl.int64) * grad_rank
        tl.store(grad_partials + grad_place, total, mask=in_factor)


@triton.jit
def _sum_partials(out, partials, bias, count, elements, columns, bias_stride, factor, SUMS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    total = tl.zeros([SUMS], tl.float32)
    place = partials + element
    for _ in range(count):
        total += tl.load(place, mask=element < elements, other=0.0)
        place += elements
    total *= factor
    if bias is not None:
        total += tl.load(bias + element % columns * bias_stride, mask=element < elements, other=0.0).to(tl.float32)
    tl.store(out + element, rounded(total, out), mask=element < elements)


def as_rows(x: Tensor) -> Tensor:
    """x [..., features] as a matrix, a view where its strides allow one."""
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((x.shape[:-1].numel(), 0))


def sum_partials(
    partials: Tensor, factor: float = 1.0, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor:
    """factor * (partials[0] + partials[1] + ...) + bias, rounded once; bias is as long as the last dimension."""
    if len(partials) == 1 and factor == 1.0 and dtype == torch.float32 and bias is None:
        return partials[0]
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    grid = (triton.cdiv(out.numel(), SUMS),)
    sizes = (len(partials), out.numel(), out.shape[-1], 0 if bias is None else bias.stride(0))
    launch(_sum_partials, grid, out, partials, bias, *sizes, factor, SUMS=SUMS)
    return out


def project(x: Tensor, right: Tensor, dropout: Dropout, factor: float = 1.0) -> Tensor:
    """factor * d(x) @ right: x [rows, depth], right [depth, rank] of any strides; fp32 [rows, rank]."""
    (rows, depth), rank = x.shape, right.shape[1]
    parts, ranks = PARTS[x.dtype], padded_rank(rank)
    tile_rows, tile_depth = 64 if parts else 32, PROJECT_DEPTHS[parts][ranks]
    if parts == 2 and ranks == 32 and dropout.seed is None:
        tile_depth = UNMASKED_DEPTH
    row_tiles = triton.cdiv(rows, tile_rows)
    # At least 4 steps each: a partial costs as much as reading 2 * rank columns of x.
    most = triton.cdiv(depth, 4 * tile_depth)
    chunk = triton.cdiv(triton.cdiv(depth, tile_depth), max(1, min(most, PROGRAMS // max(1, row_tiles)))) * tile_depth
    splits = triton.cdiv(depth, chunk) if depth else 0
    partials = x.new_empty((splits, rows, rank), dtype=torch.float32)
    launch(
        _project,
        (row_tiles, splits, triton.cdiv(rank, ranks)),
        *(partials, x, right, dropout.seed, rows, depth, rank, *x.stride(), *right.stride(), chunk),
        *(factor * dropout.scale, dropout.stream, dropout.dropped),
        ROWS=tile_rows,
        DEPTH=tile_depth,
        RANKS=ranks,
        PARTS=parts,
        num_stages=2,
    )
    return sum_partials(partials)


def add_product(
    base: Tensor,
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    dropout: Dropout,
    factor: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """base + factor * mask * (left @ right) + bias in `dtype`, in base's memory if that is its dtype.

    base [rows, columns] and left [rows, rank] are contiguous, left is fp32; right [rank, columns] has any strides.
    """
    rows, columns = base.shape
    out = base if base.dtype == dtype else base.new_empty(base.shape, dtype=dtype)
    parts = 3 if PARTS[dtype] else 0
    tile_rows, tile_columns = (64, 128) if parts else (32, 64)
    launch(
        _add_product,
        (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)),
        *(out, base, left, right, bias, dropout.seed, rows, columns, left.shape[1], *right.stride()),
        *(0 if bias is None else bias.stride(0), factor * dropout.scale, dropout.stream, dropout.dropped),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANKS=16,
        PARTS=parts,
    )
    return out


def reduce(
    x: Tensor,
    small: Tensor | None,
    right: Tensor | None,
    dropout: Dropout,
    transposed: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Partials of d(x) @ right and of d(x)^T @ small in one pass over x [rows, columns]; None for what is not given.

    small [rows, rank] and right [columns, rank] are contiguous in the rank. The second result is [columns, rank], or
    [rank, columns] if `transposed`. The scale of what is kept is for the caller to apply, in `sum_partials`.
    """
    rows, columns = x.shape
    rank = (right if small is None else small).shape[1]  # type: ignore[union-attr]
    ranks = padded_rank(rank)
    parts = PARTS[x.dtype]
    tile_rows, tile_columns = (64, 256) if ranks == 16 else (32, 128)
    if parts != 2:
        tile_rows, tile_columns = 32, 64 if parts else 32
    column_tiles = triton.cdiv(columns, tile_columns)
    rows_per_program = tile_rows
    while rows_per_program < rows and column_tiles * triton.cdiv(rows, 2 * rows_per_program) >= PROGRAMS:
        rows_per_program *= 2
    ranges = triton.cdiv(rows, rows_per_program)
    shape = (rank, columns) if transposed else (columns, rank)
    small_partials = None if right is None else x.new_empty((column_tiles, rows, rank), dtype=torch.float32)
    grad_partials = None if small is None else x.new_empty((ranges, *shape), dtype=torch.float32)
    launch(
        _reduce,
        (column_tiles, ranges, triton.cdiv(rank, ranks)),
        *(small_partials, grad_partials, x, small, right, dropout.seed, rows, columns, rank, *x.stride()),
        *(0 if small is None else small.stride(0), 0 if right is None else right.stride(0)),
        *((1, columns) if transposed else (rank, 1)),
        *(rows_per_program, dropout.stream, dropout.dropped),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANKS=ranks,
        PARTS=parts,
        num_warps=8,
    )
    return small_partials, grad_partials
