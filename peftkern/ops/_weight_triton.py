"""x times a frozen weight: up to 64 rows decode NF4 inside the product, more decode it once and take torch's GEMM.

By either way a 4-bit weight is rounded once to x's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._low_rank_triton import PROGRAMS, sum_partials
from peftkern.ops._triton import block_scale, codebook, decoded, dot_operand, launch
from peftkern.ops.nf4_dequantize_triton import dequantize_into

Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

FEW_ROWS = 64
# Columns of the weight of one step: they share a scale, so that the block must hold as many and rows begin with one.
STEP = 64
OUT_TILE = 64


@triton.jit
def _few_rows(
    partials,
    x,
    codes,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    rows,
    out_features,
    in_features,
    x_row,
    x_column,
    block_log2,
    chunk,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64) * OUT + tl.arange(0, OUT)
    row = tl.arange(0, ROWS).to(tl.int64)
    in_use = out < out_features
    table = codebook()
    total = tl.zeros([OUT, ROWS], tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, in_features), STEP):
        element = out * in_features + start
        byte = (element >> 1)[:, None] + tl.arange(0, STEP // 2)[None, :]
        packed = tl.load(codes + byte, mask=in_use[:, None], other=0).to(tl.int32)
        scale = block_scale(absmax, nested_absmax, nested_quant_map, offset, element >> block_log2, in_use)[:, None]
        high = decoded(packed >> 4, table, OUT, STEP // 2) * scale
        low = decoded(packed & 15, table, OUT, STEP // 2) * scale
        column = (start + tl.arange(0, STEP)).to(tl.int64)
        place = x + column[:, None] * x_column + row[None, :] * x_row
        values = tl.load(place, mask=row[None, :] < rows, other=0.0).to(tl.float32)
        weight = dot_operand(tl.interleave(high, low), x)
        total = tl.dot(weight, dot_operand(values, x), total, input_precision="ieee")
    place = partials + (tl.program_id(1).to(tl.int64) * rows + row[None, :]) * out_features + out[:, None]
    tl.store(place, total, mask=in_use[:, None] & (row[None, :] < rows))


def runs_fused(rows: int, in_features: int, block_size: int) -> bool:
    """Whether the weight is decoded inside the product: by shape alone, so that a call always has the same bits."""
    return 0 < rows <= FEW_ROWS and in_features > 0 and in_features % max(STEP, block_size) == 0 and block_size >= STEP


def few_rows(x: Tensor, codes: Tensor, parts: Parts, block_size: int, out_features: int) -> Tensor:
    """Partials [splits, rows, out] of x [rows, in] times a 4-bit weight's transpose, where `runs_fused`."""
    rows, in_features = x.shape
    out_tile = OUT_TILE // 2 if x.dtype == torch.float32 else OUT_TILE
    out_tiles, steps = triton.cdiv(out_features, out_tile), in_features // STEP
    chunk = triton.cdiv(steps, max(1, min(triton.cdiv(steps, 4), PROGRAMS // out_tiles))) * STEP
    splits = triton.cdiv(in_features, chunk)
    partials = x.new_empty((splits, rows, out_features), dtype=torch.float32)
    launch(
        _few_rows,
        (out_tiles, splits),
        *(partials, x, codes.contiguous(), *(None if part is None else part.contiguous() for part in parts)),
        *(rows, out_features, in_features, *x.stride(), block_size.bit_length() - 1, chunk),
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUT=out_tile,
        STEP=STEP,
    )
    return partials


def dense(weight: Tensor, parts: Parts, block_size: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A dense weight as it is, 4-bit codes decoded and rounded once to `dtype`.

    The memory comes from torch's allocator, which hands it out again in stream order and to a graph from its own pool;
    a static of ours would be shared by streams. It is not kept for backward: that would be the dense model.
    """
    if not block_size:
        return weight
    absmax, nested_absmax, nested_quant_map, offset = parts
    assert absmax is not None
    out = weight.new_empty(shape, dtype=dtype)
    return dequantize_into(out, weight, absmax, nested_absmax, nested_quant_map, offset, block_size)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, in the dtype that holds both."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype) @ weight.to(dtype)


def base_product(x: Tensor, weight: Tensor, parts: Parts, block_size: int, out_features: int) -> Tensor:
    """x [rows, in] times the weight's transpose, [rows, out]: in fp32 where few rows decode it, else as `matmul`."""
    rows, in_features = x.shape
    if runs_fused(rows, in_features, block_size):
        return sum_partials(few_rows(x, weight, parts, block_size, out_features))
    return matmul(x, dense(weight, parts, block_size, (out_features, in_features), x.dtype).t())
