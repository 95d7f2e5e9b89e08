"""DoRA's norm in Triton: from packed codes or a dense weight, never a buffer of size [out, in].

    n_j^2 = ||W_j||^2 + 2 s (W A^T)_j . B_j + s^2 B_j (A A^T) B_j^T
The second term is a sum over W, which programs make in slices of its columns. Its products are fp32, or for bf16
activations three of bf16 parts with an error of 2^-17. Where little is left of ||W_j||^2 the rows of that tile are
computed directly; the kernel decides, so that nobody waits for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._linear import native_weight
from peftkern.ops._reduce_triton import sum_parts
from peftkern.ops._triton import codebook, launch, meta_nf4, padded_rank, product
from peftkern.ops._weight_triton import Base, weight_stripe

ROWS, DEPTH = 64, 64
MOST_SPLITS, LEAST_DEPTH, ENOUGH_PROGRAMS = 8, 512, 512
# Below this share of ||W||^2 the factored norm is the difference of nearly equal numbers: at it the products' relative
# errors, 2^-24 and 2^-17 of ||W||^2, are 1e-4 and 1e-3 of the norm's square.
LEAST_SHARE, LEAST_SHARE_BF16 = 1e-3, 1e-2


@triton.jit
def _row_sums(
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    sums,
    products,
    lora_a,
    lora_b,
    rows,
    columns,
    rank,
    columns_per_split,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    rank_index = tl.program_id(2) * RANK + tl.arange(0, RANK).to(tl.int64)
    in_rank = rank_index < rank
    table = codebook()
    begin = tl.program_id(1).to(tl.int64) * columns_per_split
    total = tl.zeros([ROWS, RANK], tl.float32)
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(begin, tl.minimum(begin + columns_per_split, columns), DEPTH):
        values = weight_stripe(
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
            DEPTH,
            ALIGNED,
        )
        if lora_a is None:
            squares += values * values
        else:
            column = start + tl.arange(0, DEPTH)
            address = lora_a + rank_index[None, :] * columns + column[:, None]
            inside = (column < columns)[:, None] & in_rank[None, :]
            a = tl.load(address, mask=inside, other=0.0).to(tl.float32)
            total = product(values, a, total, PARTS)
    part = tl.program_id(1).to(tl.int64)
    if products is not None:
        address = products + (part * rows + row)[:, None] * rank + rank_index[None, :]
        tl.store(address, total, mask=(row < rows)[:, None] & in_rank[None, :])
    if sums is not None:
        result = tl.sum(squares, 1)
        if lora_a is not None:
            inside = (row < rows)[:, None] & in_rank[None, :]
            b = tl.load(lora_b + row[:, None] * rank + rank_index[None, :], mask=inside, other=0.0)
            result = tl.sum(total * b.to(tl.float32), 1)
        at = (part * tl.num_programs(2) + tl.program_id(2)) * rows + row
        tl.store(sums + at, result, mask=row < rows)


def _row_sums_of(base: Base, shape: tuple[int, int], a: Tensor | None, b: Tensor | None, bf16: bool) -> Tensor:
    """Parts of ||W_j||^2 without A, of (W A^T)_j . B_j with both, of W A^T without B: [parts, out] or [.., rank]."""
    rows, columns = shape
    rank = 1 if a is None else a.shape[0]
    width = 16 if a is None else padded_rank(rank)
    tiles, rank_tiles, splits = triton.cdiv(rows, ROWS), triton.cdiv(rank, width), 1
    while (
        splits < MOST_SPLITS and columns >= 2 * splits * LEAST_DEPTH and tiles * rank_tiles * splits < ENOUGH_PROGRAMS
    ):
        splits *= 2
    is_product = a is not None and b is None
    out = base.weight.new_empty(
        (splits, rows, rank) if is_product else (splits * rank_tiles, rows), dtype=torch.float32
    )
    launch(
        _row_sums,
        (tiles, splits, rank_tiles),
        *base.kernel_arguments(),
        *((None, out) if is_product else (out, None)),
        a,
        b,
        rows,
        columns,
        rank,
        triton.cdiv(triton.cdiv(columns, splits), DEPTH) * DEPTH,
        num_warps=8 if width > 32 else 4,
        ROWS=ROWS,
        DEPTH=32 if width > 32 else DEPTH,
        RANK=width,
        PARTS=3 if bf16 else 0,
        ALIGNED=_aligned(base, columns),
    )
    return out


def _aligned(base: Base, columns: int) -> bool:
    return base.block_size >= DEPTH and columns % DEPTH == 0


@triton.jit
def _norms(
    norm,
    sums,
    square_norm,
    gram,
    lora_a,
    lora_b,
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    rows,
    columns,
    rank,
    parts,
    scaling,
    least_share,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    in_rows = row < rows
    cross = tl.zeros([ROWS], tl.float32)
    address = sums + row
    for _ in range(0, parts):
        cross += tl.load(address, mask=in_rows, other=0.0)
        address += rows
    square = tl.load(square_norm + row, mask=in_rows, other=1.0)
    total = square + scaling * (2 * cross + scaling * tl.load(gram + row, mask=in_rows, other=0.0))
    # Also where it is not a number.
    is_small = in_rows & ~(total >= least_share * square)
    result = tl.sqrt(tl.maximum(total, 0.0))
    if tl.max(is_small.to(tl.int32), 0) > 0:
        table = codebook()
        direct = tl.zeros([ROWS], tl.float32)
        for start in range(0, columns, DEPTH):
            values = weight_stripe(
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
                DEPTH,
                ALIGNED,
            )
            column = start + tl.arange(0, DEPTH)
            change = tl.zeros([ROWS, DEPTH], tl.float32)
            for begin in range(0, rank, RANK):
                rank_index = begin + tl.arange(0, RANK).to(tl.int64)
                in_rank = rank_index < rank
                inside = in_rows[:, None] & in_rank[None, :]
                b = tl.load(lora_b + row[:, None] * rank + rank_index[None, :], mask=inside, other=0.0)
                inside = in_rank[:, None] & (column < columns)[None, :]
                a = tl.load(lora_a + rank_index[:, None] * columns + column[None, :], mask=inside, other=0.0)
                change = tl.dot(b.to(tl.float32), a.to(tl.float32), change, input_precision="ieee")
            values += scaling * change
            direct += tl.sum(values * values, 1)
        result = tl.where(is_small, tl.sqrt(direct), result)
    tl.store(norm + row, result, mask=in_rows)


@triton.jit
def _column_products(
    partials,
    small,
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    rows,
    columns,
    rank,
    rows_per_program,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    start = tl.program_id(0) * DEPTH
    rank_index = tl.program_id(2) * RANK + tl.arange(0, RANK).to(tl.int64)
    in_rank = rank_index < rank
    table = codebook()
    total = tl.zeros([RANK, DEPTH], tl.float32)
    for begin in range(0, rows_per_program, ROWS):
        row = tl.program_id(1).to(tl.int64) * rows_per_program + begin + tl.arange(0, ROWS)
        values = weight_stripe(
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
            DEPTH,
            ALIGNED,
        )
        inside = (row < rows)[None, :] & in_rank[:, None]
        left = tl.load(small + row[None, :] * rank + rank_index[:, None], mask=inside, other=0.0)
        total = tl.dot(left, values, total, input_precision="ieee")
    column = start + tl.arange(0, DEPTH)
    at = (tl.program_id(1).to(tl.int64) * rank + rank_index)[:, None] * columns + column[None, :]
    tl.store(partials + at, total, mask=in_rank[:, None] & (column < columns)[None, :])


def dora_linear_square_norm(
    w: list[Tensor],
    wf: list[int],
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    base = Base.of(w, wf)
    parts = _row_sums_of(base, (base.out_features, base.in_features), None, None, False)
    return sum_parts(parts)


def dora_linear_norm(
    w: list[Tensor],
    wf: list[int],
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    square_norm: Tensor,
    bf16: bool,
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    base = Base.of(w, wf)
    a, b = lora_a.contiguous(), lora_b.contiguous()
    rows, columns = b.shape[0], a.shape[1]
    wide_b = b.double()
    # Small, and in double so that no setting of torch's may round it to tf32.
    gram = ((wide_b @ _gram(a)) * wide_b).sum(1).float()
    sums = _row_sums_of(base, (rows, columns), a, b, bf16)
    norm = sums.new_empty(rows)
    launch(
        _norms,
        (triton.cdiv(rows, ROWS),),
        norm,
        sums,
        square_norm.contiguous(),
        gram,
        a,
        b,
        *base.kernel_arguments(),
        rows,
        columns,
        a.shape[0],
        sums.shape[0],
        scaling,
        LEAST_SHARE_BF16 if bf16 else LEAST_SHARE,
        num_warps=8,
        ROWS=ROWS,
        DEPTH=DEPTH,
        RANK=16,
        ALIGNED=_aligned(base, columns),
    )
    return norm


def dora_linear_norm_backward(
    grad_norm: Tensor,
    norm: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """With c = dn / n: dB = s c (A W^T)^T + s^2 c B A A^T and dA = s (c B)^T W + s^2 B^T c B A."""
    base = Base.of(w, wf)
    a, b = lora_a.contiguous(), lora_b.contiguous()
    (rows, rank), columns = b.shape, a.shape[1]
    products = _row_sums_of(base, (rows, columns), a, None, False)
    cross = sum_parts(products)
    # The norm has no slope at 0; torch's vector_norm gives 0 there as well.
    slope = torch.where(norm > 0, scaling * grad_norm.double() / norm.double().clamp_min(1e-300), 0).unsqueeze(1)
    wide_b = b.double()
    grad_b = slope * (cross + scaling * (wide_b @ _gram(a)))
    scaled_b = slope * wide_b
    through_gram = (scaled_b.t() @ (scaling * wide_b)) @ a.double()
    width = padded_rank(rank)
    per_program = triton.cdiv(triton.cdiv(rows, MOST_SPLITS), ROWS) * ROWS
    parts = triton.cdiv(rows, per_program)
    partials = cross.new_empty((parts, rank, columns))
    launch(
        _column_products,
        (triton.cdiv(columns, DEPTH), parts, triton.cdiv(rank, width)),
        partials,
        scaled_b.float(),
        *base.kernel_arguments(),
        rows,
        columns,
        rank,
        per_program,
        num_warps=8,
        ROWS=ROWS,
        DEPTH=DEPTH,
        RANK=width,
        ALIGNED=_aligned(base, columns),
    )
    grad_a = sum_parts(partials) + through_gram
    return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def _gram(a: Tensor) -> Tensor:
    return a.double() @ a.double().t()


def norm_configurations() -> None:
    """The kernels of the norm at the tiles and types they ship with; part of those of dora_linear."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nf4, a, b, square = meta_nf4((4096, 4096)), empty(64, 4096), empty(4096, 64), empty(4096)
    dora_linear_square_norm(*nf4)
    dora_linear_norm(*(*nf4, a, b, 0.5, square, False))
    dora_linear_norm(*(*nf4, a, b, 0.5, square, True))
    dora_linear_norm_backward(*(square, square, *nf4, a, b, 0.5))
    a, b, square = empty(5, 4095), empty(4095, 5), empty(4095)
    dora_linear_norm(*native_weight(empty(4095, 4095, dtype=torch.bfloat16)), a, b, 0.5, square, True)
