"""`adapters_for_batch`: each sample computes, generates and learns as its own adapter alone does."""

from typing import Any

import pytest
import torch
from tiny_models import base_for, llama, move
from torch import Tensor, nn

import peftkern
from peftkern import adapters_for_batch

KINDS = pytest.mark.parametrize("kind", ["lora", "qlora"])
NAMES = ("b", None, "a", "b")
IDS = torch.arange(24).view(4, 6)


def model_of(kind: str = "lora", dropout: float = 0.0) -> Any:
    """Two adapters of different ranks and targets; "a" is active."""
    model = base_for(kind)
    peftkern.add_lora(model, rank=3, alpha=30, target_modules=["q_proj", "down_proj"], adapter_name="b")
    peftkern.add_lora(model, rank=5, alpha=20, dropout=dropout, adapter_name="a")
    return move(model).eval()


def alone(model: Any, name: str | None, ids: Tensor = IDS) -> Tensor:
    peftkern.set_adapter(model, name)
    return model(input_ids=ids).logits


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peftkern.nn.LoRALinear)]


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_each_sample_is_its_own_adapter_s(kind: str, fused: bool, seed: int) -> None:
    model = model_of(kind)
    expected = [alone(model, name)[i] for i, name in enumerate(NAMES)]
    if fused:
        peftkern.fuse_blocks(model)
    peftkern.set_adapter(model, "a")
    before = model(input_ids=IDS).logits
    with adapters_for_batch(model, NAMES):
        y = model(input_ids=IDS).logits
        records = peftkern.explain(model)
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)
    assert {record.op for record in records if "q_proj" in record.name} == {"multi_lora_linear"}
    assert torch.equal(model(input_ids=IDS).logits, before)


@KINDS
def test_generation(kind: str, seed: int) -> None:
    model = model_of(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for i, name in enumerate(NAMES):
        peftkern.set_adapter(model, name)
        expected.append(model.generate(input_ids=IDS[i : i + 1], **options)[0])
    with adapters_for_batch(model, NAMES):
        assert torch.equal(model.generate(input_ids=IDS, **options), torch.stack(expected))
    beams = {**options, "num_beams": 2}
    peftkern.set_adapter(model, "b")
    one = model.generate(input_ids=IDS[:1], **beams)
    with adapters_for_batch(model, ["b", "b", "a", "a"]):
        assert torch.equal(model.generate(input_ids=IDS[[0, 2]], **beams)[:1], one)


def test_gradients_are_those_of_separate_batches(seed: int) -> None:
    """Of what requires grad: by default the active adapter's, of the samples that have it."""
    model = model_of()
    for name in ("a", "b"):
        peftkern.set_adapter(model, name)
        own = [i for i, each in enumerate(NAMES) if each == name]
        model.zero_grad()
        model(input_ids=IDS[own]).logits.square().sum().backward()
        expected = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with adapters_for_batch(model, NAMES):
            model(input_ids=IDS).logits.square().sum().backward()
        grads = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == expected.keys() and all(f".{name}." in path for path in grads)
        for path, value in expected.items():
            assert (grads[path] - value).norm() <= 1e-5 * value.norm(), path


def test_samples_of_no_adapter_run_the_base_bit_for_bit(seed: int) -> None:
    model = model_of()
    with peftkern.disable_adapters(model):
        base = model(input_ids=IDS).logits
        with adapters_for_batch(model, NAMES):
            assert torch.equal(model(input_ids=IDS).logits, base)
    with adapters_for_batch(model, [None] * 4):
        assert torch.equal(model(input_ids=IDS).logits, base)


def test_contexts_nest_and_end(seed: int) -> None:
    model = model_of()
    with pytest.raises(RuntimeError, match="stop"), adapters_for_batch(model, ["a"]):
        with adapters_for_batch(model, ["b", "a"]):
            assert {layer.batch for layer in layers_of(model)} == {("b", "a")}
        assert {layer.batch for layer in layers_of(model)} == {("a",)}
        raise RuntimeError("stop")
    assert {layer.batch for layer in layers_of(model)} == {None}


def test_dropout(seed: int) -> None:
    model = model_of(dropout=0.5).train()
    with adapters_for_batch(model, ["a", None]):
        first, second = (model(input_ids=IDS[:2]).logits for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    with (
        adapters_for_batch(model, ["a", "b"]),
        pytest.raises(ValueError, match=r"adapters of one dropout, got \[0\.0, 0\.5\]"),
    ):
        model(input_ids=IDS[:2])


def test_compiles_without_a_graph_break(seed: int) -> None:
    layer = layers_of(model_of())[0]
    x = torch.randn(2, 5, layer.in_features)
    with adapters_for_batch(layer, ["b", "a"]):
        expected = layer(x)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("a", TypeError, "names must be a sequence, one name per sample, got str"),
        (None, TypeError, "names must be a sequence, one name per sample, got NoneType"),
        (["a", "bb"], ValueError, r"no adapter 'bb' \(did you mean 'b'\?\); there is 'b', 'a'"),
    ],
)
def test_wrong_names(names: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"adapters_for_batch: {message}"), adapters_for_batch(model_of(), names):
        pass


def test_what_cannot_be_mixed() -> None:
    model = model_of()
    with adapters_for_batch(model, ["a"]), pytest.raises(ValueError, match=r"shape \[1, ..., in\].* got \[4, 6, 32\]"):
        model(input_ids=IDS)
    peftkern.merge(model)
    with pytest.raises(RuntimeError, match=r'"model\.layers\.0\.self_attn\.q_proj" is merged'):
        adapters_for_batch(model, ["a"]).__enter__()
    peftkern.unmerge(model)
    other = peftkern.tune(llama(), "dora", "d")
    for name in ("d", None):
        with pytest.raises(ValueError, match='q_proj" is a DoRALinear; only LoRA takes several'):
            adapters_for_batch(other, [name]).__enter__()
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        adapters_for_batch(3, ["a"]).__enter__()  # type: ignore[arg-type]
