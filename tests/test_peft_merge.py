"""PEFT on a model that the quantizer loaded: it trains, merges into the 4-bit weights, and saves."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_layers import assert_entries, snapshot
from tiny_models import llama, logits, loss, move, transformers
from torch import nn

import peftkern
from peftkern import nf4_quantize
from peftkern.nn import NF4Linear

peft = pytest.importorskip("peft")

from peftkern.integrations.peft import calls as peft_calls  # noqa: E402
from peftkern.integrations.peft_merge import enable_merge  # noqa: E402
from peftkern.integrations.transformers import NF4Config  # noqa: E402


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, **options)


CONFIGS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
METHOD = pytest.mark.parametrize("method", CONFIGS)
SAFE = pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    llama().save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=NF4Config())


def adapted(base: nn.Module, config: Any) -> nn.Module:
    return move(peft.get_peft_model(base, copy.deepcopy(config)))


def dense_copy(model: nn.Module) -> nn.Module:
    """With dense bases in fp32, so that PEFT's own merge works."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
            model.set_submodule(path, dense)
    return model


def bases(model: nn.Module) -> dict[str, NF4Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}


@METHOD
def test_training_on_a_loaded_model(method, seed, tmp_path):
    model = adapted(loaded(tmp_path), CONFIGS[method])
    before = {path: snapshot(base) for path, base in bases(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0], losses
    for path, base in bases(model).items():
        assert_entries(snapshot(base), before[path])


@METHOD
@SAFE
@DTYPE
def test_merging_quantises_what_peft_merges_into_a_dense_base(method, safe, dtype, seed, tmp_path):
    model = adapted(loaded(tmp_path, dtype), CONFIGS[method])
    adapted_bases = {path.removeprefix("base_model.model.").removesuffix(".base_layer") for path in bases(model)}
    adapted_bases -= set(bases(model.base_model.model))
    dense = dense_copy(model).merge_and_unload(safe_merge=safe)
    merged = enable_merge(model).merge_and_unload(safe_merge=safe)
    assert len(adapted_bases) == (4 if method == "ia3" else 14)
    for path in adapted_bases:
        base = merged.get_submodule(path)
        expected = nf4_quantize(dense.get_submodule(path).weight)
        assert torch.equal(base.weight, expected.codes), path
        assert torch.equal(base.absmax, expected.absmax) and base.weight_dtype == dtype


@METHOD
@SAFE
def test_unmerging_is_exact(method, safe, seed, tmp_path):
    model = enable_merge(adapted(loaded(tmp_path), CONFIGS[method]))
    before, expected = snapshot(model), logits(model)
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(model.get_submodule(_layer(model)).weight, before[_layer(model) + ".weight"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.3)
    model.unmerge_adapter()
    assert_entries(snapshot(model), before)
    assert torch.equal(logits(model), expected)


def _layer(model: nn.Module) -> str:
    return next(path for path in bases(model) if "0.mlp.down_proj" in path)


def test_two_adapters_and_back(seed, tmp_path):
    model = adapted(loaded(tmp_path), CONFIGS["lora"])
    model.add_adapter("other", lora())
    move(model)
    enable_merge(model)
    before = snapshot(model)
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    assert_entries(snapshot(model), before)


def test_biases_are_merged_and_restored(seed):
    base = nn.Sequential(NF4Linear(32, 16), NF4Linear(16, 8))
    model = enable_merge(adapted(base, peft.LoraConfig(target_modules=["0", "1"], lora_bias=True)))
    before, x = snapshot(model), torch.randn(3, 32)
    layer = model.base_model.model[0]
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.bias, before["base_model.model.0.base_layer.bias"])
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    model.unmerge_adapter()
    assert_entries(snapshot(model), before)


@SAFE
def test_a_broken_adapter_leaves_the_base(safe, seed, tmp_path):
    model = enable_merge(adapted(loaded(tmp_path), CONFIGS["lora"]))
    layer = model.get_submodule(_layer(model).removesuffix(".base_layer"))
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"NaN"):
        layer.merge(safe_merge=safe)
    assert not layer.merged and type(layer.base_layer) is NF4Linear
    assert_entries(snapshot(layer), before)


def test_an_interrupted_merge_leaves_the_base(seed, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    model = enable_merge(adapted(loaded(tmp_path), CONFIGS["lora"]))
    layer = model.get_submodule(_layer(model).removesuffix(".base_layer"))
    before, merged = snapshot(layer), list(layer.merged_adapters)
    monkeypatch.setattr("peftkern.integrations.peft_merge._quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.merge()
    assert layer.merged_adapters == merged and not layer.merged and type(layer.base_layer) is NF4Linear
    assert_entries(snapshot(layer), before)


@METHOD
@pytest.mark.parametrize("first", [False, True], ids=["accelerate", "enable_merge, accelerate"])
def test_accelerated_layers_merge_too(first, method, seed, tmp_path):
    model = adapted(loaded(tmp_path), CONFIGS[method])
    expected = enable_merge(copy.deepcopy(model)).merge_and_unload()
    model = peftkern.accelerate(enable_merge(model) if first else model)
    assert len(peft_calls(model)) == (4 if method == "ia3" else 14)
    before = snapshot(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_entries(snapshot(model), before)
    assert_entries(snapshot(enable_merge(model).merge_and_unload()), snapshot(expected))


def test_merged_models_are_saved(seed, tmp_path):
    merged = enable_merge(adapted(loaded(tmp_path / "dense"), CONFIGS["lora"])).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_adapters_are_saved_as_always(seed, tmp_path):
    model = enable_merge(adapted(loaded(tmp_path / "dense"), CONFIGS["lora"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(loaded(tmp_path / "dense"), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(read), logits(model))


def test_dense_bases_and_wrong_arguments():
    with pytest.raises(TypeError, match=r"enable_merge: model must be an nn\.Module, got int"):
        enable_merge(3)
    with pytest.raises(ValueError, match=r"enable_merge: the model has no LoRA or \(IA\)\^3 layer of PEFT on an NF4"):
        enable_merge(peft.get_peft_model(llama(), CONFIGS["lora"]))
