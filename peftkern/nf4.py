"""NF4Weight: a 4-bit weight as a value, in the byte layout of bitsandbytes and QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight matrix in NF4: one 4-bit code per element and one scale (absmax) per block of the flattened matrix.

    Not a torch.Tensor: `F.linear(x, q)` works, any other torch function raises and names `dequantize`.

    Attributes:
        codes: uint8 (ceil(n / 2), 1). Element 2i is the high nibble of byte i; an odd last low nibble is code 7 (zero).
        absmax: fp32 (blocks,), or uint8 (blocks,) when nested.
        nested_absmax: fp32 (ceil(blocks / 256),), the scales of `absmax` when nested, else None.
        nested_quant_map: fp32 (256,), the 8-bit code's values when nested, else None.
        offset: fp32 0-d, the mean that nesting subtracted, else None.
        shape: of the dense weight, (out_features, in_features).
        dtype: of the dense weight, what `dequantize()` gives by default.
        block_size: elements per absmax.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """codes, absmax, nested_absmax, nested_quant_map, offset: the order every native op takes them in."""
        return self.codes, self.absmax, self.nested_absmax, self.nested_quant_map, self.offset

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantised to 8 bits (double quantisation)."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def numel(self) -> int:
        return self.shape.numel()

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same bytes on another device. There is no `.to(dtype)`: the format fixes every dtype."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device=device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return replace(self, **moved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, `code * absmax` in fp32 and rounded once to `dtype` (default: the weight's own)."""
        from peftkern.ops.nf4_dequantize import nf4_dequantize

        return nf4_dequantize(self, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            return _functional_linear(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise TypeError(f"NF4Weight: torch function {name!r} is not defined on 4-bit codes; use .dequantize() first")

    def __repr__(self) -> str:
        nested = ", nested" if self.nested else ""
        return f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, block_size={self.block_size}{nested})"


def _functional_linear(input: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """F.linear, with its names."""
    from peftkern.ops.nf4_linear import nf4_linear

    return nf4_linear(input, weight, bias)
