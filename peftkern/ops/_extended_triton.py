"""A product and a low-rank product in one accumulator in Triton, and the rule that says where it is taken.

Each element is rounded once. By the other route torch's library rounds the first product before a pass adds the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._low_rank_triton import low_rank_tile, up
from peftkern.ops._triton import INTERPRETING, NO_MASK, PROGRAMS, Mask, device_of, keep_mask, launch, rounded

# The rate of our GEMM over that of torch's library at which `in_one` takes ours, and the operations of a GEMM in the
# time of one byte from memory, 790 TFLOP/s over 4.3 TB/s. Both are assumed until a record of a GPU says better.
GEMM_SHARE = 0.85
FLOPS_PER_BYTE = 184
# Row tiles whose programs run together, so that what they read of the weight meets in the cache.
GROUP = 8


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, in the dtype that holds both."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype) @ weight.to(dtype)


@triton.jit
def loaded(values):
    """An operand of a dot in the type it was loaded in; the interpreter has no bf16."""
    return values.to(tl.float32) if INTERPRETING else values


@triton.jit
def _extended(
    out,
    x,
    right,
    small,
    factor,
    bias,
    seed,
    rows,
    columns,
    depth,
    rank,
    x_row,
    right_depth,
    right_column,
    small_row,
    factor_rank,
    factor_column,
    scale,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    of_group = GROUP * tl.cdiv(columns, COLUMNS)
    first_tile = tl.program_id(0) // of_group * GROUP
    row_tiles = tl.minimum(tl.cdiv(rows, ROWS) - first_tile, GROUP)
    tile = tl.program_id(0) % of_group
    row = (first_tile + tile % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tile // row_tiles * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    in_rows, in_columns = (row < rows)[:, None], (column < columns)[None, :]
    total = scale * low_rank_tile(
        small,
        factor,
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
        3,
        "",
    )
    if seed is not None:
        total = tl.where(keep_mask(row, first, seed, 0, dropped, ROWS, COLUMNS), total, 0.0)
    for start in range(0, depth, DEPTH):
        at = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(x + row[:, None] * x_row + at[None, :], mask=in_rows & (at < depth)[None, :], other=0.0)
        values_at = right + at[:, None] * right_depth + column[None, :] * right_column
        values = tl.load(values_at, mask=(at < depth)[:, None] & in_columns, other=0.0)
        total = tl.dot(loaded(left), loaded(values), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], rounded(total, out), mask=in_rows & in_columns)


def _tiles(shared: int, masked: bool) -> dict[str, int]:
    """The wider tile is for chips whose tensor cores read shared memory: others spill registers, and so does a mask."""
    wide = shared >= 200 * 1024 and not masked
    return {"ROWS": 128, "COLUMNS": 256 if wide else 128, "DEPTH": 64, "num_stages": 3, "num_warps": 8}


def in_one(x: Tensor, right: Tensor) -> bool:
    """Whether x [rows, depth] @ right [depth, columns] and a low-rank product are one GEMM of ours, in one accumulator.

    Else torch's library makes the first and a pass adds the second: for 2 * depth operations of an element it reads and
    writes 4 bytes, 2 * FLOPS_PER_BYTE / depth of the library's time. Ours is taken where it is not slower than both if
    it has GEMM_SHARE of the library's rate: up to a depth of 2085. It needs operands of 16 bits and, since it does not
    split the depth, tiles for every multiprocessor; and warps of 32 threads with 96 KiB of shared memory, without which
    its tiles are too small for that rate.
    """
    (rows, depth), columns = x.shape, right.shape[1]
    device = device_of(x)
    if x.dtype != right.dtype or x.dtype == torch.float32 or device.warp_size != 32 or device.shared < 96 * 1024:
        return False
    tiles = _tiles(device.shared, False)
    programs = triton.cdiv(rows, tiles["ROWS"]) * triton.cdiv(columns, tiles["COLUMNS"])
    return 2 * programs >= PROGRAMS and GEMM_SHARE * (depth + 2 * FLOPS_PER_BYTE) >= depth


def extended(
    x: Tensor,
    right: Tensor,
    small: Tensor,
    factor: Tensor,
    scale: float = 1.0,
    mask: Mask = NO_MASK,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ right + masked(scale * small @ factor) + bias in x's dtype, by the route that `in_one` says."""
    if not in_one(x, right):
        return up(small, factor, x.dtype, scale, mask, bias, outer=matmul(x, right))
    (rows, depth), columns = x.shape, right.shape[1]
    out = x.new_empty((rows, columns))
    tiles = _tiles(device_of(x).shared, mask.seed is not None)
    launch(
        _extended,
        (triton.cdiv(rows, tiles["ROWS"]) * triton.cdiv(columns, tiles["COLUMNS"]),),
        *(out, x, right, small, factor, None if bias is None else bias.contiguous(), mask.seed),
        *(rows, columns, depth, len(factor), x.stride(0), *right.stride(), small.stride(0), *factor.stride()),
        *(scale * mask.scale, mask.dropped),
        **tiles,
        RANKS=16,
        GROUP=GROUP,
    )
    return out
