"""The quantizer `peftkern_nf4` of transformers: quantising while loading, saving, bitsandbytes' checkpoints, errors."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_layers import assert_entries, snapshot
from tiny_models import IDS, llama, logits
from torch import Tensor, nn

import peftkern
from peftkern.integrations.bitsandbytes import QUANT_STATE_KEY, bnb_state_dict
from peftkern.nn import NF4Linear

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

from peftkern.integrations.transformers import NF4Config, nf4_config  # noqa: E402

ROOT = Path(__file__).parents[1]
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])
Folder = Path
LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def dense(tmp_path: Path) -> Folder:
    return written(llama(), tmp_path / "dense")


def written(model: nn.Module, folder: Path, **options: Any) -> Folder:
    model.save_pretrained(folder, **options)
    return folder


def load(folder: Folder, kind: Any = None, **options: Any) -> nn.Module:
    return (kind or transformers.AutoModelForCausalLM).from_pretrained(folder, **options)


def tensors(folder: Folder) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def rewrite(folder: Folder, entries: Mapping[str, Tensor]) -> Folder:
    save_file(dict(entries), folder / "model.safetensors", {"format": "pt"})
    return folder


def config_of(folder: Folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def nf4_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, NF4Linear)]


# Quantising while loading


@DTYPE
@NESTED
@pytest.mark.parametrize("block_size", [32, 64])
def test_loading_is_quantising(dtype, double_quant, block_size, dense):
    # Not llama(dtype): it casts the rotary frequencies too.
    expected = peftkern.quantize(load(dense, dtype=dtype), block_size=block_size, double_quant=double_quant)
    loaded = load(dense, dtype=dtype, quantization_config=NF4Config(block_size=block_size, double_quant=double_quant))
    assert not loaded.training and nf4_paths(loaded) == nf4_paths(expected)
    assert_entries(snapshot(loaded), snapshot(expected))
    assert torch.equal(logits(loaded), logits(expected))
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_skipped_layers_stay_dense(dense):
    loaded = load(dense, quantization_config=NF4Config(skip=["down_proj", "layers.1"]))
    expected = peftkern.quantize(llama(), skip=["down_proj", "layers.1"])
    assert nf4_paths(loaded) == nf4_paths(expected) and len(nf4_paths(loaded)) == 6
    assert torch.equal(logits(loaded), logits(expected))


def test_layers_that_the_checkpoint_lacks_are_initialised(dense):
    rewrite(dense, {key: value for key, value in tensors(dense).items() if key != f"{LAYER}.weight"})
    layer = load(dense, quantization_config=NF4Config()).get_submodule(LAYER)
    assert isinstance(layer, NF4Linear)
    weight = layer.dequantize()
    assert 0.01 < weight.std() < 0.03  # transformers draws with 0.02


def test_biases_load_and_missing_ones_are_zero(tmp_path):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertModel(config).eval()
    nn.init.normal_(model.encoder.layer[0].output.dense.bias)
    folder = written(model, tmp_path / "bert")
    loaded = load(folder, transformers.AutoModel, quantization_config=NF4Config())
    assert len(nf4_paths(loaded)) == 7
    assert torch.equal(loaded.encoder.layer[0].output.dense.bias, model.encoder.layer[0].output.dense.bias)
    rewrite(folder, {key: value for key, value in tensors(folder).items() if not key.endswith("output.dense.bias")})
    again = load(folder, transformers.AutoModel, quantization_config=NF4Config())
    layer, before = (each.encoder.layer[0].output.dense for each in (again, loaded))
    assert torch.equal(layer.bias, torch.zeros(32)) and torch.equal(layer.weight, before.weight)


def test_gpt2_s_transposed_layers(tmp_path):
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    folder = written(model, tmp_path / "gpt2")
    loaded = load(folder, quantization_config=NF4Config())
    assert nf4_paths(loaded) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    for path in nf4_paths(loaded):
        expected = peftkern.nf4_quantize(model.get_submodule(path).weight.T.contiguous())
        assert torch.equal(loaded.get_submodule(path).weight, expected.codes)
    again = load(written(loaded, tmp_path / "again"))
    assert torch.equal(logits(again), logits(loaded))


# Saving


@DTYPE
@NESTED
@pytest.mark.parametrize("size", ["10KB", "1GB"], ids=["sharded", "whole"])
def test_saved_and_loaded_again(dtype, double_quant, size, dense, tmp_path):
    model = load(dense, dtype=dtype, quantization_config=NF4Config(double_quant=double_quant, block_size=128))
    folder = written(model, tmp_path / "saved", max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == "10KB")
    assert_entries(tensors(folder), bnb_state_dict(model))
    again = load(folder, dtype=dtype)
    assert_entries(snapshot(again), snapshot(model))
    assert torch.equal(logits(again), logits(model))
    twice = written(again, tmp_path / "twice")
    assert_entries(tensors(twice), tensors(folder))
    assert config_of(twice) == config_of(folder) and config_of(folder)["quant_method"] == "peftkern_nf4"
    assert torch.equal(logits(load(twice, quantization_config=NF4Config())), logits(model))


def test_config_survives_its_file(dense, tmp_path):
    config = NF4Config(32, False, torch.bfloat16, skip="down_proj")
    folder = written(load(dense, quantization_config=config), tmp_path / "saved")
    again = load(folder)
    assert vars(again.config.quantization_config) == vars(config)
    assert {module.compute_dtype for module in again.modules() if isinstance(module, NF4Linear)} == {torch.bfloat16}


def test_dense_weights_take_the_dtype_asked_for(dense, tmp_path):
    folder = written(load(dense, dtype=torch.bfloat16, quantization_config=NF4Config()), tmp_path / "saved")
    model = load(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    assert logits(model).dtype == torch.float32


def test_dequantize_gives_a_plain_model(dense, tmp_path):
    model = load(dense, quantization_config=NF4Config())
    before = logits(model)
    model.dequantize()
    assert not nf4_paths(model)
    torch.testing.assert_close(logits(model), before)
    plain = load(written(model, tmp_path / "plain"))
    assert type(plain.get_submodule(LAYER)) is nn.Linear and torch.equal(logits(plain), logits(model))


# bitsandbytes' checkpoints


@pytest.fixture
def bnb_options() -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": config, "device_map": "cpu"}


@DTYPE
@pytest.mark.parametrize("size", ["10KB", "1GB"], ids=["sharded", "whole"])
def test_bitsandbytes_checkpoint_and_back(dtype, size, bnb_options, dense, tmp_path):
    theirs = load(dense, dtype=dtype, **bnb_options)
    folder = written(theirs, tmp_path / "theirs", max_shard_size=size)
    ours = load(folder, config=nf4_config(folder), dtype=dtype)
    expected = peftkern.quantize(load(dense, dtype=dtype))
    assert_entries(snapshot(ours), snapshot(expected))
    for module in expected.modules():
        if isinstance(module, NF4Linear):
            module.compute_dtype = torch.float32  # bitsandbytes' default, which its config.json names
    assert torch.equal(logits(ours), logits(expected))

    back = written(ours, tmp_path / "back")
    assert_entries(tensors(back), tensors(folder))
    assert config_of(back).items() <= config_of(folder).items()
    again = load(back, device_map="cpu")
    assert type(again.get_submodule(LAYER)) is type(theirs.get_submodule(LAYER))
    assert_entries(snapshot(again), snapshot(theirs))


def test_ours_to_bitsandbytes(bnb_options, dense, tmp_path):
    config = NF4Config(block_size=32, double_quant=False, checkpoint="bitsandbytes")
    folder = written(load(dense, quantization_config=config), tmp_path / "ours")
    theirs = load(folder, device_map="cpu")
    state = theirs.get_submodule(LAYER).weight.quant_state
    assert (state.blocksize, state.nested) == (32, False)
    assert_entries(snapshot(theirs), tensors(folder))


def test_without_bitsandbytes(bnb_options, dense, tmp_path):
    folder = written(load(dense, **bnb_options), tmp_path / "theirs")
    program = f"""
import sys
sys.modules["bitsandbytes"] = None
import transformers
from peftkern.integrations.transformers import nf4_config
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, config=nf4_config({str(folder)!r}))
model.save_pretrained({str(tmp_path / "saved")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
    assert_entries(tensors(tmp_path / "saved"), tensors(folder))


def test_the_config_is_a_lazy_attribute():
    assert peftkern.NF4Config is NF4Config
    with pytest.raises(AttributeError, match="module 'peftkern' has no attribute 'NF5Config'"):
        _ = peftkern.NF5Config


# Training


def test_training_moves_the_bias_alone(dense):
    model = load(dense, quantization_config=NF4Config())
    before = snapshot(model.get_submodule(LAYER))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"{path}.weight" for path in nf4_paths(model)
    }
    assert_entries(snapshot(model.get_submodule(LAYER)), before)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "NF4Config: block_size must be one of .*, got 48"),
        ({"double_quant": 1}, TypeError, "NF4Config: double_quant must be a bool, got 1"),
        ({"compute_dtype": "int8"}, TypeError, "NF4Config: compute_dtype must be one of float32, .*, got 'int8'"),
        ({"skip": [""]}, TypeError, "NF4Config: skip must be names of modules, got"),
        ({"checkpoint": "gguf"}, ValueError, "NF4Config: checkpoint must be 'peftkern' or 'bitsandbytes', got 'gguf'"),
        ({"quant_method": "hqq"}, ValueError, "NF4Config: quant_method must be 'peftkern_nf4', got 'hqq'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        NF4Config(**options)


def test_a_skip_that_matches_nothing_is_named(dense):
    with pytest.raises(ValueError, match="NF4Config: skip='dwon_proj' matches no linear layer of LlamaForCausalLM"):
        load(dense, quantization_config=NF4Config(skip="dwon_proj"))


def test_offloading_to_disk_is_refused(dense):
    with pytest.raises(ValueError, match="NF4Config: 4-bit layers cannot be offloaded to disk"):
        load(dense, quantization_config=NF4Config(), device_map={"": "disk"})


def test_only_nf4_checkpoints_have_a_config(dense):
    with pytest.raises(ValueError, match=r"nf4_config: .* is not quantised"):
        nf4_config(dense)
    for found, quantization in (("'fp4'", {"load_in_4bit": True}), ("'hqq'", {"quant_method": "hqq"})):
        with pytest.raises(ValueError, match=f"the checkpoint must be bitsandbytes' NF4, got {found}"):
            NF4Config.from_bnb(quantization)


@pytest.fixture
def warnings_shown():
    """Whatever a test before this one has made of transformers' verbosity."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.mark.usefixtures("warnings_shown")
@pytest.mark.parametrize("entry", ["weight.absmax", "weight.quant_map", "weight.nested_absmax", QUANT_STATE_KEY])
def test_incomplete_layers_are_named(entry, dense, tmp_path, caplog):
    folder = written(load(dense, quantization_config=NF4Config()), tmp_path / "saved")
    rewrite(folder, {key: value for key, value in tensors(folder).items() if key != f"{LAYER}.{entry}"})
    with pytest.raises(RuntimeError):
        load(folder)
    assert f'"{LAYER}.{entry}" is missing' in caplog.text


@pytest.mark.usefixtures("warnings_shown")
def test_codes_without_anything_else_are_refused(dense, tmp_path, caplog):
    folder = written(load(dense, quantization_config=NF4Config()), tmp_path / "saved")
    rewrite(folder, {k: v for k, v in tensors(folder).items() if not k.startswith(f"{LAYER}.weight.")})
    with pytest.raises(RuntimeError):
        load(folder)
    assert f'"{LAYER}.{QUANT_STATE_KEY}" is missing' in caplog.text
