"""nf4_dequantize: NF4 bytes to a dense weight (QLoRA, arXiv 2305.14314, equation 6).

Formula: w[e] = table[code[e]] * absmax[e // block_size], in fp32, rounded once to the output dtype; nested absmax is
    absmax[b] = nested_quant_map[byte[b]] * nested_absmax[b // 256] + offset     (product and sum rounded one by one)
"""

import torch
from torch import Tensor

from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_quantize import NESTED_BLOCK_SIZE, codebook


def absmax_reference(q: NF4Weight) -> Tensor:
    """The fp32 scale of every block."""
    if q.nested_absmax is None or q.nested_quant_map is None or q.offset is None:
        return q.absmax
    scale = q.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: q.absmax.numel()]
    return q.nested_quant_map[q.absmax.long()] * scale + q.offset


def nf4_dequantize_reference(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """`nf4_dequantize` in plain torch; the product is formed in float64 if that is the output."""
    dtype = q.dtype if dtype is None else dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    flat_codes = q.codes.view(torch.uint8).flatten()
    nibbles = torch.stack((flat_codes >> 4, flat_codes & 15), dim=1).flatten()[: q.numel()]
    values = codebook().to(q.device, compute)[nibbles.long()]
    absmax = absmax_reference(q).to(compute).repeat_interleave(q.block_size)[: q.numel()]
    return (values * absmax).to(dtype).view(q.shape)


def nf4_dequantize(q: NF4Weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """The dense weight [out, in] of an NF4Weight (QLoRA, arXiv 2305.14314, equation 6).

    Args:
        q: the weight, flat or nested.
        dtype: of the result; the dense weight's own dtype by default.
        backend: "reference" or "cpu"; by default the fastest that runs.
    """
    return nf4_dequantize_reference(q, dtype)
