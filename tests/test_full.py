"""Full fine-tuning: the weights that stand in the model, ties, casts, and what its files hold."""

import copy

import pytest
import torch
from tiny_models import llama, logits, loss, move, trainable
from torch import nn

import peftkern
from peftkern.adapter_file import TENSORS_NAME
from peftkern.nn.full_weights import FullWeights

safetensors_torch = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.embed(ids)))


IDS = torch.arange(4)


def test_ties_stay_ties(tmp_path, seed):
    model = Tied()
    original, expected = model.embed.weight, model(IDS)
    peftkern.tune(model, "full")
    assert model.embed.weight is model.lm_head.weight is not original
    assert list(trainable(model)) == ["embed.weight", "norm.weight", "norm.bias"]
    move(model)
    peftkern.save(model, tmp_path)
    assert list(safetensors_torch.load_file(tmp_path / TENSORS_NAME)) == ["embed.weight", "norm.bias", "norm.weight"]
    with peftkern.disable_adapters(model):
        assert model.embed.weight is model.lm_head.weight is original and torch.equal(model(IDS), expected)


def test_the_model_looks_like_a_plain_one(seed):
    model = peftkern.tune(llama(), "full")
    assert model.state_dict().keys() == llama().state_dict().keys()
    moved = move(copy.deepcopy(model))
    plain = llama()
    plain.load_state_dict(moved.state_dict())
    assert torch.equal(logits(plain), logits(moved)) and torch.equal(logits(model), logits(llama()))
    report = peftkern.report(model)
    assert report.trainable_parameters == report.parameters == sum(p.numel() for p in model.parameters())
    # The originals are there once more.
    assert report.bytes >= 2 * 4 * report.parameters
    assert "full" in {row.method for row in report.rows}


def test_one_step_is_that_of_a_plain_model(seed):
    model, plain = peftkern.tune(llama(), "full"), llama()
    for each in (model, plain):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        loss(each).backward()
        optimizer.step()
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("disabled", [False, True])
def test_casting_reaches_the_weights_that_wait(disabled, seed):
    model = move(peftkern.tune(llama(), "full"))
    expected, base = logits(model), logits(llama())
    parameters = list(model.full_weights.weights("default").values())
    if disabled:
        peftkern.disable_adapters(model)
    model.to(torch.float64)
    for name, waiting in (("full", expected), ("base", base)):
        (peftkern.enable_adapters if name == "full" else peftkern.disable_adapters)(model)
        assert logits(model).dtype == torch.float64
        torch.testing.assert_close(logits(model).float(), waiting)
    # An optimizer goes on with the same Parameters.
    now = model.full_weights.weights("default").values()
    assert all(a is b for a, b in zip(parameters, now, strict=True))


@pytest.mark.parametrize(
    "targets, trained",
    [
        (["norm"], ["norm.weight", "norm.bias"]),
        (["norm.bias"], ["norm.bias"]),
        (r"norm\..*", ["norm.weight", "norm.bias"]),
        (["lm_head", "embed"], ["embed.weight"]),
    ],
)
def test_a_part_of_the_model(targets, trained, tmp_path, seed):
    model = Tied()
    if targets == ["lm_head", "embed"]:
        with pytest.raises(ValueError, match="'lm_head' matches no module with parameters"):
            peftkern.tune(model, "full", target_modules=targets)
        targets = ["embed"]
    base = copy.deepcopy(model)
    move(peftkern.tune(model, "full", target_modules=targets))
    assert list(trainable(model)) == trained
    peftkern.save(model, tmp_path)
    assert torch.equal(peftkern.load(base, tmp_path)(IDS), model(IDS))
    assert list(trainable(base)) == trained


def test_parts_are_switched_whole(seed):
    model = Tied()
    expected = model(IDS)
    move(peftkern.tune(model, "full", "norm", target_modules=["norm"]))
    norm = model(IDS)
    move(peftkern.tune(model, "full", "all"))
    everything = model(IDS)
    for name, result in (("norm", norm), (None, expected), ("all", everything), ("norm", norm)):
        peftkern.set_adapter(model, name)
        assert torch.equal(model(IDS), result)


def test_a_quantised_model_trains_what_is_left(seed):
    model = peftkern.tune(peftkern.quantize(llama()), "full")
    assert not any("proj" in name for name in trainable(model)) and "lm_head.weight" in trainable(model)


def test_a_sequential_model(seed):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    expected = model(x)
    peftkern.tune(model, "full")
    assert torch.equal(model(x), expected) and isinstance(model.full_weights, FullWeights)
    peftkern.delete_adapter(model, "default")
    assert torch.equal(model(x), expected) and len(model) == 2


def test_merging_for_good_frees_the_original(seed):
    model = move(peftkern.tune(llama(), "full"))
    expected = logits(model)
    with pytest.raises(ValueError, match="to must be 'dense'"):
        peftkern.merge(model, "nf4")
    with pytest.raises(RuntimeError, match="no merged adapter"):
        model.full_weights.unmerge()
    peftkern.merge(model, keep_base=False)
    assert (torch.equal(logits(model), expected) and not hasattr(model, "full_weights")) or not trainable(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm.bias": None}, 'the file has no "norm.bias"'),
        ({"more": torch.zeros(1)}, 'the model has no "more"'),
        ({"norm.bias": torch.zeros(7)}, r'"norm.bias" must be finite, floating point and \[8\], got .* \[7\]'),
        ({"norm.bias": torch.full((8,), float("nan"))}, "must be finite"),
        ({"norm.bias": torch.zeros(8, dtype=torch.int32)}, "got torch.int32"),
    ],
)
def test_bad_tensors(change, message, tmp_path, seed):
    peftkern.save(peftkern.tune(Tied(), "full"), tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / TENSORS_NAME) | change
    safetensors_torch.save_file({k: t.clone() for k, t in tensors.items() if t is not None}, tmp_path / TENSORS_NAME)
    model = Tied()
    with pytest.raises(ValueError, match=message):
        peftkern.load(model, tmp_path)
    assert not hasattr(model, "full_weights") and all(p.requires_grad for p in model.parameters())
