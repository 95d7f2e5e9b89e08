"""Sums over the rows of wide activations in Triton, and the sums of parts that other kernels leave.

Sums over a long axis come in parts, split by shape alone and added in order by `sum_parts`: no atomics, and the same
bits on every chip.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._activations_triton import activated
from peftkern.ops._triton import NO_MASK, PARTS, PROGRAMS, Mask, keep_mask, launch, padded_rank, product, rounded

# What one program of `sum_parts` adds: few parts of many elements, or many of few.
FEW_PARTS = 8
SUMS = 2048


@triton.jit
def _reduce(
    small_parts,
    grad_parts,
    x,
    small,
    factor,
    scales,
    seed,
    rows,
    columns,
    rank,
    width,
    x_row,
    small_row,
    grad_column,
    grad_rank,
    rows_per_program,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    column = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    in_factor = (column[:, None] < columns) & (ranks[None, :] < width)
    if factor is not None:
        factors = tl.load(factor + column[:, None] * width + ranks[None, :], mask=in_factor, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS, RANKS], tl.float32)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        in_x = (row[:, None] < rows) & (column[None, :] < columns)
        values = tl.load(x + row[:, None] * x_row + column[None, :], mask=in_x, other=0.0).to(tl.float32)
        if seed is not None:
            keep = keep_mask(row, first_column, seed, 0, dropped, ROWS, COLUMNS)
            values = tl.where(keep, values, 0.0)
        if factor is not None:
            projected = product(values, factors, tl.zeros([ROWS, RANKS], tl.float32), PARTS)
            place = small_parts + (tl.program_id(0).to(tl.int64) * rows + row[:, None]) * width + ranks[None, :]
            tl.store(place, projected, mask=(row[:, None] < rows) & (ranks[None, :] < width))
        if grad_parts is not None:
            in_small = (row[:, None] < rows) & (ranks[None, :] < rank)
            right = tl.load(small + row[:, None] * small_row + ranks[None, :], mask=in_small, other=0.0)
            total = product(tl.trans(values), activated(right, ACTIVATION), total, PARTS)
    if grad_parts is not None:
        if scales is not None:
            total = total * tl.load(scales + column, mask=column < columns, other=0.0)[:, None]
        place = grad_parts + tl.program_id(1).to(tl.int64) * columns * width
        place += column[:, None] * grad_column + ranks[None, :].to(tl.int64) * grad_rank
        tl.store(place, total, mask=in_factor)


def padded(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Zeros after its entries, contiguous."""
    if tensor.shape[dim] == width:
        return tensor.contiguous()
    shape = [*tensor.shape]
    shape[dim] = width
    out = tensor.new_zeros(shape)
    out.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return out


def reduce(
    x: Tensor,
    small: Tensor | None,
    factor: Tensor | None = None,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    *,
    dtype: torch.dtype = torch.float32,
    scales: Tensor | None = None,
    activation: str = "",
    transposed: bool = False,
) -> tuple[Any, Any]:
    """scale * masked(x) @ factor [rows, rank] in fp32 and scale * scales * (masked(x)^T @ f(small)) in `dtype`.

    One pass over x [rows, columns] makes both; None for what is not given. The second is [columns, rank], or
    [rank, columns] if `transposed`. The rows of the first begin at multiples of 16, as `small` should have them:
    where the compiler does not know that, addresses take the registers that the sums need.
    """
    rows, columns = x.shape
    rank = (factor if small is None else small).shape[1]  # type: ignore[union-attr]
    width = triton.cdiv(rank, 16) * 16
    ranks, parts = padded_rank(rank), PARTS[x.dtype]
    tile_rows, tile_columns = (64, 256) if ranks == 16 else (32, 128)
    if parts != 2:
        tile_rows, tile_columns = 32, 64 if parts else 32
    column_tiles = triton.cdiv(columns, tile_columns)
    rows_per_program = tile_rows
    while rows_per_program < rows and column_tiles * triton.cdiv(rows, 2 * rows_per_program) >= PROGRAMS:
        rows_per_program *= 2
    ranges = triton.cdiv(rows, rows_per_program)
    small_parts = grad_parts = None
    if factor is not None:
        factor = padded(factor, 1, width)
        small_parts = x.new_empty((column_tiles, rows, width), dtype=torch.float32)
    if small is not None:
        small = padded(small, 1, width) if small.stride(0) % 16 else small
        grad_parts = x.new_empty((ranges, *((width, columns) if transposed else (columns, width))), dtype=torch.float32)
    launch(
        _reduce,
        (column_tiles, ranges, triton.cdiv(rank, ranks)),
        *(small_parts, grad_parts, x, small, factor, scales, mask.seed, rows, columns, rank, width, x.stride(0)),
        *(0 if small is None else small.stride(0), *((1, columns) if transposed else (width, 1))),
        *(rows_per_program, mask.dropped),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANKS=ranks,
        PARTS=parts,
        ACTIVATION=activation,
        num_warps=8,
    )
    scale *= mask.scale
    grad_small = None if small_parts is None else sum_parts(small_parts, scale)[:, :rank]
    if grad_parts is None:
        return grad_small, None
    grad = sum_parts(grad_parts, scale, dtype=dtype)
    return grad_small, (grad[:rank] if transposed else grad[:, :rank]).contiguous()


@triton.jit
def _sum_parts(
    out, parts, bias, divisors, count, elements, columns, factor, PARTS: tl.constexpr, ELEMENTS: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    in_out = element < elements
    total = tl.zeros([PARTS, ELEMENTS], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS).to(tl.int64)
        inside = (part < count)[:, None] & in_out[None, :]
        total += tl.load(parts + part[:, None] * elements + element[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0) * factor
    if bias is not None:
        result += tl.load(bias + element % columns, mask=in_out, other=0.0).to(tl.float32)
    if divisors is not None:
        divisor = tl.load(divisors + element, mask=in_out, other=1.0)
        result = tl.where(divisor == 0, result, result / tl.where(divisor == 0, 1.0, divisor))
    tl.store(out + element, rounded(result, out), mask=in_out)


def sum_parts(
    parts: Tensor,
    factor: float = 1.0,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    divisors: Tensor | None = None,
) -> Tensor:
    """(factor * the sum over the first dimension of fp32 parts + bias) / divisors, where a divisor is not 0.

    Rounded once. bias is as long as the last dimension, divisors are as many as there are elements.
    """
    if len(parts) == 1 and factor == 1.0 and dtype == torch.float32 and bias is None and divisors is None:
        return parts[0]
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    tile_parts = 2 if len(parts) <= FEW_PARTS else 32
    launch(
        _sum_parts,
        (triton.cdiv(out.numel(), SUMS // tile_parts),),
        *(out, parts, None if bias is None else bias.contiguous(), divisors),
        *(len(parts), out.numel(), out.shape[-1], factor),
        PARTS=tile_parts,
        ELEMENTS=SUMS // tile_parts,
    )
    return out
