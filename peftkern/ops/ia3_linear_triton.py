"""ia3_linear in Triton: torch's product, and the scale, its gradient and the bias in one pass over activations.

The product is rounded to x's dtype before the pass scales it, the result again after it. The scale's gradient is that
of y over the scale. Where a scale is 0, or so small that y cannot tell, a kernel computes what it scaled; it reads the
scales itself, since to ask the GPU would be to wait for it, and ends at once where there is none.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._linear import native_weight
from peftkern.ops._reduce_triton import sum_parts
from peftkern.ops._triton import codebook, dot_operand, launch, meta_nf4, rounded
from peftkern.ops._weight_triton import Base, matmul, rows_of, weight_tile

# Tiles of passes over activations: 16 elements a thread in 4 warps, rows of at least 256 bytes.
PASS_ROWS, PASS_COLUMNS = 16, 128
# Rows are cut until there are this many programs, several for each multiprocessor of the largest GPUs. A constant, so
# that sums have the same bits on every one of them.
PROGRAMS = 1024
LEAST_ROWS = 64
SMALL_ROWS, SMALL_COLUMNS = 64, 64


def rows_per_program(rows: int, columns: int) -> int:
    """LEAST_ROWS times the largest power of two that leaves PROGRAMS programs, from the sizes alone."""
    tiles = triton.cdiv(columns, PASS_COLUMNS)
    per_program = LEAST_ROWS
    while per_program < rows and tiles * triton.cdiv(rows, 2 * per_program) >= PROGRAMS:
        per_program *= 2
    return per_program


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < columns
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    if out is not None:
        factor = tl.load(factors + column, mask=in_columns, other=0.0)
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
    *,
    others: Tensor | None = None,
    need_out: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """factors * (values + bias) [rows, columns] in `dtype`, or values', and parts of the sum of values * others.

    The parts are [parts, columns], fp32, for `sum_parts`. One pass makes both; what is not asked for is None.
    """
    rows, columns = values.shape
    per_program = rows_per_program(rows, columns)
    parts = triton.cdiv(rows, per_program)
    out = values.new_empty((rows, columns), dtype=dtype) if need_out else None
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
        ROWS=PASS_ROWS,
        COLUMNS=PASS_COLUMNS,
    )
    return out, partials


@triton.jit
def _small_columns(
    x,
    grad_y,
    scale,
    bias,
    partials,
    weight,
    absmax,
    nested_absmax,
    nested_quant_map,
    offset,
    row_stride,
    column_stride,
    block_log2,
    rows,
    out_features,
    in_features,
    x_stride,
    grad_stride,
    rows_per_program,
    least,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    in_columns = column < out_features
    is_small = in_columns & (tl.abs(tl.load(scale + column, mask=in_columns, other=1.0)) < least)
    if tl.max(is_small.to(tl.int32), 0) > 0:
        added = tl.zeros([COLUMNS], tl.float32)
        if bias is not None:
            added += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)
        table = codebook()
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, rows_per_program, ROWS):
            row = tl.program_id(0).to(tl.int64) * rows_per_program + start + tl.arange(0, ROWS)
            in_rows = row < rows
            z = tl.zeros([ROWS, COLUMNS], tl.float32)
            for begin in range(0, in_features, DEPTH):
                depth = begin + tl.arange(0, DEPTH).to(tl.int64)
                inside = in_rows[:, None] & (depth < in_features)[None, :]
                left = tl.load(x + row[:, None] * x_stride + depth[None, :], mask=inside, other=0.0)
                right = weight_tile(
                    weight,
                    absmax,
                    nested_absmax,
                    nested_quant_map,
                    offset,
                    row_stride,
                    column_stride,
                    block_log2,
                    column,
                    depth,
                    out_features,
                    in_features,
                    table,
                )
                z = tl.dot(
                    dot_operand(left.to(tl.float32), x), tl.trans(dot_operand(right, x)), z, input_precision="ieee"
                )
            inside = in_rows[:, None] & in_columns[None, :]
            grad = tl.load(grad_y + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0)
            total += tl.sum(grad.to(tl.float32) * (z + added[None, :]), 0)
        tl.store(partials + tl.program_id(0).to(tl.int64) * out_features + column, total, mask=is_small)


def ia3_linear(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
    scale: Tensor,
    bias: Tensor | None,
    scale_input: bool,
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    base = Base.of(w, wf)
    if scale_input:
        scaled, _ = scale_columns(rows, scale.contiguous())
        y = base.linear(scaled, bias)
    else:
        product, bias = base.product(rows), None if bias is None else bias.contiguous()
        y, _ = scale_columns(product, scale.contiguous(), bias, dtype=x.dtype)
    return y.view(*x.shape[:-1], base.out_features)


def ia3_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    w: list[Tensor],
    wf: list[int],
    scale: Tensor,
    bias: Tensor | None,
    scale_input: bool,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    grad, rows, scale = rows_of(grad_y), rows_of(x), scale.contiguous()
    base = Base.of(w, wf)
    grad_x, grad_scale = grad_y.new_empty(0), scale.new_empty(0)
    if scale_input:
        product = matmul(grad, base.dense(grad.dtype))
        others = rows if need_scale else None
        result, parts = scale_columns(product, scale, others=others, need_out=need_x, dtype=x.dtype)
        divisors = None
    else:
        saved = None if y is None or not need_scale else rows_of(y)
        result, parts = scale_columns(grad, scale, others=saved, need_out=need_x)
        least = least_divisor(grad.dtype)
        divisors = torch.where(scale.abs() < least, 1.0, scale) if need_scale else None
        if parts is not None:
            _replace_small_columns(parts, rows, grad, base, scale, bias, least)
        if result is not None:
            result = matmul(result, base.dense(grad.dtype)).to(x.dtype)
    if parts is not None:
        grad_scale = sum_parts(parts, dtype=scale.dtype, divisors=divisors)
    if result is not None:
        grad_x = result.view(x.shape)
    return grad_x, grad_scale


def least_divisor(dtype: torch.dtype) -> float:
    """Below this a scale may leave y too coarse in `dtype`: see `csrc/cpu/ia3_linear.cpp`."""
    return 2.0**-4 if dtype == torch.float16 else 2.0**-40


def _replace_small_columns(
    parts: Tensor, rows: Tensor, grad: Tensor, base: Base, scale: Tensor, bias: Tensor | None, least: float
) -> None:
    """In the parts of the sums of grad * y, those of columns of smaller scales become grad * (x W^T + bias)'s."""
    if not base.block_size:  # the dtype of the dots is that of x
        rows = rows.to(torch.promote_types(rows.dtype, base.weight.dtype))
    wide = rows.dtype == torch.float32  # no tensor cores: both operands lie in registers
    launch(
        _small_columns,
        (parts.shape[0], triton.cdiv(parts.shape[1], SMALL_COLUMNS)),
        rows,
        grad,
        scale,
        None if bias is None else bias.contiguous(),
        parts,
        *base.kernel_arguments(),
        *grad.shape,
        rows.shape[1],
        rows.stride(0),
        grad.stride(0),
        rows_per_program(*grad.shape),
        least,
        num_warps=8 if wide else 4,
        ROWS=SMALL_ROWS,
        COLUMNS=SMALL_COLUMNS,
        DEPTH=16 if wide else 32,
    )


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, size, nf4 in ((torch.bfloat16, 4096, True), (torch.float16, 4095, False), (torch.float32, 4096, True)):
        weight: Any = meta_nf4((size, size)) if nf4 else native_weight(empty(size, size, dtype=dtype))
        x, scale, bias = empty(8192, size, dtype=dtype), empty(size), empty(size, dtype=dtype)
        for scale_input in (False, True):
            y = ia3_linear(*(x, *weight, scale, bias, scale_input))
            ia3_linear_backward(*(x, x, y, *weight, scale, bias, scale_input, True, True))
