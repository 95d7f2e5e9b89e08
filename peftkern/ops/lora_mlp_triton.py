"""lora_mlp in Triton: torch's GEMMs, and between them one pass each way over what lies between gate, up and down.

Forward, the pass adds both low-rank parts and biases to the base products, keeps gate and up in their memory and writes
act(gate) * up. Backward, it adds down's low-rank part to its base product, which gives dp, and writes the gradients of
gate and up and, where something needs it, the product again: into fresh memory, never over what was saved.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._activations_triton import activated, slope
from peftkern.ops._low_rank_triton import low_rank_tile
from peftkern.ops._projections_triton import (
    Adapters,
    add_grad_x,
    given,
    grad_a_of,
    products,
    small_gradients,
    sum_of_products,
)
from peftkern.ops._triton import PARTS, device_of, keep_mask, launch, meta_nf4, rounded
from peftkern.ops._weight_triton import Base, matmul, rows_of


@triton.jit
def completed(
    base,
    h,
    lora_b,
    bias,
    row,
    column,
    rows,
    columns,
    rank,
    h_row,
    b_column,
    b_rank,
    bias_stride,
    scaling,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of base + scaling * h B^T + bias in fp32; `base` points to each of its elements."""
    total = low_rank_tile(
        h, lora_b, row, column, rows, columns, rank, h_row, 1, b_rank, b_column, ROWS, COLUMNS, RANKS, PARTS, ""
    )
    in_base = (row[:, None] < rows) & (column[None, :] < columns)
    total = total * scaling + tl.load(base, mask=in_base, other=0.0).to(tl.float32)
    if bias is not None:
        values = tl.load(bias + column * bias_stride, mask=column < columns, other=0.0)
        total += values.to(tl.float32)[None, :]
    return total


@triton.jit
def _gated(
    out,
    gate,
    up,
    gate_base,
    up_base,
    gate_h,
    up_h,
    gate_b,
    up_b,
    gate_bias,
    up_bias,
    rows,
    columns,
    gate_rank,
    up_rank,
    h_row,
    gate_b_column,
    gate_b_rank,
    up_b_column,
    up_b_rank,
    gate_bias_stride,
    up_bias_stride,
    gate_scaling,
    up_scaling,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    in_out = (row[:, None] < rows) & (column[None, :] < columns)
    element = row[:, None] * columns + column[None, :]
    gate_total = completed(
        gate_base + element,
        gate_h,
        gate_b,
        gate_bias,
        row,
        column,
        rows,
        columns,
        gate_rank,
        h_row,
        gate_b_column,
        gate_b_rank,
        gate_bias_stride,
        gate_scaling,
        ROWS,
        COLUMNS,
        RANKS,
        PARTS,
    )
    up_total = completed(
        up_base + element,
        up_h,
        up_b,
        up_bias,
        row,
        column,
        rows,
        columns,
        up_rank,
        h_row,
        up_b_column,
        up_b_rank,
        up_bias_stride,
        up_scaling,
        ROWS,
        COLUMNS,
        RANKS,
        PARTS,
    )
    # The product is of what is kept, as backward computes it again.
    gate_kept, up_kept = rounded(gate_total, gate), rounded(up_total, up)
    tl.store(gate + element, gate_kept, mask=in_out)
    tl.store(up + element, up_kept, mask=in_out)
    value = activated(gate_kept.to(tl.float32), ACTIVATION) * up_kept.to(tl.float32)
    tl.store(out + element, rounded(value, out), mask=in_out)


@triton.jit
def _gated_backward(
    grad_gate,
    grad_up,
    out,
    base,
    gate,
    up,
    left,
    right,
    seed,
    rows,
    columns,
    rank,
    left_row,
    right_rank,
    right_column,
    factor,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    in_out = (row[:, None] < rows) & (column[None, :] < columns)
    element = row[:, None] * columns + column[None, :]
    grad = low_rank_tile(
        left,
        right,
        row,
        column,
        rows,
        columns,
        rank,
        left_row,
        1,
        right_rank,
        right_column,
        ROWS,
        COLUMNS,
        RANKS,
        PARTS,
        "",
    )
    if seed is not None:
        grad = tl.where(keep_mask(row, first, seed, 0, dropped, ROWS, COLUMNS), grad, 0.0)
    grad = grad * factor + tl.load(base + element, mask=in_out, other=0.0).to(tl.float32)
    gate_value = tl.load(gate + element, mask=in_out, other=0.0).to(tl.float32)
    up_value = tl.load(up + element, mask=in_out, other=0.0).to(tl.float32)
    value = activated(gate_value, ACTIVATION)
    if out is not None:
        tl.store(out + element, rounded(value * up_value, out), mask=in_out)
    tl.store(grad_up + element, rounded(grad * value, grad_up), mask=in_out)
    grad_value = grad * up_value * slope(gate_value, ACTIVATION)
    tl.store(grad_gate + element, rounded(grad_value, grad_gate), mask=in_out)


def _tiles(x: Tensor) -> dict[str, int]:
    """Also of `_gated_backward`: three matrices of fp32 in registers. Warps of 64 threads spill with the wider tile."""
    if not PARTS[x.dtype]:
        return {"ROWS": 32, "COLUMNS": 64, "RANKS": 16, "PARTS": 0, "num_warps": 4}
    rows, columns = (64, 64) if device_of(x).warp_size == 64 else (32, 128)
    return {"ROWS": rows, "COLUMNS": columns, "RANKS": 16, "PARTS": 3, "num_warps": 8}


def _adapters(
    lora_as: list[Tensor], lora_bs: list[Tensor], scalings: list[float], dropout_p: float, seeds: Tensor | None
) -> tuple[Adapters, Adapters]:
    """Of gate and up, and of down."""
    return (
        Adapters(lora_as[:2], lora_bs[:2], scalings[:2], dropout_p, None if seeds is None else seeds[:2]),
        Adapters(lora_as[2:], lora_bs[2:], scalings[2:], dropout_p, None if seeds is None else seeds[2:]),
    )


def lora_mlp(
    x: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    biases: list[Tensor],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    rows = rows_of(x)
    bases = Base.each(w, wf)
    middle = bases[0].out_features
    inner, down = _adapters(lora_as, lora_bs, scalings, dropout_p, seeds)
    h = products(rows, inner)
    inputs = [base.product(rows) for base in bases[:2]]
    gate, linear = (each if each.dtype == x.dtype else torch.empty_like(each, dtype=x.dtype) for each in inputs)
    value = torch.empty_like(gate)
    tiles = _tiles(x)
    launch(
        _gated,
        (triton.cdiv(len(rows), tiles["ROWS"]), triton.cdiv(middle, tiles["COLUMNS"])),
        *(value, gate, linear, *inputs, *(inner.part(h, i) for i in range(2)), *lora_bs[:2], *map(given, biases[:2])),
        *(len(rows), middle, *map(len, lora_as[:2]), h.stride(0), *lora_bs[0].stride(), *lora_bs[1].stride()),
        *(*(bias.stride(0) for bias in biases[:2]), *scalings[:2]),
        **tiles,
        ACTIVATION=activation,
    )
    down_h = products(value, down)
    y = bases[2].extended(value, down_h, lora_bs[2].t(), scalings[2], given(biases[2]))
    y, gate, linear = (t.view(*x.shape[:-1], t.shape[1]) for t in (y, gate, linear))
    return y, gate, linear, torch.cat([h, down_h], 1)


def lora_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    w: list[Tensor],
    wf: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_inner: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`. Gradients that are not needed are empty."""
    rows, grad_rows = rows_of(x), rows_of(grad_y)
    middle = gate.shape[-1]
    bases = Base.each(w, wf)
    inner, down = _adapters(lora_as, lora_bs, scalings, dropout_p, seeds)
    inner_rank, down_rank = h.shape[1] - len(lora_as[2]), len(lora_as[2])
    grad_down_h, grad_bs = small_gradients([grad_rows], h[:, inner_rank:], down, True, need_b)

    product = matmul(grad_rows, bases[2].dense(x.dtype))
    grad_gate, grad_up = (torch.empty_like(saved, memory_format=torch.contiguous_format) for saved in (gate, up))
    needs_product = need_inner or (need_a and down_rank > 0)
    value = torch.empty_like(grad_gate) if needs_product else None
    mask, tiles = down.mask(0), _tiles(x)
    launch(
        _gated_backward,
        (triton.cdiv(len(rows), tiles["ROWS"]), triton.cdiv(middle, tiles["COLUMNS"])),
        *(grad_gate, grad_up, value, product, gate.contiguous(), up.contiguous(), grad_down_h, lora_as[2], mask.seed),
        *(len(rows), middle, down_rank, grad_down_h.stride(0), *lora_as[2].stride(), mask.scale, mask.dropped),
        **tiles,
        ACTIVATION=activation,
    )

    grad_x, grad_a, grad_down_a = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    grad_inner = grad_gate.view(-1, middle), grad_up.view(-1, middle)
    grad_h, inner_grad_bs = small_gradients(grad_inner, h[:, :inner_rank], inner, need_x or need_a, need_b)
    if need_a:
        grad_a = grad_a_of(rows, grad_h, inner)
        product_rows = rows.new_empty((0, middle)) if value is None else value.view(-1, middle)
        grad_down_a = grad_a_of(product_rows, grad_down_h, down)
    if need_x:
        product = sum_of_products((grad, base.dense(x.dtype)) for base, grad in zip(bases, grad_inner))
        grad_x = add_grad_x(product, grad_h, inner, x.dtype).view(x.shape)
    product = x.new_empty(0) if value is None else value
    return grad_x, grad_a, grad_down_a, [*inner_grad_bs, *grad_bs], product, grad_gate, grad_up


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""
    rows, features, middle = 8192, 4096, 14336

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = [meta_nf4(shape) for shape in ((middle, features), (middle, features), (features, middle))]
    lists = ([part for w, _ in weights for part in w], [each for _, wf in weights for each in wf])
    for rank, dtype, activation, dropout_p in (
        (16, torch.bfloat16, "silu", 0.0),
        (64, torch.bfloat16, "gelu", 0.1),
        (16, torch.float16, "gelu_tanh", 0.1),
        (16, torch.float32, "gelu", 0.1),
    ):
        x = empty(rows, features, dtype=dtype)
        lora_as = [empty(rank, columns) for columns in (features, features, middle)]
        lora_bs = [empty(out, rank) for out in (middle, middle, features)]
        adapters = (lora_as, lora_bs, [2.0] * 3)
        biases = [empty(out, dtype=dtype) for out in (middle, middle, features)]
        rest = (activation, dropout_p, empty(3, dtype=torch.int64) if dropout_p else None)
        forward: Any = (x, *lists, *adapters, biases, *rest)
        y, gate, up, h = lora_mlp(*forward)
        backward: Any = (y, x, gate, up, h, *lists, *adapters, *rest, True, True, True, True)
        lora_mlp_backward(*backward)
