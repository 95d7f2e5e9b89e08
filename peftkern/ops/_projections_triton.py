"""Triton kernels and launches of several projections on one input, for lora_qkv and lora_mlp.

Without dropout the adapters of one input are one adapter of their ranks together: one pass over x for h, one for dA.
With dropout each has a mask, which costs more to make than x to read, and a pass of its own over x. The gradients of x
are added in one pass and rounded once either way.

Backward, small gradients lie side by side, each adapter's `width` wide: the longest rank, padded to a multiple of 16,
so that rows begin where the compiler knows them to.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._dropout import keep_scale, threshold
from peftkern.ops._low_rank_triton import PARTS, Dropout, low_rank_tile, project, reduce, sum_partials
from peftkern.ops._projections import stacked_dtype
from peftkern.ops._triton import keep_mask, launch, rounded
from peftkern.ops._weight_triton import Parts, base_product, dense, matmul


class Adapters(NamedTuple):
    """Those of several projections on one input; `seeds` [adapters] are None where nothing is dropped."""

    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    scalings: Sequence[float]
    dropout_p: float
    seeds: Tensor | None

    @property
    def present(self) -> list[int]:
        """The projections that have one; the others' have rank 0."""
        return [i for i, lora_a in enumerate(self.lora_as) if len(lora_a)]

    @property
    def width(self) -> int:
        """Of each present adapter's columns in small gradients."""
        return triton.cdiv(max(map(len, self.lora_as)), 16) * 16

    def dropout(self, index: int) -> Dropout:
        return Dropout() if self.seeds is None else Dropout(self.dropout_p, self.seeds[index])

    def part(self, h: Tensor, index: int) -> Tensor:
        """One adapter's columns of h [rows, sum of ranks]."""
        first = sum(len(lora_a) for lora_a in self.lora_as[:index])
        return h[:, first : first + len(self.lora_as[index])]


class Weights(NamedTuple):
    """The lists of an op's schema, see `native_projections`."""

    weights: Sequence[Tensor]
    scales: Sequence[Tensor]
    scale_counts: Sequence[int]
    block_sizes: Sequence[int]

    def parts(self, index: int) -> tuple[Tensor, Parts, int]:
        """One weight or its codes, its scales and its block size."""
        first = sum(self.scale_counts[:index])
        scales: list[Tensor | None] = [*self.scales[first : first + self.scale_counts[index]], None, None, None, None]
        return self.weights[index], (scales[0], scales[1], scales[2], scales[3]), self.block_sizes[index]

    def product(self, index: int, x: Tensor, out_features: int) -> Tensor:
        """x [rows, in] times the weight's transpose."""
        return base_product(x, *self.parts(index), out_features)

    def dense(self, index: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as torch's GEMM takes it."""
        return dense(*self.parts(index), shape, dtype)


def given(bias: Tensor) -> Tensor | None:
    """Biases that are missing have no elements in an op's schema."""
    return bias if bias.numel() else None


@triton.jit
def _add_products(
    out,
    base,
    left,
    right,
    seeds,
    rows,
    columns,
    count,
    width,
    left_row,
    factor,
    dropped,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    in_out = (row[:, None] < rows) & (column[None, :] < columns)
    element = row[:, None] * columns + column[None, :]
    total = tl.load(base + element, mask=in_out, other=0.0).to(tl.float32)
    for index in range(count):
        shift = tl.cast(index, tl.int64) * width
        part = low_rank_tile(
            left + shift,
            right + shift * columns,
            row,
            column,
            rows,
            columns,
            width,
            left_row,
            columns,
            1,
            ROWS,
            COLUMNS,
            RANKS,
            PARTS,
        )
        if seeds is not None:
            part = tl.where(keep_mask(row, first, seeds + index, 0, dropped, ROWS, COLUMNS), part, 0.0)
        total += part * factor
    tl.store(out + element, rounded(total, out), mask=in_out)


def products(x: Tensor, adapters: Adapters) -> Tensor:
    """h [rows, sum of ranks] in fp32, from x [rows, in]."""
    if adapters.seeds is None:
        return project(x, torch.cat(list(adapters.lora_as)).t(), Dropout())
    parts = [project(x, lora_a.t(), adapters.dropout(i)) for i, lora_a in enumerate(adapters.lora_as)]
    return torch.cat(parts, 1)


def sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of x @ weight, in the dtype that holds all; rounded after each, and each weight made when it is used."""
    total: Tensor | None = None
    for x, weight in pairs:
        if total is None:
            total = matmul(x, weight)
        else:
            dtype = torch.promote_types(total.dtype, torch.promote_types(x.dtype, weight.dtype))
            total = torch.addmm(total.to(dtype), x.to(dtype), weight.to(dtype))
    assert total is not None
    return total


def padded(tensor: Tensor, dim: int, width: int) -> Tensor:
    """Zeros after its entries, contiguous."""
    missing = width - tensor.shape[dim]
    return F.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing)).contiguous()


def small_gradients(
    grad_ys: Sequence[Tensor], h: Tensor, adapters: Adapters, need_h: bool, need_b: bool
) -> tuple[Tensor, list[Tensor]]:
    """Those of h, [rows, present adapters * width], and of every B, in one pass over each grad_y [rows, out].

    The first has no columns, the second no entries, if it is not needed.
    """
    width, present = adapters.width, adapters.present
    grad_h = h.new_empty((len(h), width * len(present) if need_h else 0))
    grad_bs = [torch.empty_like(lora_b, memory_format=torch.contiguous_format) for lora_b in adapters.lora_bs]
    for place, i in enumerate(present if need_h or need_b else []):
        lora_b, scaling = adapters.lora_bs[i], adapters.scalings[i]
        small = padded(adapters.part(h, i), 1, width) if need_b else None
        partials, grad_partials = reduce(grad_ys[i], small, padded(lora_b, 1, width) if need_h else None, Dropout())
        if partials is not None:
            grad_h[:, place * width : (place + 1) * width] = sum_partials(partials, scaling)
        if grad_partials is not None:
            grad_bs[i].copy_(sum_partials(grad_partials, scaling)[:, : lora_b.shape[1]])
    return grad_h, grad_bs if need_b else []


def grad_a_of(x: Tensor, grad_h: Tensor, adapters: Adapters) -> Tensor:
    """Of every A, one below the other: [sum of ranks, in]."""
    width, present = adapters.width, adapters.present
    if not present:
        return x.new_empty((0, x.shape[1]), dtype=stacked_dtype(adapters.lora_as))
    if adapters.seeds is None:
        _, partials = reduce(x, grad_h, None, Dropout(), transposed=True)
        assert partials is not None
        parts = list(sum_partials(partials).split(width))
    else:
        parts = []
        for i, small in zip(present, grad_h.split(width, 1)):
            dropout = adapters.dropout(i)
            _, partials = reduce(x, small, None, dropout, transposed=True)
            assert partials is not None
            parts.append(sum_partials(partials, dropout.scale))
    rows = [part[: len(adapters.lora_as[i])] for i, part in zip(present, parts)]
    return torch.cat(rows).to(stacked_dtype(adapters.lora_as))


def add_grad_x(base: Tensor, grad_h: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """base + the sum of mask * (dh A) over the adapters, rounded once to `dtype`; in base's memory if that fits."""
    present, width = adapters.present, adapters.width
    if not present:
        return base.to(dtype)
    rows, columns = base.shape
    out = base if base.dtype == dtype else base.new_empty(base.shape, dtype=dtype)
    right = torch.cat([padded(adapters.lora_as[i], 0, width) for i in present])
    parts = 3 if PARTS[dtype] else 0
    tile_rows, tile_columns = (64, 128) if parts else (32, 64)
    seeds, count, dropout = None, 1, (1.0, 0)
    if adapters.seeds is not None:
        seeds, count = torch.stack([adapters.seeds[i] for i in present]), len(present)
        dropout = keep_scale(adapters.dropout_p), threshold(adapters.dropout_p)
    launch(
        _add_products,
        (triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)),
        *(out, base, grad_h, right, seeds, rows, columns, count, len(right) // count, grad_h.stride(0), *dropout),
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        RANKS=16,
        PARTS=parts,
        num_warps=4 if seeds is None else 8,
    )
    return out
