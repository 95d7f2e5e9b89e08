"""What is checked of an NF4Weight before an op reads its bytes."""

from typing import Any

import torch
from torch import Tensor

from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_quantize import NESTED_BLOCK_SIZE, ceil_divide, check_block_size


def _check_part(op: str, name: str, part: Any, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{op}: q.{name} must be a Tensor, got {type(part).__name__}")
    if part.dtype != dtype:
        raise TypeError(f"{op}: q.{name} must be {dtype}, got {part.dtype}")
    if part.numel() != numel:
        raise ValueError(f"{op}: q.{name} must have {numel} elements, got shape {list(part.shape)}")
    if part.device != device:
        raise RuntimeError(f"{op}: q.{name} must be on q.codes' device {device}, got {part.device}")


def check_nf4_weight(op: str, q: Any) -> None:
    """The parts of `q` have the dtypes, sizes and device that its shape and block size ask for.

    Raises:
        TypeError, ValueError, RuntimeError: naming `op` and the part.
    """
    if not isinstance(q, NF4Weight):
        raise TypeError(f"{op}: q must be an NF4Weight, got {type(q).__name__}; see nf4_quantize")
    if len(q.shape) != 2:
        raise ValueError(f"{op}: q.shape must be [out, in], got {list(q.shape)}")
    check_block_size(op, q.block_size)
    nested = (q.nested_absmax, q.nested_quant_map, q.offset)
    if any(part is None for part in nested) and any(part is not None for part in nested):
        raise ValueError(f"{op}: q.nested_absmax, q.nested_quant_map and q.offset must be given together")
    device, blocks = q.codes.device, ceil_divide(q.numel(), q.block_size)
    _check_part(op, "codes", q.codes, torch.uint8, ceil_divide(q.numel(), 2), device)
    _check_part(op, "absmax", q.absmax, torch.uint8 if q.nested else torch.float32, blocks, device)
    if q.nested:
        nested_blocks = ceil_divide(blocks, NESTED_BLOCK_SIZE)
        _check_part(op, "nested_absmax", q.nested_absmax, torch.float32, nested_blocks, device)
        _check_part(op, "nested_quant_map", q.nested_quant_map, torch.float32, 256, device)
        _check_part(op, "offset", q.offset, torch.float32, 1, device)
