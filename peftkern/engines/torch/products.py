"""Products of wide activations with narrow factors, in torch's ops: what an adapter adds to a linear layer.

A factor in x's dtype is one product of the library. An fp32 factor of 16-bit activations costs no fp32 copy of these:

- where the library multiplies 16 bits into fp32 (CUDA, ROCm), the factor is taken apart into two 16-bit parts, high and
  low, 2^-17 of it in error for bf16, and one product has both;
- elsewhere the product is fp32, in blocks of rows that stay in a cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of fp32 in a block of rows: 1 MB, what a core's cache keeps.
BLOCK_ELEMENTS = 1 << 18
# For devices without such caches, where a block is there to bound memory: 64 MB.
DEVICE_BLOCK_ELEMENTS = 1 << 24


def writes_fp32(x: Tensor) -> bool:
    """Whether the device's library multiplies x's 16 bits into fp32."""
    return x.device.type == "cuda" and x.dtype != torch.float32


def down(x: Tensor, factor: Tensor) -> Tensor:
    """x @ factor^T [rows, rank] in the factor's dtype, for x [rows, columns], factor [rank, columns]."""
    if factor.dtype == x.dtype:
        return x @ factor.t()
    if writes_fp32(x):
        return _halves_added(torch.mm(x, _taken_apart(factor, x.dtype).t(), out_dtype=torch.float32), 1)
    small = x.new_empty((x.shape[0], factor.shape[0]), dtype=factor.dtype)
    for block in _blocks(x):
        torch.mm(x[block].to(factor.dtype), factor.t(), out=small[block])
    return small


def add_up(y: Tensor, small: Tensor, factor: Tensor, scale: float) -> Tensor:
    """y += scale * small @ factor^T, in place, for y [rows, columns], small [rows, rank], factor [columns, rank]."""
    if small.dtype == factor.dtype == y.dtype:
        return y.addmm_(small, factor.t(), alpha=scale)
    if writes_fp32(y):
        smalls, factors = _products_parts(small, factor, y.dtype)
        return y.addmm_(smalls, factors.t(), alpha=scale)
    small, factor = small.to(torch.float32), factor.to(torch.float32)
    for block in _blocks(y):
        y[block].copy_(torch.addmm(y[block].to(torch.float32), small[block], factor.t(), alpha=scale))
    return y


def up(small: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """small @ factor^T [rows, columns] in `dtype`, rounded once."""
    if small.dtype == factor.dtype == dtype:
        return small @ factor.t()
    y = small.new_empty((small.shape[0], factor.shape[0]), dtype=dtype)
    if writes_fp32(y):
        smalls, factors = _products_parts(small, factor, dtype)
        return torch.mm(smalls, factors.t(), out=y)
    small, factor = small.to(torch.float32), factor.to(torch.float32)
    for block in _blocks(y):
        y[block].copy_(small[block] @ factor.t())
    return y


def outer_sums(small: Tensor, x: Tensor, scale: float, dtype: torch.dtype, *, columns_first: bool = False) -> Tensor:
    """scale * small^T @ x [rank, columns] in `dtype`, or its transpose: the sum over the rows of both."""
    first, second = (x, small) if columns_first else (small, x)
    if small.dtype == x.dtype:
        if dtype != x.dtype and writes_fp32(x):
            total = torch.mm(first.t(), second, out_dtype=torch.float32)
        else:
            total = first.t() @ second
    elif writes_fp32(x):
        parts = _taken_apart(small, x.dtype, 1)
        first, second = (x, parts) if columns_first else (parts, x)
        total = _halves_added(torch.mm(first.t(), second, out_dtype=torch.float32), int(columns_first))
    else:
        total = small.new_zeros((first.shape[1], second.shape[1]))
        for block in _blocks(x):
            total.addmm_(first[block].to(small.dtype).t(), second[block].to(small.dtype))
    return total.to(dtype) if scale == 1 else total.mul_(scale).to(dtype)


def column_sums(x: Tensor, others: Tensor | None = None) -> Tensor:
    """The sum of x, or of x * others, over the rows, fp32 [columns] (float64 of float64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if others is None:
        return x.sum(0, dtype=dtype)
    if x.dtype != torch.float16:
        return torch.mul(x, others).sum(0, dtype=dtype)
    total = x.new_zeros(x.shape[1], dtype=dtype)  # a product of fp16 may be more than it holds
    for block in _blocks(x):
        total += torch.mul(x[block].to(dtype), others[block]).sum(0)
    return total


def scaled(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x * scale + bias in x's dtype, rounded once, for a scale and a bias of the columns in any dtype."""
    out = torch.empty_like(x)
    if bias is None:
        return torch.mul(x, scale, out=out)
    return torch.addcmul(bias, x, scale, out=out)


def _taken_apart(factor: Tensor, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """An fp32 factor [m, n] as its high and its low 16-bit part, one after the other along `dim`."""
    size = factor.shape[dim]
    parts = factor.new_empty([size * 2 if i == dim else n for i, n in enumerate(factor.shape)], dtype=dtype)
    high, low = parts.narrow(dim, 0, size), parts.narrow(dim, size, size)
    high.copy_(factor)
    torch.sub(factor, high, out=low)
    return parts


def _products_parts(small: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parts whose product is small @ factor^T, without that of the two low parts, which is below fp32's own error."""
    rank = small.shape[1]
    if small.dtype == dtype:
        return torch.cat((small, small), 1), _taken_apart(factor, dtype, 1)
    if factor.dtype == dtype:
        return _taken_apart(small, dtype, 1), torch.cat((factor, factor), 1)
    smalls, factors = _taken_apart(small, dtype, 1), _taken_apart(factor, dtype, 1)
    high = factors[:, :rank]
    return torch.cat((smalls, smalls[:, :rank]), 1), torch.cat((high, high, factors[:, rank:]), 1)


def _halves_added(both: Tensor, dim: int) -> Tensor:
    high, low = both.chunk(2, dim)
    return high + low


def _blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of rows whose fp32 copy is small."""
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    step = max(1, elements // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))
