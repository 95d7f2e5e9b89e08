"""tune, save, load, switching and merging over several methods: what coexists, and what is refused."""

import copy
import json

import pytest
import torch
from tiny_models import llama, logits, move, trainable, tuned
from torch import nn

import peftkern
from peftkern._modules import adapter_modules
from peftkern.adapter_file import CONFIG_NAME
from peftkern.methods import METHODS
from peftkern.nn import LoRALinear


def test_add_lora_is_the_lora_method(seed):
    torch.manual_seed(3)
    ours = peftkern.add_lora(llama(), rank=4, alpha=8, target_modules=["q_proj"])
    torch.manual_seed(3)
    theirs = peftkern.tune(llama(), "lora", rank=4, alpha=8, target_modules=["q_proj"])
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_qlora_quantises_once(seed):
    model = peftkern.tune(llama(), "qlora", rank=2, block_size=32)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.base_layer.block_size == 32
    peftkern.tune(model, "qlora", "two")
    assert layer.settings.keys() == {"default", "two"}
    quantized = peftkern.quantize(llama(), skip="down_proj")
    peftkern.tune(quantized, "qlora")
    assert type(quantized.model.layers[0].mlp.down_proj.base_layer) is nn.Linear


def test_different_methods_beside_each_other(tmp_path, seed):
    base = llama()
    expected = logits(base)
    model = move(peftkern.tune(llama(), "lora", "low", target_modules=["q_proj", "v_proj"]))
    low = logits(model)
    move(peftkern.tune(model, "bitfit", "bias", target_modules=["o_proj", "down_proj"]))
    bias = logits(model)
    assert {name.split(".")[-1] for name in trainable(model)} == {"bias"}
    move(peftkern.tune(model, "full", "full"), 0.01)
    full = logits(model)
    assert len({low.sum().item(), bias.sum().item(), full.sum().item(), expected.sum().item()}) == 4
    for name, result in {"low": low, "bias": bias, "full": full, None: expected}.items():
        peftkern.set_adapter(model, name)
        assert torch.equal(logits(model), result), name
    for name, result in {"low": low, "bias": bias, "full": full}.items():
        peftkern.save(model, tmp_path / name, name)
        torch.testing.assert_close(logits(peftkern.load(llama(), tmp_path / name)), result)
    peftkern.set_adapter(model, "low")
    peftkern.delete_adapter(model, "bias")
    assert torch.equal(logits(model), low)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear


def test_a_layer_has_adapters_of_one_method(seed):
    model = peftkern.tune(llama(), "lora")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r'bitfit: "model.layers.0.self_attn.q_proj" has adapters of another method'):
        peftkern.tune(model, "bitfit", "bias")
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    model = peftkern.tune(llama(), "bitfit", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="it is a BiasLinear"):
        peftkern.tune(model, "lora", "low")
    peftkern.delete_adapter(model, "default")
    peftkern.tune(model, "lora", "low")
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoRALinear)
    assert model.model.layers[0].self_attn.q_proj.active_adapter == "low"


def test_deleting_the_last_adapter_restores_the_architecture(seed):
    model = llama()
    before = [(name, type(module)) for name, module in model.named_modules()]
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    move(peftkern.tune(model, "lora"))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(2))
    peftkern.delete_adapter(model, "default")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert torch.equal(logits(model), logits(llama())) and seen == [1, 2]
    peftkern.quantize(model)


def test_disabling_nests_and_keeps_what_was_disabled(seed):
    model = tuned("lora")
    layer = model.model.layers[0].self_attn.q_proj
    layer.disable_adapters()
    with peftkern.disable_adapters(model), peftkern.disable_adapters(model):
        assert not any(module.enabled for module in adapter_modules(model).values())
    assert [module is layer for module in adapter_modules(model).values() if not module.enabled] == [True]


def test_a_failed_merge_is_undone(seed):
    model = tuned("lora")
    expected = logits(model)
    last = list(adapter_modules(model).values())[-1]
    kept = last.factors("default")[1].detach().clone()
    nn.init.constant_(last.factors("default")[1], float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        peftkern.merge(model)
    assert not any(module.merged for module in adapter_modules(model).values())
    with torch.no_grad():
        last.factors("default")[1].copy_(kept)
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="no adapter is active"):
        peftkern.merge(llama())


def test_merge_reports_each_layer(seed):
    reports = peftkern.merge(tuned("qlora"), to="nf4")
    assert len(reports) == 14 and {report.to for report in reports.values()} == {"nf4"}


def test_compiled_models(tmp_path, seed):
    compiled = torch.compile(llama(), backend="eager")
    assert peftkern.tune(compiled, "lora") is compiled
    move(compiled)
    peftkern.save(compiled, tmp_path)
    model = peftkern.load(llama(), tmp_path)
    assert torch.equal(logits(compiled._orig_mod), logits(model))


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (("lorra",), {}, ValueError, r"no method 'lorra' \(did you mean 'lora'"),
        (("nothing",), {}, ValueError, "no method 'nothing'; there is .*lora.*full"),
        ((3,), {}, TypeError, "method must be a str, got int"),
        (("lora",), {"rnk": 3}, TypeError, r"lora has no option 'rnk' \(did you mean 'rank'\?\); it has rank, alpha"),
        (("lora",), {"rank": 0}, ValueError, "rank must be positive"),
        (("lora",), {"target_modules": ["q_prj"]}, ValueError, r"'q_prj' matches no module \(did you mean 'q_proj'"),
        (("lora", "a.b"), {}, ValueError, "adapter_name"),
        (("bitfit",), {"target_modules": ["norm"]}, TypeError, '"model.norm" must be a linear layer or have a bias'),
        (("bitfit",), {"target_modules": ["nowhere"]}, ValueError, "target_modules 'nowhere' matches no module"),
        (("bitfit",), {"exclude_modules": ["nowhere"]}, ValueError, "exclude_modules 'nowhere' matches no module"),
        (("bitfit",), {"add_missing": False}, ValueError, "LlamaForCausalLM has no bias to train"),
        (("bitfit",), {"dtype": torch.int8}, TypeError, "dtype must be one of"),
        (("full",), {"target_modules": ["nowhere"]}, ValueError, "target_modules 'nowhere' matches no module"),
    ],
)
def test_what_tune_refuses_before_it_changes(arguments, options, error, message, seed):
    model = llama()
    with pytest.raises(error, match=message):
        peftkern.tune(model, *arguments, **options)
    assert not adapter_modules(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_names_are_taken_once(tmp_path, seed):
    model = tuned("bitfit")
    for name in ("bitfit", "full"):
        with pytest.raises(ValueError, match="has an adapter 'default' already; delete_adapter removes it"):
            peftkern.tune(model, name)
    peftkern.save(model, tmp_path)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        peftkern.load(model, tmp_path)
    assert torch.equal(logits(peftkern.load(model, tmp_path, "again")), logits(peftkern.load(llama(), tmp_path)))


def test_what_else_is_refused(tmp_path, seed):
    model = tuned("lora", "mine")
    for call in (peftkern.set_adapter, peftkern.delete_adapter):
        with pytest.raises(ValueError, match=r"no adapter 'mines' \(did you mean 'mine'\?\); there is 'mine'"):
            call(model, "mines")
    with pytest.raises(ValueError, match="save: no adapter 'default'"):
        peftkern.save(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        peftkern.load(model, tmp_path / "nowhere")
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "XLORA"}))
    with pytest.raises(ValueError, match="no method reads peft_type 'XLORA'"):
        peftkern.load(model, tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{}")
    with pytest.raises(ValueError, match="has no 'peft_type'"):
        peftkern.load(model, tmp_path)
    for call in (peftkern.enable_adapters, peftkern.disable_adapters, peftkern.merge, peftkern.unmerge):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
            call(3)


def test_methods_are_listed_by_their_names():
    assert all(method.name == name for name, method in METHODS.items())
    assert {"lora", "qlora", "bitfit", "full"} <= METHODS.keys()
