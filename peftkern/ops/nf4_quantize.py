"""nf4_quantize: a dense weight to 4-bit NormalFloat codes, one scale per block (QLoRA, arXiv 2305.14314, section 3).

Formula, per block of `block_size` elements of the flattened weight, in fp32:
    absmax = max |w|;  code = index of the table value nearest to w * (1 / absmax), ties to the lower index
and in a last block that the end of the weight cuts short w / absmax. Double quantisation: offset = mean(absmax);
absmax - offset is quantised to 8 bits in blocks of 256 with a signed dynamic map (Dettmers et al., arXiv 2110.02861).
Every byte is that of bitsandbytes 0.50.2 on the CPU; from 32768 blocks on, given the same offset.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftkern import backends
from peftkern._native import caps, ops
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import FLOATING
from peftkern.ops._op import Op

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
NF4_VALUES = tuple(caps.nf4_codebook())
ZERO_CODE = 7
# torch sums up to this many elements in one order, more by thread.
SERIAL_SUM = 32768
# Below these, absmax is taken as this: 1 / absmax would be too coarse (bitsandbytes' bound) or infinite.
MIN_ABSMAX = 1e-38
MIN_NESTED_ABSMAX = 3e-39
GRID_SIZE = 65536
# Elements that the torch engine quantises at once, a multiple of every block size: an int64 index of 64 MB.
CHUNK_ELEMENTS = 1 << 23


def codebook() -> Tensor:
    """The 16 NF4 values, fp32, ascending."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device="cpu")


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map, fp32, ascending. Shared: copy it before giving it away."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        midpoints = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - 6)
        values += midpoints.tolist() + (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def ceil_divide(n: int, d: int) -> int:
    return -(-n // d)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest table entry, ties to the lower index."""
    midpoints = (table[:-1] + table[1:]) / 2
    return torch.bucketize(values, midpoints.to(values.device), right=False)


def codes_reference(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """codes (ceil(n / 2), 1) and flat absmax (blocks,) of a dense weight."""
    flat = weight.to(torch.float32).flatten()
    whole = flat.numel() // block_size * block_size
    blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=MIN_ABSMAX)).unsqueeze(1)).flatten()
    if rest.numel():
        rest_absmax = rest.abs().amax().clamp(min=MIN_ABSMAX)
        scaled = torch.cat((scaled, rest / rest_absmax))
        absmax = torch.cat((absmax, rest_absmax.unsqueeze(0)))
    codes = _nearest(scaled, codebook())
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=ZERO_CODE)
    return (codes[0::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1), absmax


def _codes_in_chunks(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`codes_reference` with temporaries that do not grow with the weight."""
    chunks = [codes_reference(chunk, block_size) for chunk in weight.reshape(-1).split(CHUNK_ELEMENTS)]
    codes, absmax = zip(*chunks)
    return torch.cat(codes), torch.cat(absmax)


def nested_reference(absmax: Tensor, quant_map: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit absmax (blocks,) and its scales (ceil(blocks / 256),).

    bitsandbytes' CPU quantiser: the scaled value is rounded to a grid of 65536 points, then to the map's nearest entry.
    """
    blocks = ceil_divide(absmax.numel(), NESTED_BLOCK_SIZE)
    difference = torch.nn.functional.pad(absmax - offset, (0, blocks * NESTED_BLOCK_SIZE - absmax.numel()))
    difference = difference.view(blocks, NESTED_BLOCK_SIZE)
    nested_absmax = difference.abs().amax(dim=1)
    scaled = difference * (1.0 / nested_absmax.clamp(min=MIN_NESTED_ABSMAX)).unsqueeze(1)
    position = ((scaled + 1.0) * 0.5 * (GRID_SIZE - 1) + 0.5).long()
    grid = -1.0 + torch.arange(0, 2 * GRID_SIZE, 2, dtype=torch.float32, device=absmax.device) / (GRID_SIZE - 1)
    nearest = _nearest(grid, quant_map).to(torch.uint8)
    quantized = torch.where(nested_absmax.unsqueeze(1) == 0, 0, nearest[position])
    return quantized.flatten()[: absmax.numel()], nested_absmax


def _mean(absmax: Tensor) -> Tensor:
    """0-d mean that does not depend on the number of threads: torch's own up to SERIAL_SUM elements."""
    if absmax.numel() <= SERIAL_SUM:
        return absmax.mean()
    return torch.stack([chunk.sum() for chunk in absmax.split(SERIAL_SUM)]).sum() / absmax.numel()


def _quantize(weight: Tensor, block_size: int, double_quant: bool, quantize: Any, quantize_absmax: Any) -> NF4Weight:
    """NF4Weight by the two functions given: a weight's codes and absmax, and an absmax's bytes."""
    codes, absmax = quantize(weight.detach().to(_native_dtype(weight.dtype)), block_size)
    # A block with NaN or infinity has it as its absmax.
    if not math.isfinite(absmax.amax().item()):
        raise ValueError("nf4_quantize: weight must be finite in fp32, got NaN or infinity")
    if not double_quant:
        return NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, block_size)
    quant_map = dynamic_map().to(weight.device, copy=True)
    offset = _mean(absmax)
    quantized, nested_absmax = quantize_absmax(absmax, quant_map, offset)
    return NF4Weight(codes, quantized, nested_absmax, quant_map, offset, weight.shape, weight.dtype, block_size)


def _native_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def check_block_size(op: str, block_size: Any) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")


def _check(weight: Any, block_size: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"nf4_quantize: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dtype not in FLOATING:
        raise TypeError(f"nf4_quantize: weight must be {' or '.join(map(str, FLOATING))}, got {weight.dtype}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"nf4_quantize: weight must have shape [out, in], not empty, got {list(weight.shape)}")
    check_block_size("nf4_quantize", block_size)


def nf4_quantize_reference(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """`nf4_quantize` in plain torch."""
    return _quantize(weight, block_size, double_quant, codes_reference, nested_reference)


def nf4_quantize(
    weight: Tensor, block_size: int = 64, double_quant: bool = True, *, backend: str | None = None
) -> NF4Weight:
    """Quantises a dense weight to NF4 (QLoRA, arXiv 2305.14314, section 3), byte for byte as bitsandbytes does.

    Args:
        weight: [out, in], fp32, bf16, fp16 or float64 (through fp32), finite. Not differentiable.
        block_size: elements per absmax, a power of two from 32 to 4096. Blocks run over the flattened weight.
        double_quant: quantise absmax itself to 8 bits, in blocks of 256.
        backend: "reference", "torch", "cpu" or "cuda"; by default the fastest that runs.

    Raises:
        TypeError, ValueError: wrong dtype, shape or block size; a weight with NaN or infinity.
        RuntimeError: a backend that cannot run this weight.
    """
    _check(weight, block_size)
    converted = weight.new_empty(0, dtype=_native_dtype(weight.dtype))
    implementation = backends.choose("nf4_quantize", converted, backend).implementation
    if implementation == "reference":
        return nf4_quantize_reference(weight, block_size, double_quant)
    if implementation == "torch":
        return _quantize(weight, block_size, double_quant, _codes_in_chunks, nested_reference)
    return _quantize(weight, block_size, double_quant, ops.nf4_quantize, ops.nf4_quantize_absmax)


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    weight = call.weight
    codes = weight.new_empty((ceil_divide(weight.numel(), 2), 1), dtype=torch.uint8)
    return codes, weight.new_empty(ceil_divide(weight.numel(), call.block_size), dtype=torch.float32)


def _fake_absmax(call: Any) -> tuple[Tensor, Tensor]:
    absmax = call.absmax
    nested_blocks = ceil_divide(absmax.numel(), NESTED_BLOCK_SIZE)
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(nested_blocks)


Op("nf4_quantize", _fake)
Op("nf4_quantize_absmax", _fake_absmax)
