"""P-tuning v1 on transformers models: PEFT's logits and files, the encoder beside them, templates, learning."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_models import SAME, VOCABULARY, batch_of, build, generate
from torch import Tensor

import peftkern
from peftkern.nn import PromptEncoder

peft: Any = pytest.importorskip("peft")

ROWS = 4
PSEUDO = VOCABULARY + 5
ENCODER = "prompt_encoder.safetensors"


def tuned(model: Any, adapter_name: str = "default", **options: Any) -> Any:
    return peftkern.tune(model, "p_tuning", adapter_name, **{"num_virtual_tokens": ROWS, **options})


def prompts_of(model: Any) -> PromptEncoder:
    (module,) = (module for module in model.modules() if isinstance(module, PromptEncoder))
    return module


def by_peft(name: str, kind: str, task: str) -> Any:
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=ROWS,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=16,
    )
    return peft.get_peft_model(build(name), config).eval()


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_logits_gradients_and_generation_are_peft_s(name: str, task: str, kind: str, seed: int) -> None:
    theirs = by_peft(name, kind, task)
    model = tuned(build(name), encoder=kind, hidden_size=16)
    own, other = prompts_of(model).encoders["default"], theirs.prompt_encoder["default"]
    own.load_state_dict(other.state_dict())
    inputs = batch_of(padding="right")
    inputs["labels"] = torch.randint(3, VOCABULARY, (3, 7))
    ours, expected = model(**inputs), theirs(**inputs)
    torch.testing.assert_close(ours.logits, expected.logits, **SAME)
    torch.testing.assert_close(ours.loss, expected.loss, **SAME)
    for output in (ours, expected):
        output.logits.square().mean().backward()
    for key, parameter in own.named_parameters():
        grad = other.get_parameter(key).grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9)
    ids = batch_of()
    assert torch.equal(generate(model, **ids), generate(theirs, **ids))


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_files(kind: str, tmp_path: Path, seed: int) -> None:
    """PEFT reads the prompt; we read the encoder too, and train on as if nothing had happened."""
    model, inputs = tuned(build("llama"), encoder=kind, dropout=0.25).eval(), batch_of()
    peftkern.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, **SAME)

    other = peftkern.load(build("llama"), tmp_path, "again")
    assert prompts_of(other).settings["again"] == prompts_of(model).settings["default"]
    for each, name in ((model, "default"), (other, "again")):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
        assert prompts_of(each).active_adapter == name
    state, again = (prompts_of(m).encoders[n].state_dict() for m, n in ((model, "default"), (other, "again")))
    assert all(torch.equal(value, again[key]) for key, value in state.items())

    peftkern.load(model, tmp_path)
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, **SAME)


def test_peft_s_files_hold_no_encoder(tmp_path: Path, seed: int) -> None:
    theirs, inputs = by_peft("llama", "lstm", "CAUSAL_LM"), batch_of()
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftkern.load(build("llama"), tmp_path / "theirs")
    (trained,) = (key for key, parameter in model.named_parameters() if parameter.requires_grad)
    assert trained == "p_tuning.encoders.default.embedding.weight"
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, **SAME)

    ours = tmp_path / "ours"
    peftkern.save(tuned(build("llama")), ours)
    assert (ours / ENCODER).is_file()
    peftkern.save(model, ours)
    assert not (ours / ENCODER).is_file()
    again = peftkern.load(build("llama"), ours)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_template(tmp_path: Path, seed: int) -> None:
    """Pseudo tokens in the middle: the length stays, generation goes on, PEFT refuses the files."""
    base, model = build("llama"), tuned(build("llama"), pseudo_token_id=PSEUDO)
    ids = batch_of(9)["input_ids"]
    ids[0, [0, 1, 4, 5]] = ids[1, [2, 3, 7, 8]] = ids[2, [0, 3, 4, 6]] = PSEUDO
    embeds = base.get_input_embeddings()(ids.clamp(max=VOCABULARY - 1)).detach()
    embeds[ids == PSEUDO] = prompts_of(model).prompt("default").detach().repeat(3, 1)
    output = model(ids, labels=ids)
    expected = base(inputs_embeds=embeds, labels=ids.masked_fill(ids == PSEUDO, -100))
    torch.testing.assert_close(output.logits, expected.logits, **SAME)
    torch.testing.assert_close(output.loss, expected.loss, **SAME)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        tokens = generate(model, input_ids=ids, **options)
        assert torch.equal(tokens[:, 9:], generate(base, inputs_embeds=embeds, **options))

    peftkern.save(model, tmp_path)
    again = peftkern.load(build("llama"), tmp_path)
    torch.testing.assert_close(again(ids).logits, output.logits)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    with pytest.raises(ValueError, match=f"must have pseudo_token_id {PSEUDO} 4 times, sample 0 has it 0 times"):
        model(batch_of()["input_ids"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, seed: int) -> None:
    model, inputs = tuned(build("llama")).train(), batch_of()

    def gradients() -> list[Tensor]:
        parameters = prompts_of(model).adapter_parameters("default")
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    expected = gradients()
    assert len(expected) == len(prompts_of(model).adapter_parameters("default"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for grad, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_names_and_the_base(seed: int) -> None:
    base, model, inputs = build("llama"), tuned(tuned(build("llama"), "first"), "second", encoder="mlp"), batch_of()
    logits = {}
    for name in ("first", "second"):
        peftkern.set_adapter(model, name)
        logits[name] = model(**inputs).logits
    mixed = model(**inputs, prompt_ids=["second", "first", "second"]).logits
    expected = torch.stack((logits["second"][0], logits["first"][1], logits["second"][2]))
    torch.testing.assert_close(mixed, expected, **SAME)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, logits["second"])
    with peftkern.disable_adapters(model):
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    peftkern.delete_adapter(model, "second")
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    # What swaps every linear layer of a model must leave the encoder's.
    peftkern.tune(model, "lora", "low_rank")
    assert not any("p_tuning" in key for key, module in model.named_modules() if hasattr(module, "lora_A"))


def test_learning(seed: int) -> None:
    model = tuned(build("llama"), num_virtual_tokens=10).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = batch_of()["input_ids"]
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, labels=torch.full_like(ids, 7)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_virtual_tokens": 100}, ValueError, "must leave room for tokens in the model's 64 positions, got 100"),
        ({"encoder": "mpl"}, ValueError, "encoder must be one of lstm, mlp, none, got 'mpl'; did you mean 'mlp'"),
        ({"hidden_size": 1.5}, TypeError, "hidden_size must be an int, got 1.5"),
        ({"layers": 3}, TypeError, "p_tuning has no option 'layers' .*did you mean 'num_layers'"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], error: Any, message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        tuned(model, **options)
    assert not any("p_tuning" in key for key, _ in model.named_modules()) and not model._forward_pre_hooks


def test_bad_files_change_nothing(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    peftkern.save(tuned(build("llama")), tmp_path)
    encoder = load_file(tmp_path / ENCODER)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def refused(message: str) -> None:
        model = build("llama")
        with pytest.raises(ValueError, match=message):
            peftkern.load(model, tmp_path)
        assert not any("p_tuning" in key for key, _ in model.named_modules())

    save_file({**encoder, "embedding.weight": encoder["embedding.weight"] + 1}, tmp_path / ENCODER)
    refused("does not give the prompt of adapter_model.safetensors")
    save_file({key: value for key, value in encoder.items() if key != "mlp_head.0.bias"}, tmp_path / ENCODER)
    refused(r'"mlp_head.0.bias" must be \[32\], got None')
    for key, value, message in (
        ("encoder_reparameterization_type", "GRU", "encoder_reparameterization_type must be 'LSTM' or 'MLP'"),
        ("encoder_hidden_size", -1, "hidden_size must be positive, got -1"),
        ("num_virtual_tokens", "4", "num_virtual_tokens must be positive, got '4'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        refused(message)
