"""nf4_quantize: a dense weight to 4-bit NormalFloat codes with one scale per block (QLoRA, arXiv 2305.14314, section 3).

Formula, per block of `block_size` elements of the flattened weight, in fp32:
    absmax = max |w|;  code = index of the table value nearest to w * (1 / absmax), ties to the lower index
Double quantisation: offset = mean(absmax); absmax - offset is quantised to 8 bits in blocks of 256 with a signed dynamic
map (Dettmers et al., arXiv 2110.02861). Every byte is bitsandbytes'.
"""

from functools import cache

import torch
from torch import Tensor

from peftkern._native import caps
from peftkern.nf4 import NF4Weight

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
ZERO_CODE = 7


@cache
def codebook() -> Tensor:
    """The 16 NF4 values, fp32, ascending."""
    return torch.tensor(caps.nf4_codebook(), dtype=torch.float32)


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit map, fp32, ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        midpoints = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (exponent - 6)
        values += midpoints.tolist() + (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest table entry, ties to the lower index."""
    midpoints = (table[:-1] + table[1:]) / 2
    return torch.bucketize(values, midpoints.to(values.device), right=False)


def _blockwise(flat: Tensor, block_size: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int64, one per element) and absmax (fp32, one per block) of a flat fp32 tensor."""
    blocks = -(-flat.numel() // block_size)
    padded = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel())).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_zeros(0)
    inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
    scaled = (padded * inverse.unsqueeze(1)).clamp(-1.0, 1.0)
    return _nearest(scaled, table).flatten()[: flat.numel()], absmax


def nf4_quantize_reference(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """`nf4_quantize` in plain torch."""
    flat = weight.detach().to(torch.float32).flatten()
    codes, absmax = _blockwise(flat, block_size, codebook())
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=ZERO_CODE)
    packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1)
    nested_absmax = nested_map = offset = None
    if double_quant:
        nested_map = dynamic_map().to(weight.device)
        offset = absmax.mean()
        nested, nested_absmax = _blockwise(absmax - offset, NESTED_BLOCK_SIZE, nested_map)
        absmax = nested.to(torch.uint8)
    return NF4Weight(packed, absmax, nested_absmax, nested_map, offset, weight.shape, weight.dtype, block_size)


def nf4_quantize(
    weight: Tensor, block_size: int = 64, double_quant: bool = True, *, backend: str | None = None
) -> NF4Weight:
    """Quantises a dense weight to NF4 (QLoRA, arXiv 2305.14314, section 3), byte for byte as bitsandbytes does.

    Args:
        weight: [out, in], fp32, bf16, fp16 or float64 (through fp32), finite. Not differentiable.
        block_size: elements per absmax, a power of two from 32 to 4096. Blocks run over the flattened weight.
        double_quant: quantise absmax itself to 8 bits, in blocks of 256.
        backend: "reference" or "cpu"; by default the fastest that runs.

    Raises:
        TypeError, ValueError: wrong dtype, shape or block size; a weight with NaN or infinity.
    """
    return nf4_quantize_reference(weight, block_size, double_quant)
