"""from_bnb and to_bnb: bitsandbytes' layers as ours and back, on the same storage."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nf4_layers import assert_entries, snapshot
from tiny_models import IDS, llama, logits, transformers
from torch import Tensor, nn

import peftkern
from peftkern import from_bnb, to_bnb
from peftkern.integrations.bitsandbytes import bnb_state_dict
from peftkern.nn import NF4Linear

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
STORAGE = pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    return pytest.importorskip("bitsandbytes")


def linear(bnb: ModuleType, nested: bool = True, kind: str = "nf4", **options: Any) -> Any:
    return bnb.nn.Linear4bit(64, 48, compress_statistics=nested, quant_type=kind, **options).to("cpu")


def storages(layer: Any) -> list[int]:
    """Where a layer's bytes are."""
    if isinstance(layer, NF4Linear):
        tensors = [layer.weight, layer.absmax, layer.nested_absmax, layer.nested_quant_map]
    else:
        state = layer.weight.quant_state
        nested = [state.state2.absmax, state.state2.code] if state.nested else [None, None]
        tensors = [layer.weight, state.absmax, *nested]
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@NESTED
@STORAGE
def test_there_and_back_without_copying(nested, storage, bnb, seed):
    model = nn.Sequential(linear(bnb, nested, quant_storage=storage, compute_dtype=torch.float32))
    theirs = model[0]
    assert from_bnb(model) is model
    ours = model[0]
    assert type(ours) is NF4Linear and ours.bias is theirs.bias and storages(ours) == storages(theirs)
    assert (ours.double_quant, ours.compute_dtype, ours.weight_dtype) == (nested, torch.float32, torch.float32)
    assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))
    assert to_bnb(model) is model
    again = model[0]
    assert type(again) is bnb.nn.Linear4bit and again.bias is theirs.bias and storages(again) == storages(theirs)
    entries = snapshot(theirs)
    if storage != torch.uint8:
        entries["weight"] = entries["weight"].view(torch.uint8).view(-1, 1)
    assert_entries(snapshot(again), entries)
    x = torch.randn(3, 64)
    assert torch.equal(again.train()(x), theirs.train()(x))


def test_one_layer_gives_a_new_one(bnb, seed):
    ours = from_bnb(linear(bnb))
    assert type(ours) is NF4Linear and type(to_bnb(ours)) is bnb.nn.Linear4bit


def test_gradients_are_theirs(bnb, seed):
    # In widths that bitsandbytes' CPU kernel decodes right: multiples of 64.
    theirs = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu") for _ in range(2)))
    ours = from_bnb(copy.deepcopy(theirs))
    x, grad = torch.randn(5, 64), torch.randn(5, 64)

    def gradients(model: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        output.backward(grad)
        return [output, leaf.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]

    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)


def test_flags_hooks_and_shared_layers_are_kept(bnb, seed):
    layer = linear(bnb).eval()
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    model = nn.ModuleDict({"a": layer, "b": layer, "fp4": linear(bnb, kind="fp4"), "head": nn.Linear(4, 4)})
    from_bnb(model)
    assert model["a"] is model["b"] and type(model["a"]) is NF4Linear and not model["a"].training
    assert type(model["fp4"]) is bnb.nn.Linear4bit and type(model["head"]) is nn.Linear
    model["a"](torch.randn(1, 64))
    assert calls == ["called"]


@NESTED
def test_a_layer_that_bitsandbytes_repacked_is_unpacked(nested, bnb, seed):
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on AVX-512-BF16 alone")
    layer = bnb.nn.Linear4bit(64, 64, compress_statistics=nested, quant_type="nf4").to("cpu")
    before = from_bnb(copy.deepcopy(layer))
    layer.eval()(torch.randn(1, 64))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes runs our kernels")
    with pytest.warns(UserWarning, match='from_bnb: bitsandbytes has rounded the scales of "0" to bf16'):
        (ours,) = from_bnb(nn.Sequential(layer))
    assert torch.equal(ours.weight, before.weight) and not ours.double_quant
    torch.testing.assert_close(ours.dequantize(), before.dequantize(), rtol=2**-8, atol=0)  # bf16's rounding


# Models of transformers


def test_a_loaded_model_trains_and_is_saved_as_before(bnb, seed, tmp_path: Path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**options)
    llama().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    expected = load(tmp_path / "dense", quantization_config=peftkern.NF4Config(compute_dtype="float32"))

    from_bnb(model)
    assert torch.equal(logits(model), logits(expected))
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "ours")
    to_bnb(model)
    assert model.is_loaded_in_4bit and type(model.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
    model.save_pretrained(tmp_path / "again")
    for name in ("ours", "again"):
        read = load(tmp_path / name, device_map="cpu")
        assert_entries(snapshot(read), snapshot(model))
        assert type(read.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"


def test_models_of_ours_become_theirs(bnb, seed):
    dense = llama()
    model = to_bnb(peftkern.quantize(copy.deepcopy(dense)))
    assert_entries(snapshot(model), bnb_state_dict(peftkern.quantize(dense)))


# Errors


def test_nothing_to_convert(bnb):
    for call, message in (
        (from_bnb, "from_bnb: Linear has no Linear4bit of bitsandbytes with an NF4 weight"),
        (to_bnb, "to_bnb: Linear has no NF4Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            call(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
            call(3)
    with pytest.raises(ValueError, match="from_bnb: Linear4bit has no Linear4bit of bitsandbytes with an NF4 weight"):
        from_bnb(linear(bnb, kind="fp4"))


def test_all_is_checked_before_anything_changes(bnb, seed):
    model = nn.Sequential(linear(bnb), bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    with pytest.raises(ValueError, match='from_bnb: "1" is not quantised yet; move it to a device first'):
        from_bnb(model)
    assert type(model[0]) is bnb.nn.Linear4bit
    model = nn.Sequential(NF4Linear(64, 8), NF4Linear(8, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match=r'to_bnb: "1" must stand for fp32, bf16 or fp16, got torch\.float64'):
        to_bnb(model)
    model[1] = NF4Linear(8, 8, device="meta")
    with pytest.raises(ValueError, match='to_bnb: "1" is on the meta device, it has no bytes'):
        to_bnb(model)
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match='to_bnb: "1" has another forward'):
        to_bnb(model)
    assert type(model[0]) is NF4Linear


def test_adapters_come_later(bnb, seed):
    peft = pytest.importorskip("peft")
    model = peftkern.add_lora(peftkern.quantize(llama()), rank=2)
    with pytest.raises(ValueError, match=r'to_bnb: ".*q_proj" has adapters; convert before adding them'):
        to_bnb(model)
    model = peft.get_peft_model(nn.Sequential(linear(bnb)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="from_bnb: the model has adapters of another library"):
        from_bnb(model)


def test_an_unknown_format_is_named(bnb, seed):
    layer = linear(bnb)
    layer.weight.quant_state.blocksize = 16
    with pytest.raises(ValueError, match=r'from_bnb: "0" must have a block size of .*, got 16'):
        from_bnb(nn.Sequential(layer))
    layer = linear(bnb)
    layer.weight.quant_state.state2.blocksize = 128
    with pytest.raises(ValueError, match='from_bnb: "0" must have nested blocks of 256'):
        from_bnb(nn.Sequential(layer))
