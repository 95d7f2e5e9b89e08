"""What the Triton ops share: how a kernel is launched, exact rounding, Philox masks, NF4 scales and codes.

Kernels upcast to fp32 straight after a load and round once before a store. Triton's interpreter, in which the numerics
are tested on a CPU, has no bf16 arithmetic and truncates where it should round; `rounded` and `product` work around
both. Rank, sizes, strides and scaling are arguments and never constants, offsets are int64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends import interpreting
from peftkern.ops._dropout import keep_scale, threshold
from peftkern.ops._linear import NF4
from peftkern.ops.nf4_quantize import NESTED_BLOCK_SIZE, NF4_VALUES

INTERPRETING = tl.constexpr(interpreting())
CODEBOOK = tl.constexpr(NF4_VALUES)
NESTED_SHIFT = tl.constexpr(NESTED_BLOCK_SIZE.bit_length() - 1)
# Enough programs for every multiprocessor of any chip; a constant, so that bits do not depend on the chip.
PROGRAMS = 256
# Terms of `product` for a dtype of x: fp16 has 11 bits, which take two bf16.
PARTS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


class Launch(NamedTuple):
    """A kernel and everything that it was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class Device(NamedTuple):
    """What tiles depend on: the threads of a warp and the bytes of shared memory that one program may have."""

    warp_size: int
    shared: int


# What every chip has; also of tensors on the CPU, in the interpreter.
LEAST_DEVICE = Device(32, 64 * 1024)
_recorded: list[Launch] | None = None
_recorded_device = LEAST_DEVICE


@contextmanager
def recording(device: Device = LEAST_DEVICE) -> Iterator[list[Launch]]:
    """Launches in the body, as for `device`, go into the list and do not run: what the ahead-of-time tests compile."""
    global _recorded, _recorded_device
    before = _recorded, _recorded_device
    _recorded, _recorded_device = [], device
    try:
        yield _recorded
    finally:
        _recorded, _recorded_device = before


def device_of(tensor: Tensor) -> Device:
    """Read from its properties; while `recording`, what that was told."""
    if not tensor.is_cuda:
        return _recorded_device
    properties: Any = torch.cuda.get_device_properties(tensor.device)
    # Of AMD's chips torch has only the first of the two, which there is all.
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(properties.warp_size, shared)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
) -> None:
    """Runs `kernel` on the device of its first tensor, on the stream that torch has there now.

    The long axis of the grid comes first: the others end at 65535. Nothing is launched on an empty one. Products and
    sums are not contracted, so that a scale has the bits that torch gives it.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    with torch.cuda.device_of(next(value for value in arguments if isinstance(value, Tensor))):
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False)


class Mask(NamedTuple):
    """The dropout of a pass; nothing is dropped without a seed."""

    seed: Tensor | None = None
    dropped: int = 0
    scale: float = 1.0


NO_MASK = Mask()


def mask_of(dropout_p: float, seed: Tensor | None) -> Mask:
    return NO_MASK if seed is None else Mask(seed, threshold(dropout_p), keep_scale(dropout_p))


def meta_nf4(shape: tuple[int, int], block_size: int = 64, nested: bool = True) -> tuple[list[Tensor], list[int]]:
    """An NF4 weight without bytes, as `w` and `wf`: for `configurations`, whose launches are compiled, not run."""

    def part(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    elements = shape[0] * shape[1]
    blocks = triton.cdiv(elements, block_size)
    w = [part(triton.cdiv(elements, 2), torch.uint8), part(blocks, torch.uint8 if nested else torch.float32)]
    if nested:
        w += [part(size, torch.float32) for size in (triton.cdiv(blocks, NESTED_BLOCK_SIZE), 256, 1)]
    return w, [NF4, block_size, *shape, len(w)]


def padded_rank(rank: int, most: int = 64) -> int:
    """The width of a tile of ranks: a power of two, as dots want it. Longer ranks take several tiles."""
    return min(most, max(16, triton.next_power_of_2(rank)))


@triton.jit
def bf16_bits(values):
    """fp32 rounded to the nearest bf16, ties to even, and still fp32. NaN and infinity stay what they are."""
    bits = values.to(tl.uint32, bitcast=True)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    nearest = bits.to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), nearest, values)


@triton.jit
def rounded(values, like):
    """fp32 to the element type that the pointer `like` points to, rounded to nearest."""
    if INTERPRETING and like.dtype.element_ty == tl.bfloat16:
        upper = (bf16_bits(values).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        values = upper.to(tl.bfloat16, bitcast=True)
    else:
        values = values.to(like.dtype.element_ty)
    return values


@triton.jit
def high_part(values):
    """The leading 8 bits: bf16, which the interpreter holds as fp32."""
    return bf16_bits(values) if INTERPRETING else values.to(tl.bfloat16)


@triton.jit
def dot_operand(values, like):
    """fp32 rounded to the element type that the pointer `like` points to, for a dot of that type."""
    return high_part(values) if like.dtype.element_ty == tl.bfloat16 else values.to(like.dtype.element_ty)


@triton.jit
def product(left, right, total, PARTS: tl.constexpr):
    """total + left @ right, of fp32 operands.

    PARTS 0 multiplies in fp32. 2 and 3 multiply on bf16 tensor cores without losing what an fp32 operand has more: the
    operands go in two parts of 8 bits, whose product's error is 2^-17. With 2 `left` is bf16 and has one.
    """
    if PARTS == 0:
        total = tl.dot(left, right, total, input_precision="ieee")
    else:
        left_high, right_high = high_part(left), high_part(right)
        total = tl.dot(left_high, high_part(right - right_high.to(tl.float32)), total, input_precision="ieee")
        if PARTS == 3:
            total = tl.dot(high_part(left - left_high.to(tl.float32)), right_high, total, input_precision="ieee")
        total = tl.dot(left_high, right_high, total, input_precision="ieee")
    return total


@triton.jit
def philox(counter, row, stream, seed):
    """The four words of Philox4x32-10 for groups of 8 columns [1, groups] and int64 rows [rows, 1]."""
    zero = tl.zeros_like(counter + row).to(tl.uint32)
    c0, c1 = zero + counter.to(tl.uint32), zero + row.to(tl.uint32)
    c2, c3 = zero + tl.cast(stream, tl.uint32), zero + (row >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # 64-bit products: one instruction gives both halves.
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def halves(word):
    """The low and the high 16 bits of each word, in a last dimension of 2."""
    return tl.join(word & 0xFFFF, word >> 16)


@triton.jit
def keep_mask(row, first_column, seed, stream, dropped, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`_dropout.keep_mask` for a tile: int64 rows [ROWS] and COLUMNS columns from `first_column`, a multiple of 8.

    Element e of 8 takes word e & 3, low half first: with e = 4 half + word the bits of e, from the highest, are those
    that the joins make, from the first.
    """
    counter = (first_column >> 3) + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = philox(counter[None, :], row[:, None], stream, tl.load(seed))
    bits = tl.join(tl.join(halves(w0), halves(w2)), tl.join(halves(w1), halves(w3)))
    return tl.reshape(bits, [ROWS, COLUMNS]).to(tl.int32) >= dropped


@triton.jit
def codebook():
    """The 16 NF4 values [16], made in registers: a table in memory would have to be copied to every device."""
    index = tl.arange(0, 16)
    table = tl.zeros([16], tl.float32)
    for code in tl.static_range(16):
        table = tl.where(index == code, CODEBOOK[code], table)
    return table


@triton.jit
def decoded(codes, table, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The values of int32 codes [ROWS, COLUMNS]."""
    return tl.reshape(tl.gather(table, tl.reshape(codes, [ROWS * COLUMNS]), 0), [ROWS, COLUMNS])


@triton.jit
def block_scale(absmax, nested_absmax, nested_quant_map, offset, block, mask):
    """The fp32 scale of each block (int64); product and sum of a nested one are rounded one by one."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if nested_absmax is not None:
        value = tl.load(nested_quant_map + scale.to(tl.int32))
        scale = value * tl.load(nested_absmax + (block >> NESTED_SHIFT), mask=mask, other=0.0) + tl.load(offset)
    return scale
