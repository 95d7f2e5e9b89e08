"""Prefix tuning beside HF PEFT: the same logits and gradients from the same weights, its files, and where it fails."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_models import CAUSAL, CLASSIFIERS, IDS, MASK, causal, classifier, logits, peft_prefix

import peftkern

pytest.importorskip("peft")
pytest.importorskip("safetensors")

every = pytest.mark.parametrize("name", sorted(CAUSAL))
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
NEAR = {"atol": 2e-5, "rtol": 1e-4}


def pair(name: str, attention: str = "sdpa", **options: Any) -> tuple[Any, Any]:
    """Ours and PEFT's with the same prefix."""
    theirs = peft_prefix(causal(name, attention), **options)
    ours = peftkern.tune(causal(name, attention), "prefix_tuning", length=3)
    ours.prefix.set_prompt_embeddings("default", theirs.get_prompt_embedding_to_save("default"))
    return ours, theirs


@every
@attentions
def test_the_same_logits_and_gradients(name: str, attention: str, seed: int) -> None:
    ours, theirs = pair(name, attention)
    for mask in (torch.ones_like(IDS), MASK):
        torch.testing.assert_close(logits(ours, mask=mask), logits(theirs, mask=mask), **NEAR)
    for model in (ours, theirs):
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    encoder = ours.prefix.encoders["default"]
    keys, values = ([parameter.grad for parameter in part] for part in (encoder.keys, encoder.values))
    mine = torch.stack([torch.stack(pair) for pair in zip(keys, values)]).permute(3, 0, 1, 2, 4).flatten(1)
    torch.testing.assert_close(mine, theirs.prompt_encoder["default"].embedding.weight.grad, **NEAR)


@every
def test_the_same_generation(name: str, seed: int) -> None:
    ours, theirs = pair(name)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    results = [model.generate(input_ids=IDS, attention_mask=MASK, **options) for model in (ours, theirs)]
    assert torch.equal(*results)


@every
def test_peft_reads_ours(name: str, tmp_path: Path, seed: int) -> None:
    import peft

    ours = peftkern.tune(causal(name), "prefix_tuning", length=3, init="normal")
    peftkern.save(ours, tmp_path, base_model_name_or_path="some/model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(causal(name), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs, mask=torch.ones_like(IDS)), **NEAR)


def test_peft_reads_a_reparametrised_one(tmp_path: Path, seed: int) -> None:
    import peft

    ours = peftkern.tune(causal(), "prefix_tuning", length=3, init="normal", hidden=5)
    peftkern.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(causal(), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs, mask=torch.ones_like(IDS)), **NEAR)


@every
@pytest.mark.parametrize("projection", [False, True])
def test_we_read_peft_s(name: str, projection: bool, tmp_path: Path, seed: int) -> None:
    theirs = peft_prefix(causal(name), prefix_projection=projection)
    theirs.save_pretrained(tmp_path)
    ours = peftkern.load(causal(name), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs, mask=torch.ones_like(IDS)), **NEAR)
    assert ours.prefix.settings["default"].length == 3


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_classifiers(name: str, tmp_path: Path, seed: int) -> None:
    """P-tuning v2: an encoder or a decoder with a trained head; files both ways."""
    import peft

    theirs = peft_prefix(classifier(name), "SEQ_CLS")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    expected = logits(theirs, mask=MASK)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftkern.load(classifier(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, mask=MASK), expected, **NEAR)
    peftkern.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        again = peft.PeftModel.from_pretrained(classifier(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, mask=MASK), expected, **NEAR)


def test_gradient_checkpointing_fails_in_peft(seed: int) -> None:
    """On when PEFT wraps the model it raises. Switched on afterwards, the cache is dropped with the prefix in it: the
    mask no longer fits the keys. Ours is in no cache."""
    model = causal()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        peft_prefix(model)
    ours, theirs = pair("llama")
    plain = gradients(ours)
    for each in (ours, theirs.base_model):
        each.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    for key, grad in gradients(ours).items():
        torch.testing.assert_close(grad, plain[key])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers must be the model's 2, got 3"),
        ({"num_attention_heads": 4}, "num_attention_heads must be the model's 2, got 4"),
        ({"token_dim": 32}, "token_dim must be the model's 16, got 32"),
        ({"num_virtual_tokens": 4}, r"must be finite, floating point and \[4, 64\], got torch.float32 \[3, 64\]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens: Prefix: length must be an int, got None"),
        ({"num_virtual_tokens": 99}, r"must be finite, floating point and \[99, 64\]"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules must be 1, got 2"),
    ],
)
def test_bad_configs_change_nothing(change: dict[str, Any], message: str, tmp_path: Path, seed: int) -> None:
    peftkern.save(peftkern.tune(causal(), "prefix_tuning", length=3), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = causal()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        peftkern.load(model, tmp_path)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_bad_tensors_change_nothing(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    peftkern.save(peftkern.tune(causal(), "prefix_tuning", length=3), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    infinite = good["prompt_embeddings"].clone()
    infinite[0, 0] = torch.inf
    for tensors, message in (
        ({"other": torch.ones(1)}, 'has no "prompt_embeddings"'),
        ({**good, "other": torch.ones(1)}, 'must not have "other"'),
        ({"prompt_embeddings": infinite}, "must be finite"),
        ({"prompt_embeddings": good["prompt_embeddings"].int()}, "must be finite, floating point"),
    ):
        save_file(tensors, path)
        model = causal()
        with pytest.raises(ValueError, match=message):
            peftkern.load(model, tmp_path)
        assert not hasattr(model, "prefix") and model.config._attn_implementation == "sdpa"
