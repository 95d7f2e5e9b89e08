"""NF4 decoded by torch's ops: one look-up a byte in a table of pairs, one product with the block's scale.

bitsandbytes' own op runs instead where it has one for the device: its bytes are ours. A weight is a list of tensors
and four integers, as `peftkern.ops._linear.parts_of` makes them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern._native import caps
from peftkern._native import ops as native_ops
from peftkern.nf4 import NF4Weight

NESTED_BLOCK_SIZE = 256
DENSE, NF4 = 0, 1


class Kind(NamedTuple):
    """How a weight's parts are to be read."""

    format: int
    block_size: int

    def weight(self, parts: Sequence[Tensor], out_features: int, in_features: int) -> "Weight":
        return Weight(tuple(parts), self.format, self.block_size, out_features, in_features)


class Weight(NamedTuple):
    """A frozen weight [out, in].

    Attributes:
        parts: (dense,) or (codes, absmax) or (codes, absmax, nested_absmax, nested_quant_map, offset).
        format: DENSE or NF4.
        block_size: elements per scale.
        out_features, in_features: of the dense weight.
    """

    parts: tuple[Tensor, ...]
    format: int
    block_size: int
    out_features: int
    in_features: int

    @staticmethod
    def of(weight: "Tensor | NF4Weight") -> "Weight":
        """A dense [out, in] or an NF4Weight; no byte is copied."""
        if isinstance(weight, NF4Weight):
            parts = tuple(part for part in weight.tensors if part is not None)
            return Weight(parts, NF4, weight.block_size, *weight.shape)
        return Weight((weight,), DENSE, 0, *weight.shape)

    @property
    def kind(self) -> "Kind":
        return Kind(self.format, self.block_size)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`; a temporary, unless the weight is dense and of this dtype."""
        if self.format == DENSE:
            return self.parts[0].to(dtype)
        return decode(self.parts, self.block_size, (self.out_features, self.in_features), dtype)

    def rows(self, start: int, stop: int) -> "Weight":
        """Rows `start` to `stop`; of an NF4 weight at multiples of `row_step`."""
        if self.format == DENSE:
            return self._replace(parts=(self.parts[0][start:stop],), out_features=stop - start)
        first, last = start * self.in_features, stop * self.in_features
        codes, absmax, *nested = self.parts
        blocks = first // self.block_size, -(-last // self.block_size)
        parts: tuple[Tensor, ...] = codes.view(-1)[first // 2 : -(-last // 2)], absmax[slice(*blocks)]
        if nested:
            groups = blocks[0] // NESTED_BLOCK_SIZE, -(-blocks[1] // NESTED_BLOCK_SIZE)
            parts = *parts, nested[0][slice(*groups)], *nested[1:]
        return self._replace(parts=parts, out_features=stop - start)

    @property
    def row_step(self) -> int:
        """Rows at whose multiples a byte, a block and a group of nested scales begin."""
        if self.format == DENSE:
            return 1
        group = self.block_size * (NESTED_BLOCK_SIZE if len(self.parts) > 2 else 1)
        common, rest = group, self.in_features  # their greatest common divisor: torch.compile cannot trace math's
        while rest:
            common, rest = rest, common % rest
        return group // common


def decode(parts: Sequence[Tensor], block_size: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`, at most 13 bytes of traffic an element for 16 bits."""
    codes, absmax, *nested = parts
    numel, blocks = shape[0] * shape[1], absmax.numel()
    if not numel:
        return codes.new_empty(shape, dtype=dtype)
    route = route_of(codes.device)
    if route == "cpu" and dtype != torch.float64:
        format = [NF4, block_size, *shape, len(parts)]
        return native_ops.nf4_dequantize(list(parts), format, dtype)  # type: ignore[no-any-return]
    if route == "bitsandbytes" and dtype != torch.float64:
        return _by_bitsandbytes(codes, absmax, nested, block_size, shape, dtype)
    scale = _scales(absmax, nested, blocks)
    pairs, factor = pair_table(codes.device, dtype)
    values = torch.index_select(pairs, 0, codes.view(-1).int()).view(dtype)
    if factor != 1.0:
        scale = scale * (1 / factor)
    if numel % block_size == 0:
        out = torch.empty((blocks, block_size), dtype=dtype, device=codes.device)
        torch.mul(values[:numel].view(blocks, block_size), scale.view(-1, 1), out=out)
        return out.view(shape)
    spread = scale.view(-1).repeat_interleave(block_size, output_size=blocks * block_size)[:numel]
    return torch.mul(values[:numel], spread, out=torch.empty(numel, dtype=dtype, device=codes.device)).view(shape)


def _scales(absmax: Tensor, nested: Sequence[Tensor], blocks: int) -> Tensor:
    """The fp32 scale of every block: product and sum are rounded one by one, as bitsandbytes has them."""
    if not nested:
        return absmax
    nested_absmax, quant_map, offset = nested
    values = torch.index_select(quant_map, 0, absmax.view(-1).int())
    if blocks % NESTED_BLOCK_SIZE == 0:
        return values.view(-1, NESTED_BLOCK_SIZE).mul_(nested_absmax.view(-1, 1)).add_(offset)
    groups = -(-blocks // NESTED_BLOCK_SIZE)
    spread = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE, output_size=groups * NESTED_BLOCK_SIZE)
    return values.mul_(spread[:blocks]).add_(offset)


def _by_bitsandbytes(
    codes: Tensor, absmax: Tensor, nested: Sequence[Tensor], block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    library = torch.ops.bitsandbytes
    if nested:
        nested_absmax, quant_map, offset = nested
        arguments = (absmax.view(-1), nested_absmax, quant_map, NESTED_BLOCK_SIZE, torch.float32)
        absmax = library.dequantize_blockwise.default(*arguments).add_(offset)
    return library.dequantize_4bit.default(codes, absmax, block_size, "nf4", shape, dtype)  # type: ignore[no-any-return]


def route_of(device: torch.device) -> str:
    """What decodes on a device: "cpu" (our kernel), "bitsandbytes" or "gather"."""
    if device.type == "cpu":
        return "cpu"
    return "bitsandbytes" if _has_bitsandbytes(device.type) else "gather"


def explained(device: torch.device) -> str:
    """What decodes NF4 on a device, in words."""
    words = {"cpu": "our kernel", "bitsandbytes": "bitsandbytes' op", "gather": "a look-up in torch's ops"}
    return f"NF4 decoded by {words[route_of(device)]}"


@functools.cache
def _has_bitsandbytes(kind: str) -> bool:
    """Whether bitsandbytes is installed, whole, and has a kernel of its own for devices of this kind."""
    key = {"cuda": "CUDA", "xpu": "XPU", "hpu": "HPU", "mps": "MPS"}.get(kind)
    if key is None:
        return False
    try:
        import bitsandbytes  # noqa: F401 -- for its ops
    except Exception:  # a broken install fails in many ways, none of which is ours
        return False
    ops = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for op in ops)


def pair_table(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The two values of every byte as one integer each, [256], and what they are scaled by.

    Of 16 bits the scaled values of docs/numerics.md: rounding the plain ones leaves an error that is common to all.
    """
    key = device, dtype
    found = _TABLES.get(key)
    if found is None:
        found = _made_table(device, dtype)
        if not _is_fake(found[0]):
            _TABLES[key] = found
    return found


_TABLES: dict[tuple[torch.device, torch.dtype], tuple[Tensor, float]] = {}


def _is_fake(tensor: Any) -> bool:
    return type(tensor) is not Tensor


def _made_table(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    factor = 1.0
    if dtype in (torch.bfloat16, torch.float16):
        bits, factor = caps.nf4_scaled_codebook(str(dtype).removeprefix("torch."))
        pairs = torch.tensor([low << 16 | high for high in bits for low in bits], dtype=torch.int64, device="cpu")
        pairs = torch.where(pairs >= 1 << 31, pairs - (1 << 32), pairs).to(torch.int32)
    else:
        values = torch.tensor(caps.nf4_codebook(), dtype=dtype, device="cpu")
        both = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1)
        pairs = both.view(torch.int64 if dtype == torch.float32 else torch.complex128).view(256)
    return pairs.to(device), factor
