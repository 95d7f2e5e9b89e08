"""NF4Linear and bitsandbytes: each reads what the other writes, byte for byte."""

from types import ModuleType
from typing import Any

import pytest
import torch
from nf4_layers import IN, OUT, assert_entries, make, snapshot
from torch import Tensor, nn

from peftkern import nf4_quantize
from peftkern.integrations.bitsandbytes import QUANT_STATE_KEY, bnb_state_dict, native_entries
from peftkern.nn import NF4Linear
from peftkern.ops.nf4_quantize import BLOCK_SIZES

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])
ASSIGN = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Entries = dict[str, Any]


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    return pytest.importorskip("bitsandbytes")


def bnb_linear(
    bnb: ModuleType,
    weight: Tensor,
    bias: Tensor | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    **options: Any,
) -> nn.Linear:
    """A quantised bitsandbytes layer with this weight and bias."""
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias is not None, compress_statistics=double_quant, **options)
    own = layer.weight
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        compress_statistics=double_quant,
        blocksize=block_size,
        quant_type=own.quant_type,
        quant_storage=own.quant_storage,
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer.to("cpu")


# bitsandbytes' bytes


@NESTED
@DTYPE
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(OUT, IN), (3, 4096)], ids=str)
def test_bitsandbytes_dict_loads_byte_for_byte(shape, block_size, dtype, double_quant, bnb, seed):
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    theirs = bnb_linear(bnb, weight, bias, block_size, double_quant, quant_type="nf4").state_dict()
    ours = NF4Linear(shape[1], shape[0], dtype=dtype, block_size=block_size, double_quant=double_quant)
    assert ours.load_state_dict(theirs) == ([], [])
    expected = native_entries(nf4_quantize(weight, block_size, double_quant)) | {"bias": bias}
    assert_entries(ours.state_dict(), expected)
    assert torch.equal(ours.weight, theirs["weight"]) and torch.equal(ours.absmax, theirs["weight.absmax"])


@NESTED
@DTYPE
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bnb_state_dict_is_what_bitsandbytes_writes(block_size, dtype, double_quant, bnb, seed):
    linear = nn.Linear(IN, OUT, dtype=dtype)
    theirs = bnb_linear(bnb, linear.weight.data, linear.bias.data, block_size, double_quant, quant_type="nf4")
    assert_entries(bnb_state_dict(NF4Linear.from_linear(linear, block_size, double_quant)), theirs.state_dict())


@NESTED
@DTYPE
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bitsandbytes_reads_bnb_state_dict(block_size, dtype, double_quant, bnb, seed):
    ours = NF4Linear(4096, 3, bias=False, dtype=dtype, block_size=block_size, double_quant=double_quant)
    entries = bnb_state_dict(ours)
    codes = entries.pop("weight")
    # The tensor's own names, as transformers passes them.
    read = bnb.nn.Params4bit.from_prequantized(codes, entries, device="cpu")
    assert read.quant_state.dtype == dtype and read.quant_state.shape == ours.nf4.shape
    assert torch.equal(bnb.functional.dequantize_4bit(read.data, read.quant_state), ours.dequantize())


@NESTED
@DTYPE
def test_the_dequantised_weight_is_bitsandbytes_s(dtype, double_quant, bnb, seed):
    theirs = bnb_linear(bnb, torch.randn(8, 256).to(dtype), double_quant=double_quant, quant_type="nf4")
    ours = NF4Linear(256, 8, bias=False, dtype=dtype, double_quant=double_quant)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))


@ASSIGN
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_storage_holds_the_same_bytes(storage, assign, bnb, seed):
    weight = torch.randn(OUT, IN)
    theirs = bnb_linear(bnb, weight, quant_type="nf4", quant_storage=storage).state_dict()
    assert theirs["weight"].dtype == storage
    ours = make(bias=False)
    ours.load_state_dict(theirs, assign=assign)
    assert_entries(ours.state_dict(), native_entries(nf4_quantize(weight)))


def test_fp4_is_refused(bnb, seed):
    entries = bnb_linear(bnb, torch.randn(OUT, IN), quant_type="fp4").state_dict()
    layer = make(bias=False)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r'"weight.quant_state.bitsandbytes__fp4" is not NF4'):
        layer.load_state_dict(entries)
    assert_entries(layer.state_dict(), before)


def test_writing_bnb_keeps_other_entries_and_their_order(seed):
    model = nn.ModuleDict({"norm": nn.LayerNorm(IN), "fc": make(), "fc2": make(bias=False), "head": nn.Linear(4, 4)})
    names = ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"]
    layer = [*names, QUANT_STATE_KEY]
    entries = bnb_state_dict(model)
    assert list(entries) == [
        "norm.weight",
        "norm.bias",
        *(f"fc.{name}" for name in layer),
        "fc.bias",
        *(f"fc2.{name}" for name in layer),
        "head.weight",
        "head.bias",
    ]
    native = model.state_dict()
    assert all(torch.equal(entries[key], native[key]) for key in entries if key in native)
    gathered = {f"model.{key}": value for key, value in native.items()}
    assert_entries(bnb_state_dict(model, gathered), {f"model.{key}": value for key, value in entries.items()})


def test_writing_bnb_refuses_what_has_no_bytes():
    with pytest.raises(RuntimeError, match=r'bnb_state_dict: "0.weight" is on the meta device'):
        bnb_state_dict(nn.Sequential(make(device="meta")))
    incomplete = {key: value for key, value in make().state_dict().items() if key != "offset"}
    with pytest.raises(ValueError, match='"offset" is missing'):
        bnb_state_dict(make(), incomplete)
