"""Mixed batches under HF PEFT: `adapter_names` is one op in an accelerated model, or PEFT's own, with a reason."""

import re
from typing import Any

import pytest
import torch
from test_peft_accelerate import BASE, BASES, _as_fp32, adapted, assert_near, bnb, dense, ia3, lora, rows, step
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import calls

peft = pytest.importorskip("peft")

# rows() has three samples.
MIXES = (["1", "__base__", "default"], ["1", "1", "1"], ["2", "default", "2"], ["__base__"] * 3)


def partial_lora() -> Any:
    """Of another rank and scaling, on the first layer alone: on the second its samples have none."""
    return peft.LoraConfig(target_modules=["0"], r=7, lora_alpha=3, use_rslora=True)


def mixed(base: Any = dense, *configs: Any) -> Any:
    return adapted(base(), *(configs or (lora(), lora(lora_alpha=3), partial_lora()))).eval()


def mixed_step(model: Any, names: list[str], x: Tensor | None = None) -> dict[str, Tensor]:
    """Output and every gradient, of all adapters."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_()
    caller = nn.Module()
    caller.model = model
    caller.forward = lambda x: model(x, adapter_names=names)
    return step(caller, rows() if x is None else x)


def their_step(base: str, model: Any, names: list[str], x: Tensor | None = None) -> dict[str, Tensor]:
    """PEFT's. On bitsandbytes' layers it raises where there is a gradient, so that dense ones of the same values do."""
    if base != "bitsandbytes":
        return mixed_step(model, names, x)
    return mixed_step(_as_fp32(model).eval(), names, None if x is None else x.detach().float().requires_grad_())


def assert_fast(model: nn.Module, times: int) -> None:
    for count in calls(model).values():
        assert count.fast == times and not count.stock, count


@BASE
@pytest.mark.parametrize("names", MIXES, ids=" ".join)
def test_outputs_and_gradients_are_peft_s(names, base, seed):
    """Adapters that no sample has get no gradient in either."""
    model = mixed(BASES[base])
    expected = their_step(base, model, names)
    ours = mixed_step(peftkern.accelerate(model), names)
    assert_near(ours, expected, 5e-6)
    if names != ["__base__"] * 3:
        assert calls(model)["base_model.model.0"] == (1, {})
    elif base == "bitsandbytes":
        assert_fast(model, 1)


@BASE
def test_bf16_and_autocast(base, seed):
    """bf16 layers with fp32 adapters; PEFT rounds the base's result and the adapter's before it adds them."""
    model, names = mixed(lambda: BASES[base](torch.bfloat16)), MIXES[0]
    x = rows(torch.bfloat16)
    expected = their_step(base, model, names, x)
    ours = mixed_step(peftkern.accelerate(model), names, x)
    assert ours["y"].dtype == torch.bfloat16
    assert_near(ours, {name: value.to(ours[name].dtype) for name, value in expected.items()}, 2**-6)
    assert_fast(model, 1)
    if base == "dense":
        model = mixed()
        with torch.autocast("cpu", torch.bfloat16):
            expected = mixed_step(model, names)
            assert_near(mixed_step(peftkern.accelerate(model), names), expected, 2**-6)
        assert_fast(model, 1)


def test_bitsandbytes_with_gradients(seed):
    """Stock PEFT adds in place to a view that bitsandbytes' function returned, which autograd forbids."""
    model = mixed(bnb)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(rows(), adapter_names=MIXES[0])
    assert peftkern.accelerate(model)(rows(), adapter_names=MIXES[0]).requires_grad


def test_samples_are_those_of_one_adapter_each(seed):
    model = peftkern.accelerate(mixed())
    y = model(rows(), adapter_names=MIXES[0])
    for sample, name in enumerate(MIXES[0]):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(rows())
        else:
            model.set_adapter(name)
            expected = model(rows())
        torch.testing.assert_close(y[sample], expected[sample], rtol=1e-4, atol=1e-5)


def test_nothing_is_kept(seed):
    """Values, scalings and adapters are read at every call."""
    model = peftkern.accelerate(mixed())
    before = model(rows(), adapter_names=MIXES[0])
    model.base_model.model[0].lora_B["1"].weight.data.mul_(-2)
    model.base_model.model[2].scaling["default"] = torch.tensor(5.0)
    model.delete_adapter("2")
    ours = model(rows(), adapter_names=MIXES[0])
    assert_fast(model, 2)
    assert torch.equal(ours[1], before[1]) and not torch.allclose(ours[0], before[0])
    theirs = peftkern.restore(model)(rows(), adapter_names=MIXES[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break(seed):
    model = peftkern.accelerate(mixed())
    layer = model.base_model.model[0]
    expected = layer(rows(), adapter_names=MIXES[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, adapter_names=MIXES[0]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows()), expected)


def test_dropout_of_a_layer_in_training(seed):
    """PEFT's model refuses mixed batches in training, its layers do not: with all dropped the masks cannot differ."""
    config = lora(lora_dropout=0.5)
    model = mixed(dense, config, config).train()
    layer = model.base_model.model[0]
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 1.0
    expected = layer(rows(), adapter_names=["1", "default", "__base__"])
    peftkern.accelerate(model)
    torch.testing.assert_close(layer(rows(), adapter_names=["1", "default", "__base__"]), expected)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.5
    first, second = (layer(rows(), adapter_names=["1", "default", "__base__"]) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    with pytest.raises(ValueError, match="in training mode"):
        model(rows(), adapter_names=["1"] * 3)
    assert calls(layer)[""] == (3, {})


def with_variant() -> Any:
    return mixed(dense, lora(), lora(alora_invocation_tokens=[1]))


def two_rates() -> Any:
    model = mixed(dense, lora(lora_dropout=0.5), lora(lora_dropout=0.25))
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = min(1.0, 2 * module.p) if module.p == 0.5 else 0.0
            module.train()
    return model


def hooked() -> Any:
    model = mixed()
    for at in (0, 2):
        model.base_model.model[at].lora_A["1"].register_forward_hook(lambda module, args, y: 2 * y)
    return model


FALLBACKS = {
    "a mixed batch with lora_bias": lambda: mixed(dense, lora(), lora(lora_bias=True)),
    "a mixed batch of several dropout rates": two_rates,
    "a LoRA variant, ALoraLinearVariant": with_variant,
    "lora_A has hooks": hooked,
    "auto: no kernel for torch.float64 on cpu": lambda: mixed(lambda: dense(torch.float64)),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_the_rest_is_peft_s_own_forward_bit_for_bit(reason, seed):
    model, names = FALLBACKS[reason](), ["1", "__base__", "default"]
    x = rows(model.base_model.model[0].base_layer.weight.dtype)
    expected = model(x, adapter_names=names)
    peftkern.accelerate(model)
    assert torch.equal(model(x, adapter_names=names), expected)
    assert list(calls(model).values()) == [(0, {reason: 1})] * 2
    for record in peftkern.explain(model, adapter_names=names):
        assert record.op == "multi_lora_linear" and record.implementation == "torch" and reason in record.reason


def dora() -> Any:
    return mixed(dense, lora(), lora(use_dora=True))


def merged() -> Any:
    model = mixed()
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "names", "reason", "message"),
    [
        (dora, ["1"] * 3, "a mixed batch with DoRA", "Cannot pass `adapter_names` when DoRA is enabled"),
        (merged, ["1"] * 3, "adapter_names with merged adapters", "when there are merged adapters"),
        (
            mixed,
            ["1"] * 2,
            "adapter_names does not fit x",
            "should be the same as the number of inputs, but got 2 and 3",
        ),
    ],
)
def test_wrong_batches_raise_what_peft_raises(make, names, reason, message, seed):
    model = peftkern.accelerate(make())
    with pytest.raises(ValueError, match=re.escape(message)):
        model(rows(), adapter_names=names)
    assert calls(model)["base_model.model.0"] == (0, {reason: 1})


def test_disabled_adapters_and_ia3(seed):
    model = peftkern.accelerate(mixed(bnb))
    with torch.no_grad(), model.disable_adapter():
        expected = model(rows())
        assert torch.equal(model(rows(), adapter_names=MIXES[0]), expected)
    assert_fast(model, 2)
    layer = peftkern.accelerate(adapted(dense(), ia3())).base_model.model[0]
    with pytest.raises(TypeError, match="adapter_names"):
        layer(rows(), adapter_names=["default"] * 3)


def test_explain_takes_the_batch(seed):
    model = peftkern.accelerate(mixed())
    assert {record.op for record in peftkern.explain(model)} == {"lora_linear"}
    records = peftkern.explain(model, rows(), adapter_names=MIXES[0])
    assert {(record.op, record.implementation) for record in records} == {("multi_lora_linear", "cpu")}
    alone = peftkern.explain(model, adapter_names=MIXES[3])[0]
    assert alone.implementation == "torch" and "no active adapter" in alone.reason


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(beams, seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    options = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(r=4, **options))
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=30, **options))
    model.eval()
    tokens = torch.randint(32, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    names = ["other", "default", "__base__"]
    expected = model.generate(input_ids=tokens, adapter_names=names, **options)
    ours = peftkern.accelerate(model).generate(input_ids=tokens, adapter_names=names, **options)
    assert torch.equal(ours, expected)
    assert all(c.fast == 8 and not c.stock for c in calls(model).values())
    assert not torch.equal(model.generate(input_ids=tokens, adapter_names=["default"] * 3, **options), expected)
