"""nf4_dequantize in Triton: one launch, nested scales decoded in the kernel. Bit for bit the reference.

A granule is the bytes of one row of the tile, all inside one block, so that a scale is looked up once per granule.
`merge_into` adds a low-rank product on the way: the sum is formed in fp32 and rounded once. In 16 bits it loses what is
below half a step of the weight, as any merge does, so that no op takes it by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import WeightFormat
from peftkern.ops._triton import block_scale, codebook, decoded, launch, meta_nf4, product, rounded

GRANULES = 64
MOST_GRANULE_BYTES = 32
MERGE_ROWS = 64
MERGE_COLUMNS = 64


@triton.jit
def _dequantize(
    out,
    codes,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    elements,
    granules_per_block_log2,
    GRANULES: tl.constexpr,
    BYTES: tl.constexpr,
):
    granule = tl.program_id(0).to(tl.int64) * GRANULES + tl.arange(0, GRANULES)
    byte = granule[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(codes + byte, mask=byte * 2 < elements, other=0).to(tl.int32)
    block = granule >> granules_per_block_log2
    in_use = granule * (2 * BYTES) < elements
    scale = block_scale(absmax, nested_absmax, nested_quant_map, offset, block, in_use)[:, None]
    table = codebook()
    first = decoded(packed >> 4, table, GRANULES, BYTES) * scale
    second = decoded(packed & 15, table, GRANULES, BYTES) * scale
    element = granule[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out + element, rounded(tl.interleave(first, second), out), mask=element < elements)


@triton.jit
def _merge(
    out,
    codes,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    lora_a,
    lora_b,
    rows,
    columns,
    rank,
    a_rank,
    a_column,
    b_row,
    b_rank,
    block_log2,
    scaling,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rank, RANKS):
        ranks = (start + tl.arange(0, RANKS)).to(tl.int64)
        in_b = (row[:, None] < rows) & (ranks[None, :] < rank)
        in_a = (ranks[:, None] < rank) & (column[None, :] < columns)
        left = tl.load(lora_b + row[:, None] * b_row + ranks[None, :] * b_rank, mask=in_b, other=0.0).to(tl.float32)
        right = tl.load(lora_a + ranks[:, None] * a_rank + column[None, :] * a_column, mask=in_a, other=0.0)
        total = product(left, right.to(tl.float32), total, PARTS)
    in_out = (row[:, None] < rows) & (column[None, :] < columns)
    element = row[:, None] * columns + column[None, :]
    byte = tl.load(codes + (element >> 1), mask=in_out, other=0).to(tl.int32)
    code = tl.where(element & 1 == 0, byte >> 4, byte & 15)
    scale = block_scale(absmax, nested_absmax, nested_quant_map, offset, element >> block_log2, in_out)
    weight = decoded(code, codebook(), ROWS, COLUMNS) * scale
    tl.store(out + element, rounded(weight + total * scaling, out), mask=in_out)


def dequantize_into(out: Tensor, parts: Sequence[Tensor | None], block_size: int) -> Tensor:
    """Writes the dense weight into `out` [out, in], contiguous, fp32, bf16 or fp16; parts as NF4Weight.tensors."""
    parts = [None if part is None else part.contiguous() for part in parts]
    granule_bytes = min(MOST_GRANULE_BYTES, block_size // 2)
    granules_per_block = block_size // (2 * granule_bytes)
    launch(
        _dequantize,
        (triton.cdiv(out.numel(), GRANULES * 2 * granule_bytes),),
        out,
        *parts,
        out.numel(),
        granules_per_block.bit_length() - 1,
        GRANULES=GRANULES,
        BYTES=granule_bytes,
    )
    return out


def merge_into(out: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Writes weight + scaling * lora_b @ lora_a into `out` [out, in], contiguous, fp32, bf16 or fp16."""
    rows, columns = out.shape
    launch(
        _merge,
        (triton.cdiv(rows, MERGE_ROWS), triton.cdiv(columns, MERGE_COLUMNS)),
        *(out, *(None if part is None else part.contiguous() for part in weight.tensors), lora_a, lora_b),
        *(rows, columns, len(lora_a), *lora_a.stride(), *lora_b.stride()),
        *(weight.block_size.bit_length() - 1, scaling),
        ROWS=MERGE_ROWS,
        COLUMNS=MERGE_COLUMNS,
        RANKS=16,
        PARTS=0 if out.dtype == torch.float32 else 3,
    )
    return out


def nf4_dequantize(w: list[Tensor], wf: list[int], dtype: torch.dtype) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    weight = WeightFormat(*wf)
    out = w[0].new_empty((weight.out_features, weight.in_features), dtype=dtype)
    return dequantize_into(out, [*w, *[None] * (5 - len(w))], weight.block_size)


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    shape, odd = (4096, 4096), (4095, 4095)
    for dtype in (torch.bfloat16, torch.float32):
        nf4_dequantize(*meta_nf4(shape), dtype)
    nf4_dequantize(*meta_nf4(shape, nested=False), torch.bfloat16)
    nf4_dequantize(*meta_nf4(odd, 32), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        parts: Any = (*meta_nf4(shape)[0], torch.Size(shape), dtype, 64)
        weight = NF4Weight(*parts)
        out, lora_a = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, (16, shape[1])))
        merge_into(out, weight, lora_a.float(), lora_a.float().t().contiguous(), 2.0)
