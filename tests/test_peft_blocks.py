"""`accelerate(model, fuse_blocks=True)`: PEFT's layers of a transformers block in one op, with nothing else changed."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nn_blocks import Calls, assert_near, batch, make, results
from torch import nn

import peftkern
from peftkern.integrations.peft import calls as layer_calls
from peftkern.nn import LoRAAttention, LoRAMLP

peft = pytest.importorskip("peft")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def adapted(model: nn.Module, targets: Any = "all-linear", **options: Any) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, **{"lora_alpha": 6, **options})
    )


def layer_of(model: nn.Module, path: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.0.{path}")


@pytest.mark.parametrize("kind", ["fp32", "bf16", "NF4Linear", "lora_bias"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma"])
def test_same_logits_and_gradients(name: str, kind: str, calls: Calls, seed: int) -> None:
    model = make(name)
    if kind == "bf16":
        model.bfloat16()
    if kind == "NF4Linear":
        peftkern.quantize(model)
    biased = [n.rpartition(".")[2] for n, m in model.named_modules() if getattr(m, "bias", None) is not None]
    if kind == "lora_bias" and not {"q_proj", "k_proj"} <= set(biased):
        pytest.skip("PEFT wants a bias on the base layer to merge into, which the others lack")
    options = {"targets": ["q_proj", "k_proj", "v_proj"], "lora_bias": True} if kind == "lora_bias" else {}
    model = adapted(model, **options)
    inputs = batch()
    expected = results(peftkern.accelerate(model), inputs)
    assert calls.take() == (0, 0)
    assert peftkern.accelerate(model, fuse_blocks=True) is model
    # The same products in another order; in bf16 the gradients of x are rounded once instead of once a layer.
    assert_near(results(model, inputs), expected, 4e-2 if kind == "bf16" else 2e-5)
    assert calls.take() == (2, 0 if kind == "lora_bias" else 2)
    counts = layer_calls(model).values()
    assert all(count.fast == 2 and not count.stock for count in counts)


def test_bitsandbytes_layers(calls: Calls, seed: int) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    model = make("Llama")
    for path, linear in list(model.model.named_modules()):
        if type(linear) is nn.Linear:
            layer = layers.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(linear.state_dict())
            model.model.set_submodule(path, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    model = adapted(model, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    inputs = batch()
    expected = results(peftkern.accelerate(model), inputs)
    assert_near(results(peftkern.accelerate(model, fuse_blocks=True), inputs), expected)
    assert calls.take() == (2, 2)
    with torch.autocast("cpu", torch.bfloat16):  # in which bitsandbytes' layers give x's dtype back
        model(**inputs)
    assert calls.take() == (0, 0)


def test_nothing_else_changes(seed: int, tmp_path: Path) -> None:
    model = peftkern.accelerate(adapted(make("Llama")))
    plain = copy.deepcopy(model)
    names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    peftkern.accelerate(peftkern.accelerate(model, fuse_blocks=True), fuse_blocks=True)
    assert isinstance(layer_of(model, "self_attn"), LoRAAttention) and isinstance(layer_of(model, "mlp"), LoRAMLP)
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == parameters
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    inputs = batch()
    logits = model(**inputs).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(**inputs).logits, logits)
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(make("Llama"), tmp_path)
    assert set(read.state_dict()) == set(names)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-3, atol=1e-4)
    restored = peftkern.restore(model)
    stock = [type(module) for module in peftkern.restore(plain).modules()]
    assert [type(module) for module in restored.modules()] == stock != classes


def test_explain_names_the_op(seed: int) -> None:
    model = peftkern.accelerate(adapted(make("Llama")), fuse_blocks=True)
    named = {record.name.rpartition(".")[2]: record.op for record in peftkern.explain(model)}
    assert named == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "lora_qkv"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "lora_mlp"),
        "o_proj": "lora_linear",
        "self_attn": "prefix_attention",
        "model": "cross_entropy",
    }
    layer_of(model, "mlp.up_proj").lora_A.register_forward_hook(lambda module, args, y: None)  # never called
    layer_of(model, "mlp.up_proj").lora_A["default"].register_forward_hook(lambda module, args, y: None)
    records = {record.name: record for record in peftkern.explain(model)}
    prefix = "base_model.model.model.layers."
    assert (
        records[f"{prefix}0.mlp.gate_proj"].op == "lora_linear" and records[f"{prefix}1.mlp.up_proj"].op == "lora_mlp"
    )
    assert "lora_A has hooks" in records[f"{prefix}0.mlp.up_proj"].reason


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: Any) -> None:
    model.merge_adapter()


def hook(model: Any) -> None:
    for layer in model.base_model.model.model.layers:
        for path in ("self_attn.k_proj", "mlp.gate_proj"):
            layer.get_submodule(path).register_forward_hook(lambda module, args, y: 2 * y)


def second(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(target_modules=["k_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def dora(model: Any) -> None:
    config = peft.LoraConfig(target_modules=["k_proj", "up_proj"], use_dora=True, init_lora_weights=False)
    model.add_adapter("dora", config)
    model.set_adapter("dora")


@pytest.mark.parametrize("change", [disable, merge, hook, second, dora])
def test_each_call_decides(change: Any, calls: Calls, seed: int) -> None:
    model = peftkern.accelerate(adapted(make("Llama")), fuse_blocks=True)
    inputs = batch()
    model(**inputs)
    assert calls.take() == (2, 2)
    change(model)
    logits = model(**inputs).logits
    assert calls.take() == (0, 0)
    torch.testing.assert_close(peftkern.restore(model)(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


def test_dropout_of_each_projection(calls: Calls, seed: int) -> None:
    model = peftkern.accelerate(adapted(make("Llama"), lora_dropout=0.5), fuse_blocks=True).train()
    inputs = batch()
    torch.manual_seed(0)
    logits = model(**inputs).logits
    assert calls.take() == (2, 2)
    peftkern.unfuse_blocks(model)
    torch.manual_seed(0)
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)  # the same masks
    peftkern.accelerate(model, fuse_blocks=True)
    layer_of(model, "self_attn.q_proj").lora_dropout["default"].p = 0.1
    model(**inputs)
    assert calls.take() == (1, 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, seed: int) -> None:
    model = peftkern.accelerate(adapted(make("Llama"), lora_dropout=0.5), fuse_blocks=True).train()
    inputs = batch()
    torch.manual_seed(0)
    expected = results(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    assert_near(results(model, inputs), expected, 1e-6)


def test_compiles_without_a_graph_break(seed: int) -> None:
    model = peftkern.accelerate(adapted(make("Llama")), fuse_blocks=True)
    inputs = batch()
    expected = results(model, inputs)
    torch._dynamo.reset()
    block = layer_of(model, "mlp")
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    assert_near(results(model, inputs), expected, 1e-6)


def test_a_model_without_such_blocks(seed: int) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="accelerate: the model has no block to fuse"):
        peftkern.accelerate(model, fuse_blocks=True)
    assert layer_calls(model)
