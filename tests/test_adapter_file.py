"""save_adapter and load_adapter: HF PEFT's files in and out, and files that must be refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.adapter_file import CONFIG_NAME, TENSORS_NAME, matches, targets_for
from peftkern.model import lora_layers

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).view(2, 6)


def llama() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def fill(model: nn.Module, name: str = "default") -> nn.Module:
    for layer in lora_layers(model).values():
        if name in layer.settings:
            nn.init.normal_(layer.factors(name)[1], std=0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def peft_model(**config: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def peft_reads(directory: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # PEFT tells missing and unexpected keys by a warning.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(llama(), directory).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "alpha": 7.5, "use_rslora": True},
        {"target_modules": ["q_proj", "0.mlp.up_proj"], "dropout": 0.1},
        {"target_modules": ["lm_head"]},
    ],
)
def test_peft_reads_ours(options, tmp_path, seed):
    model = fill(peftkern.add_lora(llama(), **options))
    peftkern.save_adapter(model, tmp_path / "new" / "folder", base_model_name_or_path="some/model")
    theirs = peft_reads(tmp_path / "new" / "folder")
    torch.testing.assert_close(logits(theirs), logits(model))
    config = theirs.peft_config["default"]
    assert config.base_model_name_or_path == "some/model"
    assert config.lora_dropout == options.get("dropout", 0.0) and config.use_rslora == options.get("use_rslora", False)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {CONFIG_NAME, TENSORS_NAME}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_round_trip(quantized, tmp_path, seed):
    base = peftkern.quantize(llama()) if quantized else llama()
    model = fill(peftkern.add_lora(copy.deepcopy(base), rank=5, dropout=0.2))
    peftkern.save_adapter(model, tmp_path)
    other = peftkern.load_adapter(copy.deepcopy(base), tmp_path, "mine")
    assert torch.equal(logits(other), logits(model))
    settings = {path: layer.settings["mine"] for path, layer in lora_layers(other).items()}
    assert settings == {path: layer.settings["default"] for path, layer in lora_layers(model).items()}
    trained = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{factor}.mine.weight" for path in settings for factor in "AB"}


def test_ranks_and_alphas_may_differ_by_layer(tmp_path, seed):
    model = peftkern.add_lora(llama(), rank=2, target_modules=["q_proj", "o_proj"])
    # "layers.1.self_attn.q_proj" as a pattern's end must not reach another layer.
    layer = model.model.layers[1].self_attn.q_proj
    layer.delete_adapter("default")
    layer.add_adapter("default", rank=6, alpha=3)
    layer.set_adapter("default")
    peftkern.save_adapter(fill(model), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["r"] == 2 and list(config["rank_pattern"].values()) == [6]
    torch.testing.assert_close(logits(peft_reads(tmp_path)), logits(model))
    assert torch.equal(logits(peftkern.load_adapter(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": r".*\.(up|down)_proj", "lora_dropout": 0.1},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["k_proj", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"0\..*\.k_proj": 32}},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_we_read_peft_s(config, tmp_path, seed):
    theirs = peft_model(**config)
    theirs.save_pretrained(tmp_path)
    ours = peftkern.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    layers = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(lora_layers(ours)) == layers


def test_half_precision_adapters_become_fp32(tmp_path, seed):
    model = fill(peftkern.add_lora(llama(), dtype=torch.bfloat16))
    peftkern.save_adapter(model, tmp_path)
    assert {t.dtype for t in safetensors_torch.load_file(tmp_path / TENSORS_NAME).values()} == {torch.bfloat16}
    other = peftkern.load_adapter(llama(), tmp_path)
    for ours, read in zip(lora_layers(model).values(), lora_layers(other).values(), strict=True):
        for a, b in zip(ours.factors("default"), read.factors("default")):
            assert b.dtype == torch.float32 and torch.equal(a.float(), b)


def test_loading_onto_the_same_adapter_keeps_the_parameters(tmp_path, seed):
    model = fill(peftkern.add_lora(llama()))
    peftkern.save_adapter(model, tmp_path)
    expected = logits(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    peftkern.add_lora(fill(model), adapter_name="other")
    layer = model.model.layers[0].mlp.up_proj
    layer.set_adapter("default")
    layer.merge()
    peftkern.load_adapter(model, tmp_path)
    assert not layer.merged and torch.equal(logits(model), expected)
    assert all(own is p for own, p in zip((p for p in model.parameters() if p.requires_grad), parameters, strict=True))


def test_one_of_several_adapters(tmp_path, seed):
    model = fill(peftkern.add_lora(llama(), rank=2))
    peftkern.add_lora(model, rank=4, target_modules=["q_proj"], adapter_name="second")
    expected = logits(fill(model, "second"))
    peftkern.save_adapter(model, tmp_path, "second")
    torch.testing.assert_close(logits(peft_reads(tmp_path)), expected)
    for layer in lora_layers(model).values():
        layer.set_adapter("default" if "default" in layer.settings else None)
    peftkern.load_adapter(model, tmp_path, "third")
    assert torch.equal(logits(model), expected)


def test_compiled_models_have_the_same_paths(tmp_path, seed):
    model = fill(peftkern.add_lora(llama()))
    peftkern.save_adapter(torch.compile(model), tmp_path)
    compiled = torch.compile(llama())
    assert peftkern.load_adapter(compiled, tmp_path) is compiled
    assert torch.equal(logits(compiled._orig_mod), logits(model))


def test_target_modules_name_the_layers_exactly():
    modules = ["fc", "block", "block.fc", "block.up", "blockxfc"]
    for paths in (["block.fc", "block.up"], ["fc"], ["fc", "block.fc"], ["block.fc"]):
        targets = targets_for(paths, modules)
        assert {m for m in modules if matches(m, targets)} == set(paths)
    assert targets_for(["fc", "block.fc"], modules) == ["fc"]
    assert targets_for(["block.fc"], modules) == ["block.fc"]
    assert targets_for(["fc"], modules) == "fc"


def test_an_adapter_on_a_layer_whose_name_ends_another_s(tmp_path, seed):
    def model() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    ours = fill(peftkern.add_lora(model(), target_modules="0"))
    assert list(lora_layers(ours)) == ["0"]
    peftkern.save_adapter(ours, tmp_path)
    x = torch.randn(2, 4)
    other = peftkern.load_adapter(model(), tmp_path)
    assert list(lora_layers(other)) == ["0"] and torch.equal(other(x), ours(x))


# What must be refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peftkern.save_adapter(fill(peftkern.add_lora(llama(), target_modules=["q_proj", "up_proj"])), tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def assert_refused(model: nn.Module, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        peftkern.load_adapter(model, folder)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad, name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": "absent"}, "has no 'r'"),
        ({"r": 0}, "rank must be positive"),
        ({"r": "8"}, "rank must be an int"),
        ({"r": 4}, "must have rank 4, got lora_A"),
        ({"lora_alpha": None}, "alpha must be a number"),
        ({"lora_dropout": 2}, "dropout must be from 0 to 1"),
        ({"rank_pattern": {"up_proj": 3.5}}, "rank must be an int"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"(": 3}}, "adapter_config.json"),
        ({"target_modules": 3}, "target_modules must be a str or a list"),
        ({"target_modules": ["q_proj", "up_proj", "o_proj"]}, 'incomplete: .* "model.layers.0.self_attn.o_proj"'),
    ],
)
def test_bad_configs(changes, message, folder, seed):
    edit_config(folder, **changes)
    assert_refused(llama(), folder, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_corrupt_config(content, folder, seed):
    (folder / CONFIG_NAME).write_bytes(content)
    assert_refused(llama(), folder, CONFIG_NAME)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "key, value, message",
    [
        (KEY, None, '"model.layers.1.mlp.up_proj" has lora_B alone'),
        (KEY, torch.zeros(8, 31), r"must have shapes \[\[8, 32\], \[48, 8\]\], got \[\[8, 31\]"),
        (KEY, torch.zeros(7, 32), "must have rank 8, got lora_A"),
        (KEY, torch.full((8, 32), float("nan")), "finite floating-point matrix"),
        (KEY, torch.zeros(8, 32, dtype=torch.int8), r"finite floating-point matrix, got torch.int8 \[8, 32\]"),
        (KEY, torch.zeros(8 * 32), "finite floating-point matrix"),
        ("base_model.model.lm_head.weight", torch.zeros(3), '"base_model.model.lm_head.weight" is not'),
        (KEY.replace("lora_A", "lora_magnitude_vector"), torch.zeros(3), "lora_magnitude_vector.* is not"),
    ],
)
def test_bad_tensors(key, value, message, folder, seed):
    tensors = {name: tensor.clone() for name, tensor in safetensors_torch.load_file(folder / TENSORS_NAME).items()}
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    safetensors_torch.save_file(tensors, folder / TENSORS_NAME)
    assert_refused(llama(), folder, message)


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_truncated_tensors(size, folder, seed):
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(llama(), folder, f"{TENSORS_NAME} is corrupt")


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_missing_files(name, folder, seed):
    (folder / name).unlink()
    assert_refused(llama(), folder, f"has no {name}", FileNotFoundError)


def test_files_of_another_model(folder, seed):
    assert_refused(nn.Sequential(nn.Linear(4, 4)), folder, 'the model has no "model.layers.0')
    model = llama()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    assert_refused(model, folder, '"model.layers.0.self_attn.q_proj": .* got Identity', TypeError)
    assert_refused(peftkern.add_lora(llama(), rank=4), folder, "has another adapter 'default'")
    assert_refused(peftkern.add_lora(llama(), rank=8), folder, "has another adapter 'default'")
    with pytest.raises(ValueError, match="is on the meta device"):
        peftkern.load_adapter(llama().to("meta"), folder)
    with pytest.raises(ValueError, match="adapter_name"):
        peftkern.load_adapter(llama(), folder, "a.b")


def test_what_cannot_be_saved(tmp_path, seed):
    with pytest.raises(ValueError, match="no LoRALinear with an adapter 'default'"):
        peftkern.save_adapter(llama(), tmp_path / "out")
    model = peftkern.add_lora(llama())
    with pytest.raises(ValueError, match="no LoRALinear with an adapter 'other'"):
        peftkern.save_adapter(model, tmp_path / "out", "other")
    with pytest.raises(ValueError, match="on meta"):
        peftkern.save_adapter(copy.deepcopy(model).to("meta"), tmp_path / "out")
    layer = model.model.layers[0].mlp.up_proj
    layer.delete_adapter("default")
    layer.add_adapter("default", dropout=0.5)
    with pytest.raises(ValueError, match=r"dropout must be one value for all layers, got \[0.0, 0.5\]"):
        peftkern.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_full_disk_leaves_the_old_files(fails_at, folder, monkeypatch, seed):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = fill(peftkern.add_lora(llama()))
    write_bytes, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) > fails_at:
            write_bytes(path, content[:10])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        peftkern.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
