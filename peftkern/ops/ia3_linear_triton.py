"""ia3_linear in Triton: torch's product, and the scale, its gradient and the bias in one pass over activations.

The product is rounded to x's dtype before the pass scales it, the result again after it. The scale's gradient is that
of y over the scale. Where a scale is 0 a kernel computes what it scaled; it reads the scales itself, since to ask the
GPU would be to wait for it, and ends at once where there is none.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._linear_triton import (
    PASS_COLUMNS,
    Base,
    dot_operand,
    rows_of,
    rows_per_program,
    scale_columns,
    sum_parts,
    weight_tile,
)
from peftkern.ops._triton import codebook, launch, meta_nf4

ZERO_ROWS, ZERO_COLUMNS = 64, 64


@triton.jit
def _zero_columns(
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    in_columns = column < out_features
    is_zero = in_columns & (tl.load(scale + column, mask=in_columns, other=1.0) == 0)
    if tl.max(is_zero.to(tl.int32), 0) > 0:
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
        tl.store(partials + tl.program_id(0).to(tl.int64) * out_features + column, total, mask=is_zero)


def ia3_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    out_features: int,
    scale: Tensor,
    bias: Tensor | None,
    scale_input: bool,
) -> Tensor:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    base = Base(weight, absmax, nested_absmax, nested_quant_map, offset, block_size)
    dense = base.dense(out_features, rows.shape[1], x.dtype)
    if scale_input:
        scaled, _ = scale_columns(rows, scale.contiguous())
        y = F.linear(scaled, dense, None if bias is None else bias.to(x.dtype))
    else:
        y = F.linear(rows, dense)
        scale_columns(y, scale.contiguous(), None if bias is None else bias.contiguous(), out=y)
    return y.view(*x.shape[:-1], out_features)


def ia3_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_quant_map: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    scale: Tensor,
    bias: Tensor | None,
    scale_input: bool,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    grad, rows, scale = rows_of(grad_y), rows_of(x), scale.contiguous()
    base = Base(weight, absmax, nested_absmax, nested_quant_map, offset, block_size)
    out_features, in_features = grad.shape[1], rows.shape[1]
    grad_scale = scale.new_empty(scale.shape if need_scale else (0,))
    grad_x = grad_y.new_empty(0)
    if scale_input:
        product = grad @ base.dense(out_features, in_features, grad.dtype)
        result, parts = scale_columns(product, scale, others=rows if need_scale else None, need_out=need_x)
        divisors = None
    else:
        saved = None if y is None or not need_scale else rows_of(y)
        result, parts = scale_columns(grad, scale, others=saved, need_out=need_x)
        divisors = scale
        if parts is not None:
            _replace_zero_columns(parts, rows, grad, base, scale, bias)
        if result is not None:
            result = result @ base.dense(out_features, in_features, grad.dtype)
    if parts is not None:
        sum_parts(parts, grad_scale, divisors)
    if result is not None:
        grad_x = result.view(x.shape)
    return grad_x, grad_scale


def _replace_zero_columns(
    parts: Tensor, rows: Tensor, grad: Tensor, base: Base, scale: Tensor, bias: Tensor | None
) -> None:
    """In the parts of the sums of grad * y, those of columns whose scale is 0 become sums of grad * (x W^T + bias)."""
    wide = rows.dtype == torch.float32  # no tensor cores: both operands lie in registers
    launch(
        _zero_columns,
        (parts.shape[0], triton.cdiv(parts.shape[1], ZERO_COLUMNS)),
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
        rows_per_program(grad.shape[0], grad.shape[1], PASS_COLUMNS),
        num_warps=8 if wide else 4,
        ROWS=ZERO_ROWS,
        COLUMNS=ZERO_COLUMNS,
        DEPTH=16 if wide else 32,
    )


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, size, nf4 in ((torch.bfloat16, 4096, True), (torch.float16, 4095, False), (torch.float32, 4096, True)):
        weight: Any = meta_nf4((size, size)) if nf4 else (empty(size, size, dtype=dtype), *(None,) * 4, 0)
        x, scale, bias = empty(8192, size, dtype=dtype), empty(size), empty(size, dtype=dtype)
        for scale_input in (False, True):
            y = ia3_linear(*(x, *weight, size, scale, bias, scale_input))
            ia3_linear_backward(*(x, x, y, *weight, scale, bias, scale_input, True, True))
