"""Prefix tuning of transformers models: padding, generation, checkpointing, text, names; errors before any change."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_models import CAUSAL, IDS, MASK, build, causal, classifier, logits
from torch import Tensor

import peftkern
from peftkern.nn import Prefix

every = pytest.mark.parametrize("name", sorted(CAUSAL))
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def tuned(model: Any, name: str = "default", **options: Any) -> Any:
    return peftkern.tune(model, "prefix_tuning", name, **{"length": 3, "init": "normal", **options})


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


@every
@attentions
def test_a_text_s_keys_and_values_are_the_text(name: str, attention: str, seed: int) -> None:
    """A prefix that begins with them is the model that has read the text, in logits and in gradients of the input."""
    model = causal(name, attention)
    text = torch.tensor([3, 1, 4, 1, 5])
    both = torch.cat([text.expand(2, -1), IDS], dim=1)
    expected = logits(model, both)[:, 5:]
    peftkern.tune(model, "prefix_tuning", text_ids=text)
    assert model.prefix.settings["default"].length == 5
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert set(trained(model)) == {f"prefix.{key}" for key, _ in model.prefix.named_parameters()}
    assert all(grad.any() for grad in gradients(model).values())


@every
@attentions
def test_padding_changes_nothing(name: str, attention: str, seed: int) -> None:
    """A padded row is the row alone; positions are what generate would give."""
    model = tuned(causal(name, attention))
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    padded = logits(model, mask=MASK, position_ids=positions)
    assert torch.isfinite(padded).all()
    alone = logits(model, IDS[:1, 2:])
    torch.testing.assert_close(padded[:1, 2:], alone, atol=2e-5, rtol=1e-4)


@every
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_full_forward(name: str, cache: str, seed: int) -> None:
    """Token by token, greedily, in a left-padded batch; the prefix is in no cache."""
    model = tuned(causal(name))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(
        IDS,
        attention_mask=MASK,
        cache_implementation=None if cache == "dynamic" else "static",
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
        **options,
    )
    assert out.past_key_values.get_seq_length() == 7 + 4
    full = torch.cat([MASK, torch.ones(2, 5, dtype=torch.long)], dim=1)
    positions = (full.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, out.sequences, full, position_ids=positions)[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=2e-5, rtol=1e-4)


@every
@attentions
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(name: str, attention: str, use_reentrant: bool, seed: int) -> None:
    model = tuned(causal(name, attention), hidden=6).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[key], msg=key)
        assert grad.any()


@every
@attentions
def test_disabled_is_the_base_bit_for_bit(name: str, attention: str, seed: int) -> None:
    expected = logits(causal(name, attention), mask=MASK)
    model = tuned(causal(name, attention))
    adapted = logits(model, mask=MASK)
    assert not torch.allclose(adapted, expected)
    with peftkern.disable_adapters(model):
        assert torch.equal(logits(model, mask=MASK), expected)
    peftkern.delete_adapter(model, "default")
    assert torch.equal(logits(model, mask=MASK), expected)


def test_named_prefixes_of_any_length(seed: int) -> None:
    model = tuned(causal(), "one")
    one = logits(model)
    tuned(model, "two", length=6, hidden=4)
    two = logits(model)
    assert not torch.allclose(one, two)
    peftkern.set_adapter(model, "one")
    assert torch.equal(logits(model), one)
    peftkern.set_adapter(model, "two")
    assert torch.equal(logits(model), two)
    copied = copy.deepcopy(model)
    peftkern.delete_adapter(model, "two")
    peftkern.set_adapter(model, "one")
    assert torch.equal(logits(model), one) and torch.equal(logits(copied), two)


def test_an_untouched_model_of_the_same_config(seed: int) -> None:
    """transformers keeps the attention's name in the config, which models may share."""
    model = causal()
    other = type(model)(model.config).eval()
    expected = logits(other, mask=MASK)
    tuned(model)
    assert torch.equal(logits(other, mask=MASK), expected)


def test_attention_dropout_in_training(seed: int) -> None:
    """Drops weights of tokens and prefix alike: in the mean nothing changes."""
    model = tuned(causal(attention_dropout=0.3))
    expected = logits(model)
    model.train()
    rows = logits(model, IDS[:1].expand(2000, -1))
    assert rows[0].ne(rows[1]).any()
    torch.testing.assert_close(rows.mean(0), expected[0], atol=0.05, rtol=0)
    assert all(grad.any() for grad in gradients(model).values())


def test_a_sliding_window_always_sees_the_prefix(seed: int) -> None:
    """PEFT's slides out of sight, since it is in the cache."""
    model = tuned(causal("mistral", sliding_window=2))
    expected = logits(model)
    with torch.no_grad():
        model.prefix.encoders["default"].values[0].add_(1)
    assert (logits(model) - expected).abs().amax((0, 2)).min() > 1e-3


def test_half_precision_keeps_the_prefix_in_fp32(seed: int) -> None:
    model = tuned(causal().bfloat16())
    result = model(input_ids=IDS, labels=IDS, use_cache=False)
    result.loss.backward()
    assert result.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in trained(model).values()} == {torch.float32}
    model.half()
    assert model.prefix.encoders["default"].keys[0].dtype == torch.float16
    assert torch.isfinite(logits(model)).all()


def test_one_step_learns_and_leaves_the_base(seed: int) -> None:
    for options in ({}, {"init": "zero"}, {"hidden": 8, "init": "zero"}, {"dropout": 0.2}):
        model = tuned(causal(), **options).train()
        base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-3:]) < sum(losses[:3])
        assert all(torch.equal(model.get_parameter(name), before) for name, before in base.items())


def test_training_resumes_from_a_reparametrised_prefix(tmp_path: Path, seed: int) -> None:
    model = tuned(causal(), hidden=6)
    peftkern.save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "prefix_encoder.safetensors",
    }
    other = peftkern.load(causal(), tmp_path)
    assert torch.equal(logits(other), logits(model))
    for key, grad in gradients(model).items():
        assert torch.equal(gradients(other)[key], grad)
    (tmp_path / "prefix_encoder.safetensors").unlink()
    direct = peftkern.load(causal(), tmp_path)
    assert direct.prefix.settings["default"].hidden is None
    torch.testing.assert_close(logits(direct), logits(model))


def test_a_reparametrisation_that_is_not_the_file_s(tmp_path: Path, seed: int) -> None:
    model = tuned(tuned(causal(), "one", hidden=6), "two", hidden=6)
    for name in ("one", "two"):
        peftkern.save(model, tmp_path / name, name)
    encoder = "prefix_encoder.safetensors"
    (tmp_path / "one" / encoder).write_bytes((tmp_path / "two" / encoder).read_bytes())
    with pytest.raises(ValueError, match=f"{encoder} does not give the prefix"):
        peftkern.load(causal(), tmp_path / "one")


def test_beside_lora(seed: int) -> None:
    model = peftkern.tune(causal(), "lora", "lora")
    tuned(model, "prefix")
    assert set(trained(model)) == {f"prefix.{key}" for key, _ in model.prefix.named_parameters()}
    assert math.isfinite(logits(model).sum())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 64}, ValueError, "length must be below the model's 64 positions, got 64"),
        ({"length": 0}, ValueError, "length must be positive, got 0"),
        ({"init": "text"}, ValueError, "init must be 'normal' or 'zero'"),
        ({"text_ids": [1, 2], "length": 3}, ValueError, "length must be that of text_ids, 2, got 3"),
        ({"text_ids": [1, 2], "length": None, "hidden": 4}, ValueError, "hidden must be None with text_ids"),
        ({"text_ids": [1, 99], "length": None}, ValueError, "text_ids must be below the vocabulary's 32"),
        ({"text_ids": [], "length": None}, ValueError, "length must be positive, got 0"),
        ({"text_ids": [[1]], "length": None}, ValueError, r"text_ids must be token ids \[length\]"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], error: Any, message: str) -> None:
    model = causal()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=message):
        tuned(model, **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert model.config._attn_implementation == "sdpa" and all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(TypeError, match="prefix_tuning: model must be a transformers PreTrainedModel, got Linear"):
        tuned(torch.nn.Linear(2, 2))
    opt = build(
        (
            "OPTConfig",
            "OPTForCausalLM",
            {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8},
        )
    )
    with pytest.raises(ValueError, match=r"model_type must be one of llama, .*, got 'opt'"):
        tuned(opt)
    model = causal()
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="4 heads must be a multiple of its 3 key-value heads"):
        tuned(model)
    with pytest.raises(ValueError, match="text_ids needs a causal model, got model_type 'bert'"):
        tuned(classifier(), length=None, text_ids=[1, 2])
    with pytest.raises(ValueError, match="reorder_and_upcast_attn must be off"):
        tuned(causal("gpt2", "eager", reorder_and_upcast_attn=True))


def test_more_tokens_than_positions(seed: int) -> None:
    model = tuned(classifier(), length=60)
    assert torch.isfinite(logits(model, IDS[:, :4])).all()
    with pytest.raises(ValueError, match="the prefix of 60 and 7 tokens must not exceed the model's 64 positions"):
        logits(model)


def test_the_module_is_part_of_the_model(seed: int) -> None:
    model = tuned(causal())
    assert isinstance(model.prefix, Prefix) and "prefix.encoders.default.keys.0" in model.state_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = tuned(causal())
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
