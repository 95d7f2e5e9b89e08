"""x times a frozen weight in Triton: up to 64 rows decode NF4 inside the product, more decode it once for torch.

Either way a 4-bit weight is rounded once to x's dtype. A dense one is not: its product is in the dtype that holds both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._extended_triton import extended, matmul
from peftkern.ops._linear import formats_of
from peftkern.ops._low_rank_triton import low_rank_tile
from peftkern.ops._reduce_triton import sum_parts
from peftkern.ops._triton import PROGRAMS, block_scale, codebook, decoded, dot_operand, launch
from peftkern.ops.nf4_dequantize_triton import dequantize_into

FEW_ROWS = 64
# Columns of the weight of one step: they share a scale, so that the block must hold as many and rows begin with one.
STEP = 64
OUT_TILE = 64


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, features] whose rows are contiguous; a view where strides allow it."""
    features = x.shape[-1]
    rows = x.reshape(x.numel() // features if features else x.shape[:-1].numel(), features)
    return rows if rows.stride(1) == 1 or features == 1 else rows.contiguous()


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
        high = decoded(packed >> 4, table, row.shape[0], DEPTH // 2) * scale[:, None]
        low = decoded(packed & 15, table, row.shape[0], DEPTH // 2) * scale[:, None]
        values = tl.interleave(high, low)
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
def _few_rows(
    parts,
    x,
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    small,
    factor,
    rows,
    out_features,
    in_features,
    rank,
    x_row,
    small_row,
    factor_rank,
    factor_column,
    scale,
    chunk,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS).to(tl.int64)
    table = codebook()
    first = tl.program_id(1) * chunk
    if small is None:
        total = tl.zeros([OUT, ROWS], tl.float32)
    else:
        # Of the first part alone.
        ranks = tl.where(first == 0, rank, 0)
        total = scale * low_rank_tile(
            factor,
            small,
            out,
            row,
            out_features,
            rows,
            ranks,
            factor_column,
            factor_rank,
            1,
            small_row,
            OUT,
            ROWS,
            16,
            PARTS,
            "",
        )
    for start in range(first, tl.minimum(first + chunk, in_features), STEP):
        values = weight_stripe(
            weight,
            absmax,
            nested_absmax,
            nested_quant_map,
            offset,
            row_stride,
            column_stride,
            block_log2,
            out,
            start,
            out_features,
            in_features,
            table,
            STEP,
            True,
        )
        place = x + (start + tl.arange(0, STEP))[:, None] + row[None, :] * x_row
        right = tl.load(place, mask=row[None, :] < rows, other=0.0).to(tl.float32)
        total = tl.dot(dot_operand(values, x), dot_operand(right, x), total, input_precision="ieee")
    place = parts + (tl.program_id(1).to(tl.int64) * rows + row[None, :]) * out_features + out[:, None]
    tl.store(place, total, mask=(out[:, None] < out_features) & (row[None, :] < rows))


def runs_fused(rows: int, in_features: int, block_size: int) -> bool:
    """Whether the weight is decoded inside the product: by shape alone, so that a call always has the same bits."""
    return 0 < rows <= FEW_ROWS and in_features > 0 and in_features % max(STEP, block_size) == 0 and block_size >= STEP


class Base(NamedTuple):
    """The weight [out, in] of a linear op; `block_size` 0 means that `weight` is dense."""

    weight: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor | None
    block_size: int
    out_features: int
    in_features: int

    @classmethod
    def each(cls, w: Sequence[Tensor], wf: Sequence[int]) -> list["Base"]:
        """Those of an op's schema."""
        bases, rest = [], iter(w)
        for weight in formats_of(wf):
            parts = [next(rest) for _ in range(weight.parts)]
            fields: Any = (
                *parts,
                *[None] * (5 - len(parts)),
                weight.block_size,
                weight.out_features,
                weight.in_features,
            )
            bases.append(cls(*fields))
        return bases

    @classmethod
    def of(cls, w: Sequence[Tensor], wf: Sequence[int]) -> "Base":
        """That of an op of one weight."""
        return cls.each(w, wf)[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] for a product by torch: a dense weight as it is, 4-bit codes decoded and rounded once to `dtype`.

        The memory comes from torch's allocator, which hands it out again in stream order and to a graph from its own
        pool; a static of ours would be shared by streams. It is not kept for backward: that would be the dense model.
        """
        if not self.block_size:
            return self.weight
        out = self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)
        return dequantize_into(out, self[:5], self.block_size)

    def kernel_arguments(self) -> tuple[Tensor | int | None, ...]:
        """The arguments of `weight_tile` from `weight` on: parts, strides and block size."""
        if not self.block_size:
            return self.weight, None, None, None, None, self.weight.stride(0), self.weight.stride(1), 0
        parts = [None if part is None else part.contiguous() for part in self[:5]]
        return *parts, 0, 0, self.block_size.bit_length() - 1

    def _few_rows(
        self, x: Tensor, small: Tensor | None = None, factor: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Parts [splits, rows, out] of x [rows, in] times a 4-bit weight's transpose, where `runs_fused`.

        With a low-rank product scale * small @ factor in the first of them.
        """
        (rows, in_features), out_features = x.shape, self.out_features
        wide = x.dtype == torch.float32  # no tensor cores: both operands lie in registers
        out_tile = OUT_TILE // 2 if wide else OUT_TILE
        out_tiles, steps = triton.cdiv(out_features, out_tile), in_features // STEP
        chunk = triton.cdiv(steps, max(1, min(triton.cdiv(steps, 4), PROGRAMS // out_tiles))) * STEP
        parts = x.new_empty((triton.cdiv(in_features, chunk), rows, out_features), dtype=torch.float32)
        launch(
            _few_rows,
            (out_tiles, len(parts)),
            *(parts, x, *self.kernel_arguments(), small, factor, rows, out_features, in_features),
            *(0 if factor is None else len(factor), x.stride(0), 0 if small is None else small.stride(0)),
            *((0, 0) if factor is None else factor.stride()),
            *(scale, chunk),
            ROWS=max(16, triton.next_power_of_2(rows)),
            OUT=out_tile,
            STEP=STEP // 2 if wide else STEP,
            PARTS=0 if wide else 3,
        )
        return parts

    def product(self, x: Tensor) -> Tensor:
        """x [rows, in] times the weight's transpose, [rows, out]: fp32 where few rows decode it, else as `matmul`."""
        rows, in_features = x.shape
        if runs_fused(rows, in_features, self.block_size):
            return sum_parts(self._few_rows(x))
        return matmul(x, self.dense(x.dtype).t())

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus a bias, in x's dtype."""
        rows, in_features = x.shape
        if runs_fused(rows, in_features, self.block_size):
            return sum_parts(self._few_rows(x), 1.0, bias, x.dtype)
        dense = self.dense(x.dtype)
        if bias is not None and bias.dtype == dense.dtype == x.dtype:
            return F.linear(x, dense, bias)
        y = matmul(x, dense.t())
        return (y if bias is None else y + bias).to(x.dtype)

    def extended(self, x: Tensor, small: Tensor, factor: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        """The same plus scale * small @ factor, rounded once but where torch's library makes the product."""
        rows, in_features = x.shape
        if runs_fused(rows, in_features, self.block_size):
            return sum_parts(self._few_rows(x, small, factor, scale), 1.0, bias, x.dtype)
        right = self.dense(x.dtype).t()
        return extended(x, right, small, factor, scale, bias=bias)
