"""bitsandbytes' 4-bit ops on the CPU by our kernels. bitsandbytes itself has `register` called when it is imported.

By way of the entry point `peftkern` of the group `bitsandbytes.backends`, which is in peftkern_bnb.py. NF4 goes to our
kernels; what they do not take (FP4, other block sizes, scales that are not fp32, NaN) goes to the kernels that were
registered before.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from peftkern import backends
from peftkern._native import ops
from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_dequantize import nf4_dequantize
from peftkern.ops.nf4_linear import nf4_linear
from peftkern.ops.nf4_quantize import BLOCK_SIZES, codes_reference

Kernel = Callable[..., Any]
TESTED_VERSIONS = ">=0.50, <0.51"
"""Named where the ops are others; a release that has the same ops is taken."""
_REPACKS = "support_avx512bf16_for_cpu"
_registered = False


def register() -> None:
    """Registers our kernels with bitsandbytes, once; PEFTKERN_BNB=0 leaves bitsandbytes as it is.

    Also keeps bitsandbytes' eval forward from repacking NF4 weights in place on AVX-512-BF16: that rounds the scales to
    bf16 for good, takes only some shapes, and the ops that follow read the weight wrongly.

    Raises:
        ValueError: PEFTKERN_BNB is neither 0 nor 1.
    """
    global _registered
    setting = os.environ.get("PEFTKERN_BNB", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"PEFTKERN_BNB must be 0 or 1, got {setting!r}")
    if setting == "0" or _registered:
        return
    kernels: dict[str, Callable[[Kernel], Kernel]] = {
        "quantize_4bit": _quantize_4bit,
        "dequantize_4bit": _dequantize_4bit,
        "gemm_4bit": _gemm_4bit,
    }
    exist = all(hasattr(torch.ops.bitsandbytes, op) for op in kernels)
    made = {op: make(_registered_kernel(op)) for op, make in kernels.items()} if exist else {}
    if not made or not all(_takes_arguments_of(op, kernel) for op, kernel in made.items()):
        warnings.warn(
            f"peftkern: bitsandbytes must be {TESTED_VERSIONS}, whose ops it knows, got {version('bitsandbytes')}; it "
            "stays on its own kernels",
            stacklevel=2,
        )
        return
    with warnings.catch_warnings():
        # torch's, that a kernel replaces another; it does so on purpose.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for op, kernel in made.items():
            torch.library.register_kernel(f"bitsandbytes::{op}", "cpu", kernel)
    _keep_layout()
    _registered = True


def _takes_arguments_of(op: str, kernel: Kernel) -> bool:
    schema = getattr(torch.ops.bitsandbytes, op).default._schema
    return [argument.name for argument in schema.arguments] == list(signature(kernel).parameters)


def _registered_kernel(op: str) -> Kernel:
    """What runs an op of bitsandbytes on the CPU now."""
    kernel = torch.library.get_kernel(f"bitsandbytes::{op}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args: kernel.call_boxed(keys, *args)


def _weight(
    codes: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None],
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
) -> NF4Weight:
    # quant_storage: the same bytes in wider elements.
    flat_codes = codes.contiguous().view(torch.uint8).reshape(-1, 1)
    nested_absmax, table, offset = nested
    return NF4Weight(flat_codes, absmax, nested_absmax, table, offset, torch.Size(shape), dtype, block_size)


def _quantize_4bit(theirs: Kernel) -> Kernel:
    def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
        if quant_type != "nf4" or blocksize not in BLOCK_SIZES or not A.numel() or A.dtype not in backends.CPU_DTYPES:
            return theirs(A, blocksize, quant_type, quant_storage)
        native = backends.choose("nf4_quantize", A).implementation == "cpu"
        codes, absmax = (ops.nf4_quantize if native else codes_reference)(A.detach().reshape(1, -1), blocksize)
        # A block with NaN or infinity has it as its absmax; bitsandbytes has codes for it.
        if not math.isfinite(absmax.amax().item()):
            return theirs(A, blocksize, quant_type, quant_storage)
        return codes.view(-1).view(quant_storage).unsqueeze(1), absmax

    return quantize_4bit


def _dequantize_4bit(theirs: Kernel) -> Kernel:
    def dequantize_4bit(
        A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        numel = math.prod(shape)
        ours = quant_type == "nf4" and blocksize in BLOCK_SIZES and numel and dtype in backends.CPU_DTYPES
        if not ours or absmax.dtype != torch.float32 or not _fits(A, absmax, numel, blocksize):
            return theirs(A, absmax, blocksize, quant_type, shape, dtype)
        q = _weight(A, absmax.reshape(-1), (None, None, None), (1, numel), dtype, blocksize)
        return nf4_dequantize(q).view(shape)

    return dequantize_4bit


def _gemm_4bit(theirs: Kernel) -> Kernel:
    def gemm_4bit(
        A: Tensor,
        B: Tensor,
        shapeB: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        ours = quant_type == "nf4" and blocksize in BLOCK_SIZES and A.dtype in backends.CPU_DTYPES
        if not ours or absmax.dtype != torch.float32 or not _fits(B, None, math.prod(shapeB), blocksize):
            return theirs(A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset)
        if absmax_8bit is None or absmax_code is None or absmax_offset is None:
            q = _weight(B, absmax, (None, None, None), shapeB, A.dtype, blocksize)
        else:
            offset = absmax_offset.reshape(()).to(torch.float32)
            q = _weight(B, absmax_8bit, (absmax, absmax_code, offset), shapeB, A.dtype, blocksize)
        return nf4_linear(A, q, bias)

    return gemm_4bit


def _fits(codes: Tensor, absmax: Tensor | None, numel: int, block_size: int) -> bool:
    """Whether these are the codes and scales of so many elements: else theirs has the say, or the error."""
    whole = codes.numel() * codes.element_size() == -(-numel // 2)
    return whole and (absmax is None or absmax.numel() == -(-numel // block_size))


def _keep_layout() -> None:
    """A property over bitsandbytes' per-layer setting: False for NF4. FP4 layers keep their packed eval forward."""
    from bitsandbytes.nn import Linear4bit

    def get(layer: Any) -> bool:
        return bool(vars(layer).get(_REPACKS)) and layer.weight.quant_type != "nf4"

    def put(layer: Any, value: bool) -> None:
        vars(layer)[_REPACKS] = value

    setattr(Linear4bit, _REPACKS, property(get, put))
