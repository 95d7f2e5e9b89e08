"""P-tuning v2: a classifier's prefix and its head, which is a copy for each adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_models import CLASSIFIERS, IDS, MASK, causal, classifier, logits

import peftkern
from peftkern.methods import METHODS
from peftkern.nn.head import TrainedHead

every = pytest.mark.parametrize("name", sorted(CLASSIFIERS))
LABELS = torch.tensor([0, 1])


def tuned(model: Any, name: str = "default", **options: Any) -> Any:
    return peftkern.tune(model, "p_tuning_v2", name, **{"length": 3, **options})


def head(model: Any) -> TrainedHead:
    return next(module for module in model.modules() if isinstance(module, TrainedHead))


@every
def test_prefix_and_head_train_and_nothing_else(name: str, seed: int) -> None:
    model = tuned(classifier(name)).train()
    base = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key.partition(".")[0] for key in trained} <= {"prefix", "classifier", "score"} and len(trained) > 4
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(key), before) for key, before in base.items())


@every
def test_every_adapter_has_its_head(name: str, tmp_path: Path, seed: int) -> None:
    expected = logits(classifier(name), mask=MASK)
    model = tuned(classifier(name), "one")
    with torch.no_grad():
        for parameter in head(model).adapter_parameters("one"):
            parameter.add_(1)
    one = logits(model, mask=MASK)
    tuned(model, "two")
    assert not torch.allclose(logits(model, mask=MASK), one)
    peftkern.set_adapter(model, "one")
    assert torch.equal(logits(model, mask=MASK), one)
    with peftkern.disable_adapters(model):
        assert torch.equal(logits(model, mask=MASK), expected)
    peftkern.save(model, tmp_path, "one")
    assert torch.equal(logits(peftkern.load(classifier(name), tmp_path, "mine"), mask=MASK), one)
    peftkern.delete_adapter(model, "one")
    peftkern.delete_adapter(model, "two")
    assert torch.equal(logits(model, mask=MASK), expected)
    assert not any(isinstance(module, TrainedHead) for module in model.modules())


def test_without_its_head(seed: int) -> None:
    model = tuned(classifier(), train_head=False)
    assert not any(isinstance(module, TrainedHead) for module in model.modules())
    assert list(METHODS["p_tuning_v2"].modules(model, "default")) == ["prefix"]
    assert METHODS["prefix_tuning"].modules(model, "default") == {}
    with pytest.raises(TypeError, match="train_head must be a bool, got 1"):
        tuned(classifier(), train_head=1)


def test_it_starts_from_random_keys_and_values(seed: int) -> None:
    embeddings = tuned(causal(), length=40).prefix.prompt_embeddings("default")
    assert (embeddings.std() - 1).abs() < 0.1


@every
def test_bad_heads_change_nothing(name: str, tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    peftkern.save(tuned(classifier(name)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    weight = next(key for key in good if key.endswith(".weight"))
    for tensors, message in (
        ({key: tensor for key, tensor in good.items() if key != weight}, f'has no "{weight}"'),
        ({**good, "base_model.other": torch.ones(1)}, 'must not have "base_model.other"'),
        ({**good, weight: torch.ones(3, 3)}, "must be finite, floating point and"),
    ):
        save_file(tensors, path)
        model = classifier(name)
        with pytest.raises(ValueError, match=message):
            peftkern.load(model, tmp_path)
        assert not hasattr(model, "prefix") and not any(isinstance(m, TrainedHead) for m in model.modules())


def test_a_head_with_adapters_of_another_method(seed: int) -> None:
    model = peftkern.tune(classifier(), "lora", "lora", target_modules=["classifier"])
    with pytest.raises(ValueError, match='"classifier" has adapters of another method, it is a LoRALinear'):
        tuned(model)
