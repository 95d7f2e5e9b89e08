"""NF4Linear under stock Hugging Face libraries: PEFT trains on it, transformers reads and writes its checkpoints."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_layers import assert_entries, snapshot
from torch import Tensor, nn

import peftkern
from peftkern.integrations.bitsandbytes import bnb_state_dict
from peftkern.nn import NF4Linear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCABULARY = 64


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules="all-linear", r=4, **options)


def ia3(*targets: str) -> Any:
    return peft.IA3Config(target_modules=list(targets), feedforward_modules=[t for t in targets if t == "down_proj"])


CONFIGS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "ia3": ia3("k_proj", "v_proj", "down_proj"),
}
METHOD = pytest.mark.parametrize("method", CONFIGS)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Widths that are multiples of 64: bitsandbytes' CPU kernel decodes no others right."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def quantized(dtype: torch.dtype = torch.float32) -> nn.Module:
    return peftkern.quantize(llama(dtype))


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with dense layers of the same values."""
    model = copy.deepcopy(model)
    for path, layer in nf4_layers(model):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        model.set_submodule(path, dense)
    assert not list(nf4_layers(model))
    return model


def nf4_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    return ((path, module) for path, module in list(model.named_modules()) if isinstance(module, NF4Linear))


def nf4_bytes(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{name}": value for path, layer in nf4_layers(model) for name, value in snapshot(layer).items()}


def adapted(model: nn.Module, config: Any, std: float = 0.1) -> nn.Module:
    """PEFT's model, its trainable tensors moved by `std` so that every one has a gradient."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    return model


def adapted_pair(dtype: torch.dtype, config: Any) -> tuple[nn.Module, nn.Module]:
    """A quantised model and its dense copy with the same adapter; PEFT rounds new ones to a dense weight's dtype."""
    model = quantized(dtype)
    dense = adapted(dequantized(model), config)
    model = adapted(model, config)
    peft.set_peft_model_state_dict(dense, peft.get_peft_model_state_dict(model))
    return model, dense


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def mean_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    errors = [relative_error(gradients[name], value) for name, value in exact.items()]
    return sum(errors) / len(errors)


# PEFT


@METHOD
def test_gradients_are_those_of_the_dense_model(method, seed):
    model, dense = adapted_pair(torch.float32, CONFIGS[method])
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(model), loss_and_gradients(dense)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(gradients) == set(expected) == trainable and len(trainable) >= 6
    assert all(value.norm() > 0 for value in expected.values())
    assert relative_error(loss, expected_loss) < 1e-6
    assert max(relative_error(gradients[name], value) for name, value in expected.items()) < 1e-5


@METHOD
def test_bf16_gradients_are_as_near_to_fp32_as_the_dense_model_s(method, seed):
    model, dense = adapted_pair(torch.bfloat16, CONFIGS[method])
    exact = loss_and_gradients(copy.deepcopy(dense).float())[1]
    ours, theirs = (mean_error(loss_and_gradients(each)[1], exact) for each in (model, dense))
    assert ours < 1.5 * theirs


@METHOD
def test_a_new_adapter_changes_nothing(method, seed):
    model = quantized()
    before = model(tokens()).logits
    model = peft.get_peft_model(model, CONFIGS[method])
    torch.testing.assert_close(model(tokens()).logits, before)


@METHOD
def test_training_lowers_the_loss_and_leaves_the_bytes(method, seed):
    model = adapted(quantized(), CONFIGS[method])
    before = nf4_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss, _ = loss_and_gradients(model)
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0] - 0.001, losses
    assert len(before) == 2 * 7 * 6
    assert_entries(nf4_bytes(model), before)


@METHOD
def test_disabled_and_unloaded_adapters_leave_the_base(method, seed):
    base = quantized()
    before = base(tokens()).logits
    model = adapted(base, CONFIGS[method])
    assert not torch.allclose(model(tokens()).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, before)
    assert torch.equal(model.unload()(tokens()).logits, before)


@METHOD
def test_adapters_travel_by_file(method, seed, tmp_path: Path):
    base = quantized()
    fresh = copy.deepcopy(base)
    model = adapted(base, CONFIGS[method]).eval()
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    assert torch.equal(read(tokens()).logits, model(tokens()).logits)


def test_gradient_checkpointing(seed):
    model = adapted(quantized(), CONFIGS["lora"])
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    torch.testing.assert_close(loss_and_gradients(model), expected)


# PEFT merges by writing to the tensor called `weight`, which holds codes. `LoRALinear.merge` is the way to merge.

RAISES = [
    ("lora", lora(), False),
    ("lora, safe", lora(), True),
    ("dora", lora(use_dora=True), False),
    ("ia3", ia3("k_proj"), False),
    ("ia3, safe", ia3("k_proj"), True),
]
BREAKS = [
    ("dora, safe", lora(use_dora=True), True),
    ("ia3", ia3("down_proj"), False),
    ("ia3, safe", ia3("down_proj"), True),
]


@pytest.mark.parametrize("config, safe", [case[1:] for case in RAISES], ids=[case[0] for case in RAISES])
def test_merge_raises_and_leaves_the_bytes(config, safe, seed):
    model = adapted(quantized(), config)
    before, logits = nf4_bytes(model), model(tokens()).logits
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.merge_adapter(safe_merge=safe)
    assert_entries(nf4_bytes(model), before)
    assert torch.equal(model(tokens()).logits, logits)


@pytest.mark.parametrize("config, safe", [case[1:] for case in BREAKS], ids=[case[0] for case in BREAKS])
def test_a_weight_that_peft_wrote_over_is_never_multiplied(config, safe, seed):
    model = adapted(quantized(), config)
    # PEFT before 0.21 cannot add DoRA's change to codes to begin with.
    with pytest.raises(RuntimeError, match=r"nf4_linear: codes must be|must match the size of tensor"):
        model.merge_adapter(safe_merge=safe)
        model(tokens())


# Checkpoints of transformers and bitsandbytes


@pytest.fixture
def quantization() -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def from_pretrained(directory: Path, **options: Any) -> nn.Module:
    """In training mode: bitsandbytes' eval path rounds its scales to bf16."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options).train()


def test_transformers_and_bitsandbytes_checkpoints(quantization, seed, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    dense = llama()
    dense.save_pretrained(tmp_path / "dense")
    theirs = from_pretrained(tmp_path / "dense", quantization_config=quantization)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = quantized()
    assert ours.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors")) == ([], [])
    assert_entries(nf4_bytes(ours), nf4_bytes(peftkern.quantize(dense)))
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits)

    other = quantized()
    save_file(bnb_state_dict(other), tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    read = from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(read(tokens()).logits, other(tokens()).logits)
