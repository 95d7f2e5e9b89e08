"""The CUDA kernels of NF4 on an emulated device: the same source, in memory that nothing may leave, full of poison."""

from collections.abc import Callable
from ctypes import CDLL, byref
from dataclasses import replace

import pytest
import torch
from cuda_decode import PLANS, assert_near, decode, plan_of
from cuda_emulation import (
    COMPILER,
    DTYPES,
    Dequantize,
    Memory,
    Quantize,
    QuantizeAbsmax,
    launched,
    library,
    view_of,
)
from torch import Tensor

from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference
from peftkern.ops.nf4_quantize import (
    NESTED_BLOCK_SIZE,
    ceil_divide,
    codes_reference,
    dynamic_map,
    nested_reference,
    nf4_quantize_reference,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def kernels() -> CDLL:
    return library()


def quantize(kernels: CDLL, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    source = Memory(weight)
    codes = Memory(None, (ceil_divide(weight.numel(), 2), 1))
    absmax = Memory(None, (ceil_divide(weight.numel(), block_size),), torch.float32)
    shift = block_size.bit_length() - 1
    task = Quantize(source.address, DTYPES[weight.dtype], weight.numel(), shift, codes.address, absmax.address)
    launched(kernels.peftkern_cuda_nf4_quantize(byref(task), None))
    return codes.tensor(), absmax.tensor()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256, 512, 4096])
@pytest.mark.parametrize("numel", [1, 7, 64, 65, 4096, 12345])
def test_quantize(kernels: CDLL, seed: int, dtype: torch.dtype, block_size: int, numel: int) -> None:
    weight = torch.randn(numel).to(dtype)
    if numel > 200:
        weight[64:128] = 0
        weight[128:192] *= 2.0**-130  # below the least absmax
        weight[3] = float("inf")
    codes, absmax = quantize(kernels, weight, block_size)
    wanted_codes, wanted_absmax = codes_reference(weight, block_size)
    assert torch.equal(absmax, wanted_absmax)
    finite = wanted_absmax.isfinite().repeat_interleave(block_size)[:numel:2]
    assert torch.equal(codes[finite], wanted_codes[finite])


def test_quantize_of_unaligned_memory(kernels: CDLL, seed: int) -> None:
    weight = torch.randn(203, dtype=torch.bfloat16)
    source, codes, absmax = Memory(weight), Memory(None, (101, 1)), Memory(None, (4,), torch.float32)
    task = Quantize(source.address + 2, DTYPES[weight.dtype], 202, 6, codes.address, absmax.address)
    launched(kernels.peftkern_cuda_nf4_quantize(byref(task), None))
    assert torch.equal(codes.tensor(), codes_reference(weight[1:], 64)[0])


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_quantize_absmax(kernels: CDLL, seed: int, count: int) -> None:
    absmax = torch.rand(count) * 10.0 ** torch.randint(-3, 1, (count,))
    if count == 1000:
        absmax[256:512] = absmax.mean()  # a block of zeros
    offset = absmax.mean()
    blocks = ceil_divide(count, NESTED_BLOCK_SIZE)
    read = [Memory(absmax), Memory(dynamic_map()), Memory(offset)]
    written, nested = Memory(None, (count,)), Memory(None, (blocks,), torch.float32)
    addresses = [memory.address for memory in read]
    task = QuantizeAbsmax(addresses[0], count, addresses[1], addresses[2], written.address, nested.address)
    launched(kernels.peftkern_cuda_nf4_quantize_absmax(byref(task), None))
    wanted_bytes, wanted_nested = nested_reference(absmax, dynamic_map(), offset)
    assert torch.equal(nested.tensor(), wanted_nested)
    assert torch.equal(written.tensor(), wanted_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (5, 1667), (2, 8192)])
def test_dequantize(
    kernels: CDLL, seed: int, dtype: torch.dtype, nested: bool, block_size: int, shape: tuple[int, int]
) -> None:
    q = nf4_quantize_reference(torch.randn(shape), block_size, nested)
    view, _alive = view_of(q)
    out = Memory(None, shape, dtype)
    task = Dequantize(view, q.numel(), out.address, DTYPES[dtype])
    launched(kernels.peftkern_cuda_nf4_dequantize(byref(task), None))
    assert torch.equal(out.tensor(), nf4_dequantize_reference(q, dtype))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("shape", "block_size", "nested", "dtype"),
    [
        ((1, 64), 64, False, torch.bfloat16),
        ((33, 320), 64, True, torch.float16),
        ((70, 1536), 256, True, torch.bfloat16),
        ((48, 1088), 64, False, torch.bfloat16),
    ],
)
def test_decode(
    kernels: CDLL,
    seed: int,
    plan: str,
    shape: tuple[int, int],
    block_size: int,
    nested: bool,
    dtype: torch.dtype,
) -> None:
    q = nf4_quantize_reference(torch.randn(shape), block_size, nested)
    wanted_weight = nf4_dequantize_reference(q, torch.float64).T
    for rows in (1, 4, 5, 8):
        x = (torch.randn(rows, shape[1]) + 1).to(dtype)
        y = decode(kernels, x, q, plan_of(plan, q, len(x)), poison_stride=8 * (rows % 2))
        assert_near(y, x.double() @ wanted_weight, q, x)


@pytest.mark.parametrize("plan", ["one tile", "two tiles", "split"])
@pytest.mark.parametrize("rows", [3, 7])
def test_decode_is_exact_where_nothing_rounds(kernels: CDLL, seed: int, plan: str, rows: int) -> None:
    """Codes -1, 0 and 1, whole scales and x: a swapped lane, byte, half or block changes a whole number.

    The scaled table has 1.0016 for 1, which bf16 rounds away below 256.
    """
    codes = torch.tensor([0, 7, 15])[torch.randint(0, 3, (40, 960))]
    packed = (codes.flatten()[0::2] << 4 | codes.flatten()[1::2]).to(torch.uint8).unsqueeze(1)
    absmax = torch.randint(1, 3, (40 * 960 // 64,)).float()
    q = NF4Weight(packed, absmax, None, None, None, torch.Size((40, 960)), torch.float32, 64)
    x = torch.randint(-1, 2, (rows, 960)).to(torch.bfloat16)
    wanted = x.float() @ nf4_dequantize_reference(q, torch.float32).T
    assert wanted.abs().max() < 256
    y = decode(kernels, x, q, plan_of(plan, q, len(x))).float()
    assert (y - wanted).abs().max() < 1e-3  # where 1.0016 cancels, the fp32 sum is not quite 0


@pytest.mark.parametrize("change", ["codes", "absmax", "x"])
def test_the_comparison_would_notice(kernels: CDLL, seed: int, change: str) -> None:
    q = nf4_quantize_reference(torch.randn(16, 128), 64, False)
    x = torch.randn(2, 128).to(torch.bfloat16)
    wanted = x.double() @ nf4_dequantize_reference(q, torch.float64).T
    changes: dict[str, Callable[[], tuple[NF4Weight, Tensor]]] = {
        "codes": lambda: (replace(q, codes=q.codes.roll(1)), x),
        "absmax": lambda: (replace(q, absmax=q.absmax.roll(1)), x),
        "x": lambda: (q, x.roll(1, dims=1)),
    }
    other, moved = changes[change]()
    with pytest.raises(AssertionError):
        assert_near(decode(kernels, moved, other, plan_of("one tile", q, 2)), wanted, q, x)
