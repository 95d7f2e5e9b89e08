"""Products of wide activations with narrow factors, in torch's ops: what an adapter adds to a linear layer.

A factor in x's dtype is one product of the library. An fp32 factor of 16-bit activations costs no fp32 copy of these:

- where the library multiplies 16 bits into fp32 (CUDA, ROCm), fp32 numbers are taken apart into two 16-bit parts, high
  and low, 2^-17 of them in error for bf16, and one product has both;
- elsewhere, and for few rows, where launches are what costs, the product is fp32, in blocks of rows: of a size that
  stays in a core's cache, or for other devices a bound on memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block of rows that is copied to fp32: 1 MB on the CPU, 64 MB elsewhere.
BLOCK_ELEMENTS = 1 << 18
DEVICE_BLOCK_ELEMENTS = 1 << 24
# With no more elements of x, an fp32 copy of it takes less time than the launches that parts would need.
FEW_ELEMENTS = 1 << 20


def takes_parts(x: Tensor) -> bool:
    """Whether what is fp32 is taken apart to be multiplied with x."""
    return x.device.type == "cuda" and x.dtype != torch.float32 and x.numel() > FEW_ELEMENTS


class Small:
    """[rows, rank] that is multiplied more than once: its parts are made once, in the dtype of what it meets.

    `parts` is [rows, 3 * rank]: high, high, low.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._parts: Tensor | None = None

    @staticmethod
    def of(values: "Tensor | Small") -> "Small":
        """What is multiplied once may be given as a tensor."""
        return values if isinstance(values, Small) else Small(values)

    def parts(self, dtype: torch.dtype) -> Tensor:
        """High, high and low side by side; of 16-bit values low is zero."""
        if self._parts is None:
            rows, rank = self.values.shape
            parts = self.values.new_empty((rows, 3, rank), dtype=dtype)
            parts[:, :2].copy_(self.values.unsqueeze(1).expand(rows, 2, rank))
            torch.sub(self.values, parts[:, 0], out=parts[:, 2])
            self._parts = parts.view(rows, 3 * rank)
        return self._parts


def down(x: Tensor, factor: Tensor) -> Tensor:
    """x @ factor^T [rows, rank] in the factor's dtype, for x [rows, columns], factor [rank, columns]."""
    if factor.dtype == x.dtype:
        return x @ factor.t()
    if takes_parts(x):
        rank = factor.shape[0]
        parts = factor.new_empty((2 * rank, factor.shape[1]), dtype=x.dtype)
        parts[:rank].copy_(factor)
        torch.sub(factor, parts[:rank], out=parts[rank:])
        return _halves_added(torch.mm(x, parts.t(), out_dtype=torch.float32), 1)
    small = x.new_empty((x.shape[0], factor.shape[0]), dtype=factor.dtype)
    for block in _blocks(x):
        torch.mm(x[block].to(factor.dtype), factor.t(), out=small[block])
    return small


def add_up(y: Tensor, small: Tensor | Small, factor: Tensor, scale: float) -> Tensor:
    """y += scale * small @ factor^T, in place, for y [rows, columns] and factor [columns, rank]."""
    small = Small.of(small)
    values = small.values
    if values.dtype == factor.dtype == y.dtype:
        return y.addmm_(values, factor.t(), alpha=scale)
    if takes_parts(y):
        return y.addmm_(small.parts(y.dtype), _factor_parts(factor, y.dtype).t(), alpha=scale)
    values, factor = values.to(torch.float32), factor.to(torch.float32)
    for block in _blocks(y):
        y[block].copy_(torch.addmm(y[block].to(torch.float32), values[block], factor.t(), alpha=scale))
    return y


def up(small: Tensor | Small, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """small @ factor^T [rows, columns] in `dtype`, rounded once."""
    small = Small.of(small)
    values = small.values
    if values.dtype == factor.dtype == dtype:
        return values @ factor.t()
    y = values.new_empty((values.shape[0], factor.shape[0]), dtype=dtype)
    if takes_parts(y):
        return torch.mm(small.parts(dtype), _factor_parts(factor, dtype).t(), out=y)
    values, factor = values.to(torch.float32), factor.to(torch.float32)
    for block in _blocks(y):
        y[block].copy_(values[block] @ factor.t())
    return y


def outer_sums(
    small: Tensor | Small, x: Tensor, scale: float, dtype: torch.dtype, *, columns_first: bool = False
) -> Tensor:
    """scale * small^T @ x [rank, columns] in `dtype`, or its transpose: the sum over the rows of both."""
    small = Small.of(small)
    values = small.values
    first, second = (x, values) if columns_first else (values, x)
    if values.dtype == x.dtype:
        if dtype != x.dtype and takes_parts(x):
            total = torch.mm(first.t(), second, out_dtype=torch.float32)
        else:
            total = first.t() @ second
    elif takes_parts(x):
        parts = small.parts(x.dtype)[:, values.shape[1] :]
        first, second = (x, parts) if columns_first else (parts, x)
        total = _halves_added(torch.mm(first.t(), second, out_dtype=torch.float32), int(columns_first))
    else:
        products = [first[block].to(values.dtype).t() @ second[block].to(values.dtype) for block in _blocks(x)] or [
            values.new_zeros((first.shape[1], second.shape[1]))
        ]
        total = products[0]
        for product in products[1:]:
            total += product
    return total.to(dtype) if scale == 1 else total.mul_(scale).to(dtype)


def column_sums(x: Tensor, others: Tensor | None = None) -> Tensor:
    """The sum of x, or of x * others, over the rows, fp32 [columns]."""
    if others is None:
        return x.sum(0, dtype=torch.float32)
    if x.dtype != torch.float16:
        return torch.mul(x, others).sum(0, dtype=torch.float32)
    total = x.new_zeros(x.shape[1], dtype=torch.float32)  # a product of fp16 may be more than it holds
    for block in _blocks(x):
        total += torch.mul(x[block].to(torch.float32), others[block]).sum(0)
    return total


def scaled(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x * scale + bias in x's dtype, rounded once, for a scale and a bias of the columns in any dtype."""
    out = torch.empty_like(x)
    if bias is None:
        return torch.mul(x, scale, out=out)
    return torch.addcmul(bias, x, scale, out=out)


def _factor_parts(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[columns, 3 * rank]: high, low, high. With `Small.parts` all but the product of the two low parts."""
    columns, rank = factor.shape
    parts = factor.new_empty((columns, 3, rank), dtype=dtype)
    parts[:, ::2].copy_(factor.unsqueeze(1).expand(columns, 2, rank))
    torch.sub(factor, parts[:, 0], out=parts[:, 1])
    return parts.view(columns, 3 * rank)


def _halves_added(both: Tensor, dim: int) -> Tensor:
    high, low = both.chunk(2, dim)
    return high + low


def _blocks(x: Tensor) -> Iterator[slice]:
    """Ranges of rows whose fp32 copy is small."""
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    step = max(1, elements // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))
