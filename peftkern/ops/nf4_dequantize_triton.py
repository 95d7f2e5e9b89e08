"""nf4_dequantize in Triton: one launch, nested scales decoded in the kernel. Bit for bit the reference.

A granule is the bytes of one row of the tile, all inside one block, so that a scale is looked up once per granule.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._triton import block_scale, codebook, decoded, launch, meta_nf4, rounded

GRANULES = 64
MOST_GRANULE_BYTES = 32


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


def dequantize_into(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> Tensor:
    """Writes the dense weight into `out` [out, in], contiguous, fp32, bf16 or fp16."""
    parts = [None if part is None else part.contiguous() for part in (nested_absmax, nested_quant_map, offset)]
    granule_bytes = min(MOST_GRANULE_BYTES, block_size // 2)
    granules_per_block = block_size // (2 * granule_bytes)
    launch(
        _dequantize,
        (triton.cdiv(out.numel(), GRANULES * 2 * granule_bytes),),
        out,
        codes.contiguous(),
        absmax.contiguous(),
        *parts,
        out.numel(),
        granules_per_block.bit_length() - 1,
        GRANULES=GRANULES,
        BYTES=granule_bytes,
    )
    return out


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    out = codes.new_empty(shape, dtype=dtype)
    return dequantize_into(out, codes, absmax, nested_absmax, nested_quant_map, offset, block_size)


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    shape, odd = (4096, 4096), (4095, 4095)
    calls: list[Any] = [(*meta_nf4(shape), shape, dtype) for dtype in (torch.bfloat16, torch.float32)]
    calls += [(*meta_nf4(shape, nested=False), shape, torch.bfloat16), (*meta_nf4(odd, 32), odd, torch.bfloat16)]
    for arguments in calls:
        nf4_dequantize(*arguments)
