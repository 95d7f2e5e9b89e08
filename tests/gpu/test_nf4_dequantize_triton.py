"""nf4_dequantize in Triton: the bits of the reference, whatever the shape, the block and the layout of its parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import compile_counting, graph_count
from test_nf4_dequantize import DTYPES, assert_equal, random_weight
from torch import Tensor

from peftkern import NF4Weight, nf4_dequantize
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference
from peftkern.ops.nf4_dequantize_triton import dequantize_into, merge_into
from peftkern.ops.nf4_quantize import BLOCK_SIZES

SHAPES = ((1, 1), (3, 1), (7, 33), (64, 96), (1, 4129))


def on(device: str, q: NF4Weight) -> Any:
    return lambda dtype: nf4_dequantize(q.to(device), dtype, backend="triton").cpu()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(device: str, dtype: torch.dtype, block_size: int, nested: bool, seed: int) -> None:
    for shape in SHAPES:
        q = random_weight(shape, block_size, nested)
        assert_equal(on(device, q)(dtype), nf4_dequantize_reference(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_ends_of_the_range(device: str, dtype: torch.dtype) -> None:
    """Of every code: infinite and subnormal scales, and products that overflow the output or round to its zero."""
    absmax = torch.tensor([1.0, -3.0, 0.1, 7e4, 1e-6, 1e-38, 0.0, float("inf")])
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1)
    q = NF4Weight(codes, absmax, None, None, None, torch.Size((16, 32)), dtype, 64)
    assert_equal(on(device, q)(dtype), nf4_dequantize_reference(q, dtype))


def test_nested_product_and_sum_are_rounded_one_by_one(device: str, seed: int) -> None:
    q = random_weight((2000, 32), 32, nested=True)
    assert_equal(on(device, q)(torch.float32), nf4_dequantize_reference(q, torch.float32))


def test_strided_parts(device: str, seed: int) -> None:
    q = random_weight((6, 64 * 8), 64, nested=True)
    spread = {
        name: torch.stack((part, part), dim=-1)[..., 0]
        for name, part in (("codes", q.codes), ("absmax", q.absmax), ("nested_quant_map", q.nested_quant_map))
        if part is not None
    }
    assert not spread["codes"].is_contiguous()
    assert_equal(on(device, replace(q, **spread))(torch.float32), nf4_dequantize_reference(q, torch.float32))


def test_writes_a_workspace_and_nothing_beside_it(device: str, seed: int) -> None:
    q = random_weight((7, 33), 64, nested=True)
    memory = torch.full((300,), 7.0, device=device)
    out = memory[16 : 16 + 231].view(7, 33)
    assert dequantize_into(out, q.to(device).tensors, q.block_size) is out
    assert_equal(out.cpu(), nf4_dequantize_reference(q, torch.float32))
    assert (memory[:16] == 7).all() and (memory[16 + 231 :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_with_a_low_rank_product(device: str, dtype: torch.dtype, seed: int) -> None:
    """Rounded once: half a step of the result away from float64, and what fp32 loses of a sum that cancels."""
    for shape, rank, block_size in (((7, 33), 3, 32), ((65, 130), 20, 64)):
        q = random_weight(shape, block_size, nested=True)
        lora_a, lora_b = torch.randn(rank, shape[1]), torch.randn(rank, shape[0]).t()
        out = torch.empty(shape, dtype=dtype, device=device)
        merge_into(out, q.to(device), lora_a.to(device), lora_b.to(device), -0.7)
        product = 0.7 * lora_b.double() @ lora_a.double()
        weight = nf4_dequantize_reference(q, torch.float64)
        terms = weight.abs() + 0.7 * lora_b.double().abs() @ lora_a.double().abs()
        bound = torch.finfo(dtype).eps / 2 * (weight - product).abs() + 2**-16 * terms
        assert ((out.cpu().double() - (weight - product)).abs() <= bound).all()


def test_compile_without_graph_breaks(device: str, seed: int) -> None:
    q = random_weight((7, 33), 64, nested=True).to(device)
    compiled, graphs = compile_counting(lambda: nf4_dequantize(q, torch.float32, backend="triton"))
    assert_equal(compiled(), nf4_dequantize(q, torch.float32, backend="triton"))
    assert graph_count(graphs) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(device: str, nested: bool, seed: int) -> None:
    q = random_weight((7, 33), 32, nested).to(device)
    torch.library.opcheck(NAMESPACES["triton"].library.nf4_dequantize, (*native_weight(q), torch.bfloat16))


@pytest.mark.parametrize("name", ["absmax", "nested_absmax", "nested_quant_map", "offset"])
def test_parts_on_different_devices(device: str, name: str, seed: int) -> None:
    q = random_weight((7, 33), 32, nested=True).to(device)
    part = getattr(q, name)
    assert isinstance(part, Tensor)
    with pytest.raises(RuntimeError, match=f"nf4_dequantize: q.{name} must be on q.codes' device .*, got meta"):
        nf4_dequantize(replace(q, **{name: part.to("meta")}), backend="triton")
