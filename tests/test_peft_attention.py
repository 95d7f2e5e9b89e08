"""`accelerate` and transformers' attention: what torch's computes, by prefix_attention without a prefix."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from test_nn_blocks import assert_near, batch, make, results
from torch import Tensor, nn

import peftkern
from peftkern.integrations import _attention

peft = pytest.importorskip("peft")

MODELS = ["Llama", "Mistral", "Qwen2", "Gemma", "GPT2", "Bert"]


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_is_small", lambda query, key: False)


def model_of(name: str, attention: str = "sdpa") -> Any:
    if name == "GPT2":
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()
    else:
        model = make(name, attention)
    targets = {"GPT2": ["c_attn"], "Bert": ["query"]}.get(name, ["q_proj"])
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def attentions(model: nn.Module) -> list[Any]:
    return [record for record in peftkern.explain(model) if record.op == "prefix_attention"]


def ran(model: nn.Module) -> list[tuple[int, dict[str, int]]]:
    """Of each attention: how often on the op, and on torch's."""
    counts = [dict(_attention.counts_of(module)) for _, module in _attention.attentions(model)]
    return [(count.pop("fast", 0), count) for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_same_logits_and_gradients(name: str, dtype: torch.dtype, seed: int) -> None:
    """Of a batch with padding on the left, and of one without, which has no mask."""
    model = model_of(name).to(dtype)
    before = copy.deepcopy(model.config.to_dict())
    inputs = batch()
    full = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    expected = [results(model, each) for each in (inputs, full)]
    peftkern.accelerate(model)
    actual = [results(model, each) for each in (inputs, full)]
    assert ran(model) == [(2, {})] * 2
    # bf16: rounding of every layer's result, here and there another way.
    for one, other in zip(actual, expected):
        assert_near(one, other, 2e-5 if dtype == torch.float32 else 4e-2)
    assert model.config.to_dict() == before and model.base_model.model.config._attn_implementation == "sdpa"
    peftkern.restore(model)
    assert not list(_attention.attentions(model))
    torch.testing.assert_close(results(model, inputs), expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache: str | None, seed: int) -> None:
    model, ids = model_of("Llama"), batch()["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(peftkern.accelerate(model).generate(input_ids=ids, **options), expected)
    assert ran(model) == [(6, {})] * 2


def test_explained_and_counted(seed: int) -> None:
    model = peftkern.accelerate(model_of("Llama"))
    assert [record.name for record in attentions(model)] == [
        f"base_model.model.model.layers.{i}.self_attn" for i in range(2)
    ]
    model(**batch())
    assert all("ran 1 times, torch's own 0 times" in record.reason for record in attentions(model))
    assert {record.implementation for record in attentions(model)} == {"cpu"}


def test_with_fused_blocks(seed: int) -> None:
    model = peft.get_peft_model(
        make("Llama"), peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    )
    inputs = batch()
    expected = results(model, inputs)
    for _ in range(2):
        assert_near(results(peftkern.accelerate(model, fuse_blocks=True), inputs), expected)
    assert ran(model) == [(2, {})] * 2
    peftkern.restore(model)
    torch.testing.assert_close(results(model, inputs), expected, rtol=0, atol=0)


def test_other_attention_stays(seed: int) -> None:
    """Asked for beforehand, or afterwards."""
    model = peftkern.accelerate(model_of("Llama", "eager"))
    model(**batch())
    assert ran(model) == [(0, {})] * 2 and not attentions(model)
    model, inputs = model_of("Llama"), batch()
    model.base_model.model.set_attn_implementation("eager")
    expected = results(model, inputs)
    model.base_model.model.set_attn_implementation("sdpa")
    peftkern.accelerate(model).base_model.model.set_attn_implementation("eager")
    assert_near(results(model, inputs), expected)
    assert ran(model) == [(0, {})] * 2 and not attentions(model)


OBSTACLES = {
    "dropout of attention weights": {"dropout": 0.5},
    "arguments that only torch's attention has": {"position_bias": torch.zeros(1, 4, 6, 6)},
    "query, key and value differ in dtype": {"value": torch.zeros(1, 2, 6, 8, dtype=torch.bfloat16)},
    "query, key and value do not fit together": {"value": torch.zeros(1, 2, 6, 10)},
    "a mask that the op does not take": {"attention_mask": torch.zeros(1, 1, 6, 6, requires_grad=True)},
    "no kernels for torch.float64": {name: torch.zeros(1, 2, 6, 8).double() for name in ("query", "key", "value")},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_torch_computes_the_rest(reason: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    module = model_of("Llama").base_model.model.model.layers[0].self_attn
    _attention.use(module)
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_attention, "sdpa_attention_forward", lambda *args, **further: seen.append((args, further)))
    heads = {name: torch.randn(1, 4 if name == "query" else 2, 6, 8) for name in ("query", "key", "value")}
    call: dict[str, Any] = {**heads, "attention_mask": None, "scaling": 0.5, **OBSTACLES[reason]}
    _attention.attention_forward(module, **call)
    assert len(seen) == 1 and seen[0][0][0] is module
    assert seen[0][0][1] is call["query"] and seen[0][0][4] is call["attention_mask"]
    assert seen[0][0][5:7] == (call.get("dropout", 0.0), 0.5)
    [(met, count)] = _attention.counts_of(module).items()
    assert count == 1 and (met == reason or "float64" in met)


def test_few_heads_for_many_threads(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, inputs = peftkern.accelerate(model_of("Llama")), batch()
    for threads, met in ((8, "fast"), (9, "fewer heads of keys than half the threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        model(**inputs)
        assert all(met in _attention.counts_of(module) for _, module in _attention.attentions(model))


def test_small_attentions_are_torch_s(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.undo()
    model = peftkern.accelerate(model_of("Llama"))
    model(**batch())
    assert ran(model) == [(0, {_attention._TOO_SMALL: 1})] * 2


def test_the_measured_sizes_run_on_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small = {
        (dtype, group, queries): _attention._is_small(
            torch.empty(1, 4 * group, queries, 64, dtype=dtype), torch.empty(1, 4, 256, 64, dtype=dtype)
        )
        for dtype in (torch.float32, torch.bfloat16)
        for group, queries in ((1, 1), (3, 1), (8, 256))
    }
    assert [key for key, value in small.items() if value] == [(torch.float32, 1, 1), (torch.float32, 3, 1)]


def test_copied_and_pickled(seed: int) -> None:
    model, inputs = peftkern.accelerate(model_of("Llama")), batch()
    expected = results(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(results(other, inputs), expected, rtol=0, atol=0)
        assert ran(other) == [(2, {})] * 2
        path, module = next(iter(_attention.attentions(other)))
        assert module.config.config is not model.get_submodule(path).config.config


def test_checkpointing_and_compile(seed: int) -> None:
    model, inputs = peftkern.accelerate(model_of("Llama")), batch()
    expected = results(model, inputs)
    model.train()
    model.base_model.model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_near(results(model, inputs), expected)
    assert ran(model) == [(3, {})] * 2  # once more in backward
    model = peftkern.accelerate(model_of("Llama"))
    expected = results(model, inputs)
    torch._dynamo.reset()
    assert_near(results(torch.compile(model, backend="aot_eager", fullgraph=True), inputs), expected_of(expected))


def expected_of(expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of a compiled module's parameters."""
    return {name if name == "logits" else f"_orig_mod.{name}": value for name, value in expected.items()}


def test_models_with_our_own_adapters(seed: int) -> None:
    """Attention and loss; there is nothing of PEFT's to change."""
    model, inputs = make("Llama"), batch()
    peftkern.add_lora(model, rank=4)
    expected = results(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftkern.accelerate(model)
    assert_near(results(model, inputs), expected)
    assert ran(model) == [(1, {})] * 2
    assert {"prefix_attention", "cross_entropy", "lora_linear"} == {record.op for record in peftkern.explain(model)}
    torch.testing.assert_close(results(peftkern.restore(model), inputs), expected, rtol=0, atol=0)
