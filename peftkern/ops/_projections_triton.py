"""Several projections on one input in Triton, for lora_qkv and lora_mlp.

Without dropout the adapters of one input are one adapter of their ranks together: one pass over x for h, one for dA.
With dropout each has a mask, which costs more to make than x to read, and a pass of its own over x. The gradients of x
are added in one pass and rounded once either way.

Backward, small gradients lie side by side, each adapter's `width` wide: the longest rank, padded to a multiple of 16,
so that rows begin where the compiler knows them to.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from peftkern.ops._low_rank_triton import down, up
from peftkern.ops._projections import stacked_dtype
from peftkern.ops._reduce_triton import padded, reduce
from peftkern.ops._triton import NO_MASK, Mask, mask_of
from peftkern.ops._weight_triton import matmul


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

    def mask(self, index: int) -> Mask:
        return NO_MASK if self.seeds is None else mask_of(self.dropout_p, self.seeds[index])

    def part(self, h: Tensor, index: int) -> Tensor:
        """One adapter's columns of h [rows, sum of ranks]."""
        first = sum(len(lora_a) for lora_a in self.lora_as[:index])
        return h[:, first : first + len(self.lora_as[index])]


def given(bias: Tensor) -> Tensor | None:
    """Biases that are missing have no elements in an op's schema."""
    return bias if bias.numel() else None


def products(x: Tensor, adapters: Adapters) -> Tensor:
    """h [rows, sum of ranks] in fp32, from x [rows, in]."""
    if adapters.seeds is None:
        return down(x, torch.cat(list(adapters.lora_as)).t()).small
    parts = [down(x, lora_a.t(), mask=adapters.mask(i)).small for i, lora_a in enumerate(adapters.lora_as)]
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


def small_gradients(
    grad_ys: Sequence[Tensor], h: Tensor, adapters: Adapters, need_h: bool, need_b: bool
) -> tuple[Tensor, list[Tensor]]:
    """Those of h, [rows, present adapters * width], and of every B, in one pass over each grad_y [rows, out].

    The first has no columns, the second no entries, if it is not needed.
    """
    width, present = adapters.width, adapters.present
    grad_h = h.new_zeros((len(h), width * len(present) if need_h else 0))
    grad_bs = [torch.empty_like(lora_b, memory_format=torch.contiguous_format) for lora_b in adapters.lora_bs]
    for place, i in enumerate(present if need_h or need_b else []):
        lora_b = adapters.lora_bs[i]
        small = adapters.part(h, i) if need_b else None
        small, grad_bs[i] = reduce(
            grad_ys[i], small, lora_b if need_h else None, adapters.scalings[i], dtype=lora_b.dtype
        )
        if need_h:
            grad_h[:, place * width : place * width + lora_b.shape[1]] = small
    return grad_h, grad_bs if need_b else []


def grad_a_of(x: Tensor, grad_h: Tensor, adapters: Adapters) -> Tensor:
    """Of every A, one below the other: [sum of ranks, in]."""
    width, present = adapters.width, adapters.present
    if not present:
        return x.new_empty((0, x.shape[1]), dtype=stacked_dtype(adapters.lora_as))
    if adapters.seeds is None:
        parts = reduce(x, grad_h, transposed=True)[1].split(width)
    else:
        small = grad_h.split(width, 1)
        parts = [reduce(x, small[k], mask=adapters.mask(i), transposed=True)[1] for k, i in enumerate(present)]
    rows = [part[: len(adapters.lora_as[i])] for i, part in zip(present, parts)]
    return torch.cat(rows).to(stacked_dtype(adapters.lora_as))


def add_grad_x(base: Tensor, grad_h: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """base + the sum of mask * (dh A) over the adapters, rounded once to `dtype`; in base's memory if that fits."""
    present, width = adapters.present, adapters.width
    if not present:
        return base.to(dtype)
    right = torch.cat([padded(adapters.lora_as[i], 0, width) for i in present])
    if adapters.seeds is None:
        return up(grad_h, right, dtype, outer=base)
    seeds = torch.stack([adapters.seeds[i] for i in present])
    mask = mask_of(adapters.dropout_p, seeds)
    return up(grad_h, right, dtype, mask=mask, adapters=len(present), outer=base)
