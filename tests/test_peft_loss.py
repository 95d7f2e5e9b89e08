"""`accelerate` and transformers' loss: what their ForCausalLMLoss computes, by cross_entropy."""

import copy
import pickle
from typing import Any

import pytest
import torch
from test_nn_blocks import batch, make
from torch import Tensor, nn

import peftkern
from peftkern.integrations import _loss

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loss, "_LEAST_LOGITS", 1)


def model_of(name: str = "Llama", dtype: torch.dtype = torch.float32) -> Any:
    targets = ["query"] if name == "Bert" else ["q_proj"]
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    return peft.get_peft_model(make(name).to(dtype), config)


def labelled() -> dict[str, Tensor]:
    inputs = batch()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [
        output.loss.detach(),
        output.logits.detach(),
        *(p.grad.clone() for p in model.parameters() if p.requires_grad),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "number of items": {"num_items_in_batch": 5},
    "tensor of items": {"num_items_in_batch": torch.tensor(5)},
    "shifted labels": {"shift_labels": torch.arange(18).view(2, 9)},
    "another ignored label": {"ignore_index": 7},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_loss_and_gradients(option: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    calls: list[Any] = []
    op = _loss.cross_entropy
    monkeypatch.setattr(_loss, "cross_entropy", lambda *args, **options: calls.append(args) or op(*args, **options))
    model, inputs = model_of(dtype=dtype), {**labelled(), **OPTIONS[option]}
    if "ignore_index" in inputs:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] < 0, inputs["ignore_index"])
    expected = loss_and_gradients(model, inputs)
    accelerated = loss_and_gradients(peftkern.accelerate(model), inputs)
    assert len(calls) == 1 and calls[0][0].dtype == dtype
    assert len(accelerated) > 2
    # bf16: of the layers below, whose ops round elsewhere; the loss itself is fp32 in both.
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(accelerated, expected, **tolerance)
    assert accelerated[0].dtype == torch.float32


def test_logits_that_are_a_part(seed: int) -> None:
    """The last tokens' of a padded vocabulary, whose rows torch's view does not join."""
    wide = torch.randn(2, 11, 64).bfloat16().requires_grad_()
    labels = torch.randint(0, 60, (2, 9))
    results = []
    for loss_of in (_loss.causal_lm_loss, _loss.ForCausalLMLoss):
        loss = loss_of(wide[:, 2:, :60], labels, 60)
        results.append([loss, *torch.autograd.grad(loss, wide)])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("least", [1, 1 << 30])
def test_an_unknown_backend(least: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(_loss, "_LEAST_LOGITS", least)
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpuu")
    with pytest.raises(ValueError, match=r"cross_entropy: backend must be one of .*, got 'cpuu'"):
        _loss.causal_lm_loss(torch.randn(2, 9, 60), torch.randint(0, 60, (2, 9)), 60)


def test_explained_and_restored(seed: int) -> None:
    model = peftkern.accelerate(model_of())
    records = [record for record in peftkern.explain(model) if record.op == "cross_entropy"]
    assert [(record.name, record.implementation) for record in records] == [("base_model.model", "cpu")]
    assert model.base_model.model.loss_function is _loss.causal_lm_loss
    peftkern.restore(model)
    assert "_loss_function" not in model.base_model.model.__dict__
    assert not [record for record in peftkern.explain(model) if record.op == "cross_entropy"]


def test_other_losses_stay(seed: int) -> None:
    """Masked language models', and one that was set."""
    assert not list(_loss.losses(peftkern.accelerate(model_of("Bert"))))
    model = model_of()

    def own(logits: Tensor, **_: Any) -> Tensor:
        return logits.sum()

    model.base_model.model.loss_function = own
    peftkern.restore(peftkern.accelerate(model))
    assert model.base_model.model.loss_function is own


def test_small_ones_and_float64_are_transformers_own(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(_loss, "cross_entropy", None)
    loss_and_gradients(peftkern.accelerate(model_of(dtype=torch.float64)), labelled())
    monkeypatch.setattr(_loss, "_LEAST_LOGITS", 2 * 9 * 60 + 1)
    loss_and_gradients(peftkern.accelerate(model_of()), labelled())


def test_copied_pickled_and_compiled(seed: int) -> None:
    model, inputs = peftkern.accelerate(model_of()), labelled()
    expected = loss_and_gradients(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(loss_and_gradients(other, inputs), expected, rtol=0, atol=0)
        assert len(list(_loss.losses(other))) == 1
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, inputs), expected, rtol=2e-5, atol=2e-6)
