"""Prompt tuning on transformers models: PEFT's logits, losses and generation; files both ways; names; learning."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_models import SAME, VOCABULARY, batch_of, build, generate
from torch import Tensor, nn

import peftkern
from peftkern.nn import PromptEmbedding

peft: Any = pytest.importorskip("peft")

ROWS = 5
TASKS = {
    "llama": "CAUSAL_LM",
    "gemma": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert-tokens": "TOKEN_CLS",
    "bert-samples": "SEQ_CLS",
    "bert-spans": "QUESTION_ANS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}


def tuned(model: Any, adapter_name: str = "default", **options: Any) -> Any:
    return peftkern.tune(model, "prompt_tuning", adapter_name, **{"num_virtual_tokens": ROWS, **options})


def prompts_of(model: Any) -> PromptEmbedding:
    (module,) = (module for module in model.modules() if isinstance(module, PromptEmbedding))
    return module


def by_peft(name: str, prompt: Tensor) -> Any:
    """PEFT's model with this prompt, on a base of its own."""
    config = peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=ROWS, num_transformer_submodules=1)
    model = peft.get_peft_model(build(name), config)
    model.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return model.eval()


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "bert-tokens", "bert-samples", "t5", "bart"])
def test_logits_and_gradients_are_peft_s(name: str, padding: str, seed: int) -> None:
    model = tuned(build(name))
    theirs = by_peft(name, prompts_of(model).prompt("default").detach())
    torch.manual_seed(seed)
    inputs = batch_of(padding=padding)
    if TASKS[name] in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs["labels"] = torch.randint(3, VOCABULARY, (3, 7))
    if name == "bert-samples":
        inputs["labels"] = torch.randint(3, (3,))
        inputs["token_type_ids"] = torch.randint(2, (3, 7))
    ours, expected = model(**inputs), theirs(**inputs)
    torch.testing.assert_close(ours.logits, expected.logits, **SAME)
    if "labels" in inputs:
        torch.testing.assert_close(ours.loss, expected.loss, **SAME)
    else:
        assert ours.logits.shape == (3, ROWS + 7, 3)
    for output in (ours, expected):
        output.logits.square().mean().backward()
    (ours_parameter,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    grad = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(ours_parameter.grad, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


def test_labels_of_tokens_are_extended(seed: int) -> None:
    """PEFT leaves them, and fails."""
    model, inputs = tuned(build("bert-tokens")), batch_of()
    labels = torch.randint(3, (3, 7))
    output = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, ROWS:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_spans_move_with_the_tokens(seed: int) -> None:
    model, inputs = tuned(build("bert-spans")), batch_of()
    start, end = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 6])
    output = model(**inputs, start_positions=start, end_positions=end)
    losses = [
        nn.functional.cross_entropy(logits, position + ROWS)
        for logits, position in ((output.start_logits, start), (output.end_logits, end))
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "t5", "bart"])
def test_generation_is_peft_s(name: str, options: dict[str, Any], seed: int) -> None:
    model = tuned(build(name), init="normal")
    theirs = by_peft(name, prompts_of(model).prompt("default").detach())
    inputs = batch_of()
    ours, expected = (generate(each, **inputs, **options) for each in (model, theirs))
    assert torch.equal(ours, expected)
    with peftkern.disable_adapters(model):
        assert not torch.equal(generate(model, **inputs, **options), ours)


@pytest.mark.parametrize(("name", "padding"), [("llama", "left"), ("gpt2", "left"), ("t5", "right")])
def test_padding_does_not_change_generation(name: str, padding: str, seed: int) -> None:
    """Padded samples give what each gives by itself; PEFT drops the position ids that left padding takes."""
    model = tuned(build(name), init="normal")
    inputs = batch_of(padding=padding)
    together = generate(model, **inputs)
    for sample in range(3):
        kept = inputs["attention_mask"][sample].bool()
        alone = generate(model, input_ids=inputs["input_ids"][sample][kept][None])
        assert torch.equal(together[sample, -6:], alone[0, -6:])


def test_steps_with_a_cache_are_the_whole(seed: int) -> None:
    """By hand, with nothing given that counts the prompt; and a second turn of generate on the first one's cache."""
    model, ids = tuned(build("llama"), init="normal"), batch_of()["input_ids"]
    for options in ({"prefill_chunk_size": 3}, {"assistant_model": build("llama")}):
        alone = ids[:1]
        assert torch.equal(generate(model, input_ids=alone, **options), generate(model, input_ids=alone))
    mask, positions = torch.ones_like(ids), torch.arange(7).expand(3, -1)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], use_cache=True)
    rest = model(
        input_ids=ids[:, 4:], attention_mask=mask, position_ids=positions[:, 4:], past_key_values=first.past_key_values
    )
    logits = torch.cat((first.logits, rest.logits), 1)
    torch.testing.assert_close(logits, whole.logits, **SAME)
    torch.testing.assert_close(model(ids).logits, whole.logits, **SAME)

    turn = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((turn.sequences, ids[:, :3]), 1)
    again = generate(model, input_ids=longer, past_key_values=turn.past_key_values)
    assert torch.equal(again, generate(model, input_ids=longer))


def test_without_the_prompt_the_base_is_untouched(seed: int) -> None:
    base, model, inputs = build("llama"), tuned(build("llama")), batch_of(padding="left")
    with torch.no_grad():
        expected = base(**inputs).logits
        assert model(**inputs).logits.shape[1] == ROWS + 7
        with peftkern.disable_adapters(model):
            assert torch.equal(model(**inputs, prompt_ids=["default"] * 3).logits, expected)
            assert torch.equal(generate(model, **inputs), generate(base, **inputs))
        peftkern.set_adapter(model, None)
        assert torch.equal(model(**inputs).logits, expected)
        peftkern.delete_adapter(model, "default")
        assert torch.equal(model(**inputs).logits, expected)
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_deleted_leaves_room(name: str, seed: int) -> None:
    """For the other method, with its prompts of samples."""
    inputs = batch_of()
    model = tuned(build(name))
    peftkern.delete_adapter(model, "default")
    for each in ("first", "second"):
        peftkern.tune(model, "p_tuning", each, num_virtual_tokens=ROWS)
    other = build(name)
    for each in ("first", "second"):
        peftkern.tune(other, "p_tuning", each, num_virtual_tokens=ROWS)
    other.p_tuning.load_state_dict(model.p_tuning.state_dict())
    ids = torch.tensor([1, 0, 1])
    assert torch.equal(generate(model, **inputs, prompt_ids=ids), generate(other, **inputs, prompt_ids=ids))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_each_sample_has_its_prompt(name: str, seed: int) -> None:
    model = tuned(tuned(build(name), "first", init="normal"), "second", init="normal")
    inputs = batch_of()
    calls = {"labels": torch.randint(3, VOCABULARY, (3, 4))} if name == "t5" else {}
    logits, tokens = {}, {}
    for prompt in ("first", "second"):
        peftkern.set_adapter(model, prompt)
        logits[prompt], tokens[prompt] = model(**inputs, **calls).logits, generate(model, **inputs, num_beams=2)
    chosen = ["second", "first", "second"]
    mixed = model(**inputs, **calls, prompt_ids=chosen).logits
    torch.testing.assert_close(mixed, torch.stack([logits[each][i] for i, each in enumerate(chosen)]), **SAME)
    generated = generate(model, **inputs, num_beams=2, prompt_ids=torch.tensor([1, 0, 1]))
    assert torch.equal(generated, torch.stack([tokens[each][i] for i, each in enumerate(chosen)]))


def test_calls_by_position_and_with_embeddings(seed: int) -> None:
    model, inputs = tuned(build("llama")), batch_of()
    ids = inputs["input_ids"]
    expected = model(**inputs).logits
    assert torch.equal(model(ids, inputs["attention_mask"]).logits, expected)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, seed: int) -> None:
    model, inputs = tuned(build("llama")).train(), batch_of()

    def gradient() -> Tensor:
        parameter = prompts_of(model).prompts["default"]
        parameter.grad = None
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert parameter.grad is not None
        return parameter.grad

    expected = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.testing.assert_close(gradient(), expected)
    model.enable_input_require_grads()
    torch.testing.assert_close(gradient(), expected)


def test_copies_have_prompts_of_their_own(seed: int) -> None:
    model, inputs = tuned(build("llama"), init="normal"), batch_of()
    expected, tokens = model(**inputs).logits, generate(model, **inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected) and torch.equal(generate(other, **inputs), tokens)
        prompts_of(other).prompts["default"].data.zero_()
        assert not torch.equal(other(**inputs).logits, expected)
        peftkern.set_adapter(other, None)
        assert torch.equal(model(**inputs).logits, expected)


def test_compile(seed: int) -> None:
    model, inputs = tuned(build("llama")), batch_of()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits, **SAME)


@pytest.mark.parametrize("name", ["llama", "bert-samples", "t5"])
@pytest.mark.parametrize("init", ["sampled_vocab", "normal"])
def test_peft_loads_ours(name: str, init: str, tmp_path: Path, seed: int) -> None:
    model = tuned(build(name), init=init)
    peftkern.save(model, tmp_path, base_model_name_or_path="somewhere")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert type(theirs).__name__ != "PeftModel"
    inputs = batch_of(padding="right")
    if name == "t5":
        inputs["labels"] = torch.randint(3, VOCABULARY, (3, 4))
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, **SAME)


@pytest.mark.parametrize("submodules", [1, None])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_we_load_peft_s(name: str, submodules: int | None, tmp_path: Path, seed: int) -> None:
    """By default PEFT has rows for T5's decoder as well, which nothing reads."""
    config = peft.PromptTuningConfig(
        task_type=TASKS[name], num_virtual_tokens=ROWS, num_transformer_submodules=submodules
    )
    theirs = peft.get_peft_model(build(name), config).eval()
    theirs.save_pretrained(tmp_path)
    model = peftkern.load(build(name), tmp_path, "loaded")
    (trained,) = (key for key, parameter in model.named_parameters() if parameter.requires_grad)
    assert trained == "prompt_tuning.prompts.loaded"
    inputs = batch_of()
    if name == "t5":
        inputs["labels"] = torch.randint(3, VOCABULARY, (3, 4))
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, **SAME)


def test_files_round_trip(tmp_path: Path, seed: int) -> None:
    model = tuned(tuned(build("llama"), "first"), "second", dtype=torch.float32)
    parameter = prompts_of(model).prompts["first"]
    before = parameter.detach().clone()
    peftkern.save(model, tmp_path, "first")
    parameter.data.zero_()
    peftkern.load(model, tmp_path, "first")
    assert prompts_of(model).prompts["first"] is parameter and torch.equal(parameter, before)
    assert prompts_of(model).active_adapter == "first"
    peftkern.load(model, tmp_path, "third")
    assert torch.equal(prompts_of(model).prompts["third"], before)
    tuned(model, "longer", num_virtual_tokens=ROWS + 1)
    with pytest.raises(ValueError, match=r"another adapter 'longer', of 6 virtual tokens; there are 5"):
        peftkern.load(model, tmp_path, "longer")


def test_learning(seed: int) -> None:
    """A random frozen model is led to one token by its prompt alone."""
    model = tuned(build("llama"), num_virtual_tokens=10).train()
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "prompt" not in key}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = batch_of()["input_ids"]
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, labels=torch.full_like(ids, 7)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    assert "prompt" in str(peftkern.report(model)).lower()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_virtual_tokens": 64}, ValueError, "must leave room for tokens in the model's 64 positions, got 64"),
        ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be positive"),
        ({"init": "unifrom"}, ValueError, "got 'unifrom'; did you mean 'uniform'"),
        ({"init": "text"}, ValueError, "token_ids are the tokens of init='text', and none were given"),
        ({"length": 3}, TypeError, "prompt_tuning has no option 'length'"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], error: Any, message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        tuned(model, **options)
    assert not any("prompt" in key for key, _ in model.named_modules()) and not model._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_models_and_calls(tmp_path: Path, seed: int) -> None:
    with pytest.raises(TypeError, match=r"model must have get_input_embeddings\(\).*Linear has not"):
        tuned(nn.Linear(3, 3))
    model = tuned(build("llama"))
    with pytest.raises(ValueError, match='has prompts of another method, "prompt_tuning"'):
        peftkern.tune(model, "p_tuning", "other")
    with pytest.raises(ValueError, match="prompt_tuning cannot be merged"):
        peftkern.merge(model)
    inputs = batch_of()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[batch, tokens\], got \[3, 1, 7, 7\]"):
        model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))
    with pytest.raises(ValueError, match="a cache of a fixed size, which makes others, is not supported"):
        generate(model, **inputs, cache_implementation="static")
    with pytest.raises(ValueError, match="input_ids must be from 0 to 59, got 60"):
        model(inputs["input_ids"] * 0 + 60)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[3, 7\], got \[3, 6\]"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, 1:])


def test_bad_files_change_nothing(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import save_file

    peftkern.save(tuned(build("llama")), tmp_path)
    path, prompt = tmp_path / "adapter_model.safetensors", torch.zeros(ROWS, 32)
    for tensors, message in (
        ({"prompt_embeddings": prompt[:3]}, r"must be finite .*\[5, 32\] .* got torch.float32 \[3, 32\]"),
        ({"prompt_embeddings": prompt * float("nan")}, "must be finite floating-point"),
        ({"other": prompt}, '"other" is not a prompt; trained heads are not supported'),
        ({}, 'has no "prompt_embeddings"'),
    ):
        save_file(tensors, path)
        model = build("llama")
        with pytest.raises(ValueError, match=message):
            peftkern.load(model, tmp_path)
        assert not any("prompt" in key for key, _ in model.named_modules())
