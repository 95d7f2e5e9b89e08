"""nf4_dequantize: NF4 bytes to a dense weight (QLoRA, arXiv 2305.14314, equation 6).

Formula: w[e] = table[code[e]] * absmax[e // block_size], in fp32, rounded once to the output dtype; nested absmax is
    absmax[b] = nested_quant_map[byte[b]] * nested_absmax[b // 256] + offset     (product and sum rounded one by one)
"""

from typing import Any

import torch
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.nf4 import NF4Weight
from peftkern.ops._linear import FLOATING, WeightFormat, native_weight
from peftkern.ops._nf4 import check_nf4_weight
from peftkern.ops._op import NAMESPACES, Op
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
    """The dense weight [out, in] of an NF4Weight (QLoRA, arXiv 2305.14314, equation 6). Carries no gradient.

    Args:
        q: the weight, flat or nested.
        dtype: of the result, fp32, bf16, fp16 or float64; the dense weight's own by default.
        backend: "reference", "torch", "cpu", "cuda" or "triton"; by default the fastest that runs.

    Raises:
        TypeError, ValueError, RuntimeError: parts of q that do not fit its shape, a dtype that is not one of these, or
            a backend that cannot run this.
    """
    check_nf4_weight("nf4_dequantize", q)
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"nf4_dequantize: dtype must be {' or '.join(map(str, FLOATING))}, got {dtype}")
    out = q.codes.new_empty(0, dtype=dtype)
    implementation = backends.choose("nf4_dequantize", out, backend).implementation
    if implementation == "reference":
        return nf4_dequantize_reference(q, dtype)
    if implementation == "torch":
        return FrozenWeight.of(q).dense(dtype)
    return NAMESPACES[implementation].nf4_dequantize(*native_weight(q), dtype)


def _fake(call: Any) -> Tensor:
    weight = WeightFormat(*call.wf)
    return call.w[0].new_empty((weight.out_features, weight.in_features), dtype=call.dtype)


Op(
    "nf4_dequantize",
    _fake,
    triton="nf4_dequantize_triton",
)
