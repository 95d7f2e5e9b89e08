"""What the Triton linear ops share: rows, dense weights for torch's products, scaled columns, sums in fixed order."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._triton import INTERPRETING, bf16_bits, block_scale, decoded, launch, rounded
from peftkern.ops.nf4_dequantize_triton import dequantize_into

# Tiles of passes over activations: 16 elements a thread in 4 warps, rows of at least 256 bytes.
PASS_ROWS, PASS_COLUMNS = 16, 128
# Rows are cut until there are this many programs, several for each multiprocessor of the largest GPUs. A constant, so
# that sums have the same bits on every one of them.
PROGRAMS = 1024
LEAST_ROWS = 64
# Of the sums that one program adds.
SUM_PARTS, SUM_COLUMNS = 32, 64


class Base(NamedTuple):
    """The weight of a linear op, as its schema has it: `block_size` 0 means that `weight` is dense [out, in]."""

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor | None
    block_size: int

    def dense(self, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
        """[out, in] for a product by torch, in the dtype of what it is multiplied with: rounded once."""
        if not self.block_size:
            return self.weight.to(dtype)
        out = self.weight.new_empty((out_features, in_features), dtype=dtype)
        parts: Any = self
        return dequantize_into(out, *parts)

    def kernel_arguments(self) -> tuple[Tensor | int | None, ...]:
        """The arguments of `weight_tile` from `weight` on: parts, strides and block size."""
        if not self.block_size:
            return self.weight, None, None, None, None, self.weight.stride(0), self.weight.stride(1), 0
        parts = [None if part is None else part.contiguous() for part in self[:5]]
        return *parts, 0, 0, self.block_size.bit_length() - 1


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, features] whose rows are contiguous; a view where strides allow it."""
    features = x.shape[-1]
    rows = x.reshape(x.numel() // features if features else 0, features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


def rows_per_program(
    rows: int, columns: int, tile_columns: int, least: int = LEAST_ROWS, programs: int = PROGRAMS
) -> int:
    """`least` times the largest power of two that leaves `programs` programs, from the sizes alone."""
    tiles = triton.cdiv(columns, tile_columns)
    per_program = least
    while per_program < rows and tiles * triton.cdiv(rows, 2 * per_program) >= programs:
        per_program *= 2
    return per_program


@triton.jit
def dot_operand(values, like):
    """fp32 values rounded to what the pointer `like` points to, or, for bf16 in the interpreter, as fp32."""
    if INTERPRETING and like.dtype.element_ty == tl.bfloat16:
        return bf16_bits(values)
    return values.to(like.dtype.element_ty)


@triton.jit
def weight_tile(
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    row,
    column,
    rows,
    columns,
    table,
):
    """fp32 values of rows [R] and columns [C] (int64) of a weight [rows, columns], dense or packed; 0 outside of it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if absmax is None:
        address = weight + row[:, None] * row_stride + column[None, :] * column_stride
        values = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    else:
        element = row[:, None] * columns + column[None, :]
        packed = tl.load(weight + (element >> 1), mask=inside, other=0).to(tl.int32)
        # The first of two elements is in the high half.
        code = (packed >> (4 - 4 * (element & 1).to(tl.int32))) & 15
        scale = block_scale(absmax, nested_absmax, nested_quant_map, offset, element >> block_log2, inside)
        values = tl.where(inside, decoded(code, table, row.shape[0], column.shape[0]) * scale, 0.0)
    return values


@triton.jit
def weight_stripe(
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    row,
    start,
    rows,
    columns,
    table,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`weight_tile` of DEPTH columns from `start`; aligned ones lie in one block, so that a row has one scale."""
    if ALIGNED:
        first = row * columns + start
        in_rows = row < rows
        byte = (first >> 1)[:, None] + tl.arange(0, DEPTH // 2)[None, :]
        packed = tl.load(weight + byte, mask=in_rows[:, None], other=0).to(tl.int32)
        scale = block_scale(absmax, nested_absmax, nested_quant_map, offset, first >> block_log2, in_rows)
        high = decoded(packed >> 4, table, row.shape[0], DEPTH // 2)
        low = decoded(packed & 15, table, row.shape[0], DEPTH // 2)
        values = tl.interleave(high, low) * tl.where(in_rows, scale, 0.0)[:, None]
    else:
        column = start + tl.arange(0, DEPTH).to(tl.int64)
        values = weight_tile(
            weight,
            absmax,
            nested_absmax,
            nested_quant_map,
            offset,
            row_stride,
            column_stride,
            block_log2,
            row,
            column,
            rows,
            columns,
            table,
        )
    return values


@triton.jit
def _scale_columns(
    values,
    others,
    out,
    factors,
    bias,
    partials,
    rows,
    columns,
    value_stride,
    other_stride,
    rows_per_program,
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    if out is not None:
        factor = tl.load(factors + column, mask=in_columns, other=0.0) - shift
        added = tl.zeros([COLUMNS], tl.float32)
        if bias is not None:
            added += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_columns[None, :]
        value = tl.load(values + row[:, None] * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if partials is not None:
            other = tl.load(others + row[:, None] * other_stride + column[None, :], mask=inside, other=0.0)
            total += value * other.to(tl.float32)
        if out is not None:
            result = factor[None, :] * (value + added[None, :])
            tl.store(out + row[:, None] * columns + column[None, :], rounded(result, out), mask=inside)
    if partials is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * columns + column, tl.sum(total, 0), mask=in_columns)


def scale_columns(
    values: Tensor,
    factors: Tensor,
    bias: Tensor | None = None,
    shift: float = 0.0,
    *,
    others: Tensor | None = None,
    need_out: bool = True,
    out: Tensor | None = None,
) -> tuple[Any, Any]:
    """(factors - shift) * (values + bias), [rows, columns] in values' dtype, and parts of the sum of values * others.

    The parts are [parts, columns], fp32, for `sum_parts`. One pass makes both; what is not asked for is None.
    """
    rows, columns = values.shape
    per_program = rows_per_program(rows, columns, PASS_COLUMNS)
    parts = triton.cdiv(rows, per_program)
    if need_out and out is None:
        out = values.new_empty((rows, columns))
    partials = None if others is None else factors.new_empty((parts, columns), dtype=torch.float32)
    launch(
        _scale_columns,
        (parts, triton.cdiv(columns, PASS_COLUMNS)),
        values,
        others,
        out,
        factors,
        bias,
        partials,
        rows,
        columns,
        values.stride(0),
        0 if others is None else others.stride(0),
        per_program,
        shift,
        ROWS=PASS_ROWS,
        COLUMNS=PASS_COLUMNS,
    )
    return out, partials


@triton.jit
def _sum_parts(out, partials, divisors, parts, size, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < size
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS).to(tl.int64)
        inside = (part < parts)[:, None] & in_columns[None, :]
        total += tl.load(partials + part[:, None] * size + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if divisors is not None:
        divisor = tl.load(divisors + column, mask=in_columns, other=1.0)
        result = tl.where(divisor == 0, result, result / tl.where(divisor == 0, 1.0, divisor))
    tl.store(out + column, rounded(result, out), mask=in_columns)


def sum_parts(partials: Tensor, out: Tensor, divisors: Tensor | None = None) -> Tensor:
    """Writes the sum over the first dimension of `partials`, fp32, into `out`; divided where a divisor is not 0."""
    launch(
        _sum_parts,
        (triton.cdiv(out.numel(), SUM_COLUMNS),),
        out,
        partials,
        divisors,
        partials.shape[0],
        out.numel(),
        PARTS=SUM_PARTS,
        COLUMNS=SUM_COLUMNS,
    )
    return out
