"""What docs/methods.md promises of every method, on a tiny Llama; methods in METHODS are picked up by themselves."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IDS, base_for, llama, logits, loss, move, trainable, tuned
from torch import Tensor

import peftkern
from peftkern._modules import adapter_modules
from peftkern.adapter_file import CONFIG_NAME, TENSORS_NAME
from peftkern.methods import METHODS

pytest.importorskip("safetensors")

# These start from prompts that are drawn; all others compute at first what the base does.
DRAWN_AT_FIRST = {"prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"}
# What PEFT has, and how one asks it for an adapter.
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"target_modules": "all-linear", "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
}
# AdapterHub's file, which PEFT has no method for.
WEIGHTS = {"houlsby": "pytorch_adapter.bin"}
every = pytest.mark.parametrize("name", sorted(METHODS))
peft_s = pytest.mark.parametrize("name", sorted(PEFT.keys() & METHODS.keys()))


@every
def test_tune_starts_from_the_base(name, seed):
    model = base_for(name)
    expected = logits(model)
    assert peftkern.tune(model, name) is model
    if name not in DRAWN_AT_FIRST:
        # Houlsby's adapters start near zero, not at it.
        torch.testing.assert_close(logits(model), expected, atol=1e-2, rtol=1e-2)
    assert not torch.equal(logits(move(model)), expected)


@every
def test_only_the_adapter_trains_and_all_of_it(name, seed):
    model = tuned(name)
    own = {id(p) for module in adapter_modules(model).values() for p in module.adapter_parameters("default")}
    assert own and {id(p) for p in trainable(model).values()} == own
    loss(model).backward()
    report = peftkern.report(model)
    assert report.no_gradient == [] and report.zero_gradient == []
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@every
def test_a_step_leaves_the_base_as_it_was(name, seed):
    model = base_for(name)
    expected = logits(model)
    base = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    peftkern.tune(model, name)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        step = loss(model)
        step.backward()
        optimizer.step()
        losses.append(step.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(parameter, before) for parameter, before in base)
    with peftkern.disable_adapters(model):
        assert torch.equal(logits(model), expected)


@every
def test_disabled_is_the_base_bit_for_bit(name, seed):
    expected = logits(base_for(name))
    model = tuned(name)
    adapted = logits(model)
    with peftkern.disable_adapters(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    peftkern.disable_adapters(model)
    assert torch.equal(logits(model), expected)
    peftkern.enable_adapters(model)
    assert torch.equal(logits(model), adapted)


@every
def test_adapters_are_switched_and_deleted(name, seed):
    expected = logits(base_for(name))
    model = tuned(name, "one")
    one = logits(model)
    parameters = set(map(id, trainable(model).values()))
    move(peftkern.tune(model, name, "two"))
    two = logits(model)
    assert not torch.equal(one, two) and not parameters & set(map(id, trainable(model).values()))
    peftkern.set_adapter(model, "one")
    assert torch.equal(logits(model), one) and parameters == set(map(id, trainable(model).values()))
    peftkern.set_adapter(model, None)
    assert torch.equal(logits(model), expected) and not trainable(model)
    peftkern.set_adapter(model, "two")
    peftkern.delete_adapter(model, "one")
    assert torch.equal(logits(model), two)
    with pytest.raises(ValueError, match="no adapter 'one'"):
        peftkern.set_adapter(model, "one")
    peftkern.delete_adapter(model, "two")
    assert torch.equal(logits(model), expected) and not trainable(model)
    move(peftkern.tune(model, name, "one"))
    assert not torch.equal(logits(model), expected)


@every
def test_saved_and_loaded_it_is_the_same(name, tmp_path, seed):
    model = tuned(name)
    expected = logits(model)
    peftkern.tune(model, name, "other")
    peftkern.save(model, tmp_path / "new" / "folder", base_model_name_or_path="some/model")
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} >= {CONFIG_NAME, weights_name(name)}
    other = peftkern.load(base_for(name), tmp_path / "new" / "folder", "mine")
    assert torch.equal(logits(other), expected)
    assert {n for module in adapter_modules(other).values() for n in module.settings} == {"mine"}
    own = {id(p) for module in adapter_modules(other).values() for p in module.adapter_parameters("mine")}
    assert {id(p) for p in trainable(other).values()} == own


def weights_name(name: str) -> str:
    return WEIGHTS.get(name, TENSORS_NAME)


def shorten(path: Path) -> None:
    """Takes the last column from every tensor of a file."""
    safetensors_torch = pytest.importorskip("safetensors.torch")
    pickled = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if pickled else safetensors_torch.load_file(path)
    shorter = {key: tensor[..., :-1].clone() for key, tensor in tensors.items()}
    if pickled:
        torch.save(shorter, path)
    else:
        safetensors_torch.save_file(shorter, path)


@every
@pytest.mark.parametrize("damage", ["config", "tensors", "missing", "shapes"])
def test_bad_files_change_nothing(name, damage, tmp_path, seed):
    peftkern.save(tuned(name), tmp_path)
    path = tmp_path / weights_name(name)
    if damage == "config":
        (tmp_path / CONFIG_NAME).write_bytes(b"{")
    elif damage == "tensors":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "missing":
        path.unlink()
    else:
        shorten(path)
    model = base_for(name)
    before, expected = copy.deepcopy(model), logits(model)
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError):
        peftkern.load(model, tmp_path)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    assert torch.equal(logits(model), expected)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]


def peft_logits(model: Any) -> Tensor:
    """Of the tokens; PEFT gives those of a prompt too."""
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


@peft_s
def test_peft_loads_ours(name, tmp_path, seed):
    peft = pytest.importorskip("peft")
    model = tuned(name)
    peftkern.save(model, tmp_path)
    with warnings.catch_warnings():
        # PEFT tells missing and unexpected keys by a warning.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(peft_logits(theirs), logits(model)[:, -IDS.shape[1] :], atol=1e-5, rtol=1e-4)


@peft_s
def test_we_load_peft_s(name, tmp_path, seed):
    peft = pytest.importorskip("peft")
    config, options = PEFT[name]
    theirs = move(peft.get_peft_model(llama(), getattr(peft, config)(task_type="CAUSAL_LM", **options)).eval())
    theirs.save_pretrained(tmp_path)
    ours = peftkern.load(llama(), tmp_path)
    torch.testing.assert_close(logits(ours)[:, -IDS.shape[1] :], peft_logits(theirs), atol=1e-5, rtol=1e-4)


@every
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant, seed):
    model = tuned(name).train()
    loss(model).backward()
    expected = {key: parameter.grad.clone() for key, parameter in trainable(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    loss(model).backward()
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


@every
def test_merging(name, seed):
    model = tuned(name)
    adapted = logits(model)
    if not METHODS[name].mergeable:
        with pytest.raises(ValueError, match=f"merge: {name} cannot be merged"):
            peftkern.merge(model)
        return
    expected = logits(base_for(name))
    assert peftkern.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="merged already"):
        peftkern.merge(model)
    with peftkern.disable_adapters(model):
        assert torch.equal(logits(model), expected)
    peftkern.unmerge(model)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError, match="nothing is merged"):
        peftkern.unmerge(model)
    peftkern.merge(model, keep_base=False)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    assert not trainable(model)


@every
def test_half_precision(name, seed):
    model = move(peftkern.tune(base_for(name, torch.bfloat16), name))
    result = model(input_ids=IDS, use_cache=False).logits
    assert result.dtype == torch.bfloat16
    result.float().square().mean().backward()
    for parameter in trainable(model).values():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all()


@every
def test_compiles_without_graph_breaks(name, seed):
    model = tuned(name)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)


@every
def test_an_empty_batch(name, seed):
    # Not the whole model: transformers' attention cannot reshape an empty batch.
    model = tuned(name)
    x = torch.zeros(0, 6, 32, requires_grad=True)
    result = model.model.layers[0].mlp(x)
    result.sum().backward()
    assert result.shape == x.grad.shape == (0, 6, 32)
    own = (p for path, p in trainable(model).items() if ".layers.0.mlp." in path)
    assert not any(parameter.grad.any() for parameter in own)


@every
def test_copies_are_independent(name, seed):
    model = tuned(name)
    expected = logits(model)
    other = move(copy.deepcopy(model))
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    with peftkern.disable_adapters(other):
        assert torch.equal(logits(model), expected)


@every
def test_the_report_lists_it(name, seed):
    model = tuned(name)
    modules = METHODS[name].modules(model, "default")
    assert modules
    records = {record.name: record for record in peftkern.explain(model)}
    assert modules.keys() <= records.keys()
    assert str(peftkern.report(model))


def test_every_method_is_in_the_documents():
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in table] == []


@every
def test_options_have_defaults_and_are_checked(name):
    model = base_for(name)
    before = [(n, type(m)) for n, m in model.named_modules()]
    assert inspect.Parameter.empty not in METHODS[name].options().values()
    with pytest.raises(TypeError, match=f"tune: {name} has no option 'no_such_option'"):
        peftkern.tune(model, name, no_such_option=1)
    assert [(n, type(m)) for n, m in model.named_modules()] == before
