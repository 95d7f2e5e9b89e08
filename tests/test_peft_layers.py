"""What `accelerate` leaves to PEFT, what stays as it was, and what it mends."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_peft_accelerate import (
    BASE,
    BASES,
    CONFIGS,
    METHOD,
    adapted,
    assert_all_fast,
    assert_near,
    bnb,
    dense,
    ia3,
    lora,
    native,
    rows,
    step,
)
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import calls, register

peft = pytest.importorskip("peft")


def stock_reasons(model: nn.Module) -> set[str]:
    found = calls(model).values()
    assert all(c.fast == 0 for c in found)
    return {reason for c in found for reason in c.stock}


# State


@METHOD
def test_everything_but_forward_is_as_before(method, seed, tmp_path: Path):
    model = adapted(dense(), CONFIGS[method]())
    names, text = list(model.state_dict()), repr(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    peftkern.accelerate(peftkern.accelerate(model))
    assert list(model.state_dict()) == names and repr(model) == text
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(rows()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    y = model(rows())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(rows()), y)
    model.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(model)
    fresh = adapted(dense(), CONFIGS[method]())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(rows()), y, rtol=1e-4, atol=1e-5)
    assert set(peft.get_peft_model_state_dict(fresh)) == set(state)


@METHOD
def test_merging_is_peft_s(method, seed):
    model = peftkern.accelerate(adapted(dense(), CONFIGS[method]()))
    theirs = peftkern.restore(copy.deepcopy(model))
    expected = model(rows())
    for each in (model, theirs):
        each.merge_adapter()
    assert torch.equal(model(rows()), theirs(rows()))
    assert stock_of_last(model) == "merged, the base alone"
    for each in (model, theirs):
        each.unmerge_adapter()
    torch.testing.assert_close(model(rows()), expected, rtol=1e-4, atol=1e-5)
    for own, other in zip(model.parameters(), theirs.parameters()):
        assert torch.equal(own, other)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(rows()), expected, rtol=1e-4, atol=1e-4)


def stock_of_last(model: nn.Module) -> str:
    return list(next(iter(calls(model).values())).stock)[-1]


def test_adapters_come_go_and_are_hot_swapped(seed, tmp_path: Path):
    from peft.utils.hotswap import hotswap_adapter

    model = peftkern.accelerate(adapted(dense(), lora()))
    other = adapted(dense(), lora(lora_alpha=3))
    other.save_pretrained(tmp_path)
    model.add_adapter("late", lora())
    model.set_adapter("late")
    model.delete_adapter("default")
    torch.testing.assert_close(model(rows()), model.unload()(rows()), rtol=1e-4, atol=1e-5)

    model = peftkern.accelerate(adapted(dense(), lora()))
    hotswap_adapter(model, str(tmp_path), "default")
    expected = step(peftkern.restore(copy.deepcopy(model)), rows())
    assert_near(step(model, rows()), expected, 5e-6)


# What PEFT still computes


def dora_twice() -> Any:
    model = adapted(dense(), lora(use_dora=True), lora(use_dora=True))
    model.base_model.set_adapter(["default", "1"])
    return model


def hooked(place: str) -> Any:
    model = adapted(dense(), lora())
    for at in (0, 2):
        module = model.base_model.model[at].get_submodule(place)
        module.register_forward_hook(lambda module, args, y: 2 * y)
    return model


def replaced() -> Any:
    model = adapted(dense(), lora())
    for at in (0, 2):
        base = model.base_model.model[at].base_layer
        base.forward = lambda x, own=base.forward: 2 * own(x)
    return model


def with_trained_weight(config: Any) -> Any:
    model = adapted(dense(), config)
    for at in (0, 2):
        model.base_model.model[at].base_layer.weight.requires_grad_()
    return model


def dora_with_bias() -> Any:
    """Which no config of PEFT's asks for."""
    model = adapted(dense(), lora(use_dora=True))
    for at in (0, 2):
        layer = model.base_model.model[at]
        layer.lora_B["default"].bias = nn.Parameter(torch.randn(layer.out_features))
    return model


def bf16_adapter() -> Any:
    model = adapted(dense(), lora())
    for at in (0, 2):
        layer = model.base_model.model[at]
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    return model


def disabled() -> Any:
    model = adapted(dense(), lora())
    model.base_model.disable_adapter_layers()
    return model


FALLBACKS = {
    "several adapters, one of them DoRA": dora_twice,
    "lora_A has hooks": lambda: hooked("lora_A.default"),
    "base_layer has hooks": lambda: hooked("base_layer"),
    "base_layer.forward was replaced": replaced,
    "DoRA on a weight that requires grad": lambda: with_trained_weight(lora(use_dora=True)),
    "the base weight requires grad": lambda: with_trained_weight(ia3()),
    "DoRA with lora_bias": dora_with_bias,
    "the adapter is torch.bfloat16 and torch.bfloat16, x torch.float32": bf16_adapter,
    "adapters disabled, the base alone": disabled,
    "auto: no kernel for torch.float64 on cpu": lambda: adapted(dense(torch.float64), lora()),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_the_rest_is_peft_s_own_forward_bit_for_bit(reason, seed):
    model = FALLBACKS[reason]()
    x = rows(model.base_model.model[0].base_layer.weight.dtype)
    expected = step(model, x) if "disabled" not in reason else {"y": model(x)}
    peftkern.accelerate(model)
    ours = step(model, x) if "disabled" not in reason else {"y": model(x)}
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert stock_reasons(model) == {reason}
    for record in peftkern.explain(model):
        assert record.implementation == "torch" and reason in record.reason


def test_a_trained_dense_weight_gets_its_gradient(seed):
    model = with_trained_weight(lora())
    expected = step(model, rows())
    assert "base_model.model.0.base_layer.weight" in expected
    assert_near(step(peftkern.accelerate(model), rows()), expected, 5e-6)
    assert_all_fast(model)


def test_wrong_input_raises_what_peft_raises(seed):
    model = peftkern.accelerate(adapted(dense(), lora()))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="dtype"):
        model(rows(torch.bfloat16))


def test_transforms_and_forward_mode_are_torch_s(seed):
    model, x = adapted(dense(), lora()), rows().detach()
    layer = model.base_model.model[0]
    expected = layer(x)
    peftkern.accelerate(model)
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    assert stock_reasons(layer) == {"inside a torch.func transform", "forward-mode differentiation"}


def test_hooks_of_the_layer_itself_run(seed):
    model = peftkern.accelerate(adapted(dense(), lora()))
    seen: list[Tensor] = []
    model.base_model.model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    model(rows())
    assert len(seen) == 1
    assert_all_fast(model)


def test_explain_lists_every_layer(seed):
    model = nn.Sequential(dense(), nn.Embedding(4, 8))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r"0\.[02]|1"))
    before = peftkern.explain(model)
    assert all("has not been called" in record.reason for record in before[:2])
    peftkern.accelerate(model)
    model.base_model.model[0](rows())
    records = peftkern.explain(model)
    assert [record[:3] for record in records] == [
        ("base_model.model.0.0", "lora_linear", "cpu"),
        ("base_model.model.0.2", "lora_linear", "cpu"),
        ("base_model.model.1", "linear", "torch"),
    ]
    assert "ran 1 times" in records[0].reason and "no op for" in records[2].reason
    quantized = peftkern.accelerate(adapted(native(), lora()))
    assert [record.op for record in peftkern.explain(quantized)] == ["lora_linear"] * 2


def test_transformers_add_adapter_and_the_registered_config(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    model = transformers.LlamaForCausalLM(config)
    options = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False))
    expected = model(tokens).logits
    torch.testing.assert_close(peftkern.accelerate(model)(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls(model)) == 4 and all(c == (1, {}) for c in calls(model).values())

    registered = peft.get_peft_model(transformers.LlamaForCausalLM(config), register(peft.LoraConfig(**options)))
    registered(tokens)
    assert len(calls(registered)) == 14 and all(c == (1, {}) for c in calls(registered).values())
    peftkern.restore(registered)
    assert calls(registered) == {}
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got IA3Config"):
        register(ia3())


@BASE
def test_the_registered_config_creates_what_accelerate_would(base, seed):
    model = adapted(BASES[base](), register(lora()))
    accelerated = peftkern.accelerate(adapted(BASES[base](), lora()))
    assert [type(m) for m in model.modules()] == [type(m) for m in accelerated.modules()]


def test_report_counts_what_runs_on_an_op(seed):
    model = adapted(dense(), lora())
    assert {row.implementation for row in peftkern.report(model).rows} == {"torch"}
    rows = {row.name: row for row in peftkern.report(peftkern.accelerate(model)).rows}
    assert rows["base_model.model.0.base_layer"].implementation == "cpu"
    assert rows["base_model.model.0.lora_A.default"].implementation == "cpu"


@METHOD
def test_a_4_bit_base_alone_runs_on_an_op(method, seed):
    model = adapted(bnb(), CONFIGS[method]())
    with torch.no_grad(), model.disable_adapter():
        expected = model(rows())  # a leaf that needs a gradient: not repacked
        torch.testing.assert_close(peftkern.accelerate(model)(rows()), expected, rtol=1e-4, atol=1e-5)
        assert [record.op for record in peftkern.explain(model)] == ["nf4_linear"] * 2
    assert_all_fast(model)


def test_the_plugin_counts(tmp_path: Path):
    test = tmp_path / "test_layers.py"
    test.write_text(
        "import peft, torch\n"
        "def test_layer():\n"
        "    config = peft.LoraConfig(target_modules=['0'], lora_dropout=0.5)\n"
        "    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)\n"
        "    model(torch.ones(2, 8))\n"
        "    with model.disable_adapter():\n"
        "        model(torch.ones(2, 8))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "peftkern.integrations.peft_pytest", str(test)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for line in (r"all +1 of +1 +100.0%", r"LoRA +1 of +1", r"dropout +1 of +1", r"no adapter computes +0 of +1 +0.0%"):
        assert re.search(line, done.stdout), done.stdout


# Mended


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_4_bit_scales_lora_bias(safe, seed):
    model = adapted(bnb(), lora(lora_bias=True, lora_alpha=12))
    layer = peftkern.accelerate(model).base_model.model[0]
    base, added = layer.base_layer.bias.detach().clone(), layer.lora_B["default"].bias.detach() * 3
    layer.merge(safe_merge=safe)
    assert layer.merged_adapters == ["default"] and layer.lora_bias == {"default": True}
    torch.testing.assert_close(layer.base_layer.bias.data, base + added)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.bias.data, base)
    layer.lora_B["default"].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged and not layer.base_layer.bias.isnan().any()


def test_ia3_on_4_bit_keeps_the_dtype(seed):
    model = adapted(bnb(torch.bfloat16), ia3())
    assert model(rows(torch.bfloat16)).dtype == torch.float32
    peftkern.accelerate(model)
    assert model(rows(torch.bfloat16)).dtype == torch.bfloat16
    handle = model.base_model.model[2].base_layer.register_forward_hook(lambda module, args, y: None)
    assert model(rows(torch.bfloat16)).dtype == torch.bfloat16
    handle.remove()


@pytest.mark.parametrize("packed", [False, True], ids=["accelerated first", "after an eval forward"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_eval_leaves_4_bit_weights_as_they_are(method, packed, seed):
    """bitsandbytes' eval path repacks in place: DoRA, merging and gradients are wrong from then on."""
    model, x = adapted(bnb(), CONFIGS[method]()), rows().detach()
    expected = step(model, rows())
    if packed:
        model.eval()(x)
        model.train()
    peftkern.accelerate(model).eval()
    with torch.no_grad():
        with model.disable_adapter():
            model(x)
        if method == "lora":
            model(x, adapter_names=["default"] * 3)
    # Repacking rounded the scales to bf16.
    assert_near(step(model.train(), rows()), expected, 2**-7 if packed else 5e-6)
    assert [c.fast for c in calls(model).values()] == [3 if method == "lora" else 2] * 2
    assert not any(m.support_avx512bf16_for_cpu for m in bases(model))
    peftkern.restore(model)
    assert [m.support_avx512bf16_for_cpu for m in bases(model)] == [m.support_avx512bf16_for_cpu for m in bases(bnb())]


def bases(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes")]
