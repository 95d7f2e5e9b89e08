"""Houlsby adapters on disk: AdapterHub's files both ways, against what its library computed, and files that are wrong.

tests/golden/make_adapterhub.py makes what is in tests/golden/adapterhub.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import make_model, run, tokens
from torch import Tensor, nn

import peftkern
from peftkern.methods._adapterhub import BIN_NAME, SAFETENSORS_NAME, _bottleneck, _reduction
from peftkern.nn.adapter import AdaptedNorm, AdaptedSublayer

GOLDEN = Path(__file__).parent / "golden/adapterhub"
CASES = sorted(path.name for path in GOLDEN.iterdir())


def tensors_of(directory: Path) -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    if (directory / SAFETENSORS_NAME).is_file():
        return safetensors.load_file(directory / SAFETENSORS_NAME)
    return torch.load(directory / BIN_NAME, weights_only=True)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def golden_model(case: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(GOLDEN / case, attn_implementation="eager")
    model = transformers.AutoModel.from_config(config).eval()
    model.load_state_dict(peftkern.adapter_file.read_tensors(GOLDEN / case / "base.safetensors"))
    return model


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_adapterhub_s(case: str) -> None:
    expected = peftkern.adapter_file.read_tensors(GOLDEN / case / "expected.safetensors")
    model, ids = golden_model(case), expected["input_ids"]
    torch.testing.assert_close(run(model, ids), expected["without"])
    peftkern.load(model, GOLDEN / case, "mine")
    torch.testing.assert_close(run(model, ids), expected["with_adapter"])
    assert not torch.allclose(expected["without"], expected["with_adapter"], atol=0.1)


@pytest.mark.parametrize("case", CASES)
def test_files_are_adapterhub_s(case: str, tmp_path: Path) -> None:
    """What its library wrote, read and written again, has the same tensors under the same names and the same config."""
    model = peftkern.load(golden_model(case), GOLDEN / case, "task")
    peftkern.save(model, tmp_path, "task")
    theirs, ours = tensors_of(GOLDEN / case), tensors_of(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    wanted, got = config_of(GOLDEN / case), config_of(tmp_path)
    reductions = [config["config"].pop("reduction_factor") for config in (wanted, got)]
    assert len({int(16 // r) for r in reductions}) == 1
    assert got == {**wanted, "model_name": got["model_name"]}


@pytest.mark.parametrize(
    "options", [{}, {"train_norms": True}, {"parallel": True, "scaling": "learned", "leave_out": [0]}]
)
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "qwen2"])
def test_round_trip(kind: str, options: dict[str, Any], tmp_path: Path, seed: int) -> None:
    base = make_model(kind).state_dict()
    model, ids = make_model(kind), tokens()
    model.load_state_dict(base)
    peftkern.tune(model, "houlsby", "first", bottleneck=5, activation="silu", **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=0.2, std=0.4)
    expected = run(model, ids)
    peftkern.save(model, tmp_path, "first", "some/model")
    other = make_model(kind)
    other.load_state_dict(base)
    peftkern.load(other, tmp_path, "second")
    assert torch.equal(run(other, ids), expected)
    first, second = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other))
    assert {name.replace("first", "second") for name in first} == second
    assert config_of(tmp_path)["model_name"] == "some/model" and config_of(tmp_path)["name"] == "first"


def test_models_with_and_without_a_head(tmp_path: Path, seed: int) -> None:
    """Their paths differ by the base model's prefix."""
    transformers = pytest.importorskip("transformers")
    model, ids = make_model("bert"), tokens()
    with_head = transformers.BertForMaskedLM(model.config).eval()
    with_head.bert.load_state_dict(model.state_dict(), strict=False)
    for source, target in ((model, with_head), (with_head, model)):
        peftkern.tune(source, "houlsby", "a", bottleneck=4, train_norms=source is model)
        for parameter in source.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, mean=0.2, std=0.4)
        peftkern.save(source, tmp_path, "a")
        peftkern.load(target, tmp_path, "b")
        hidden = [getattr(m, "bert", m)(ids).last_hidden_state for m in (source, target)]
        torch.testing.assert_close(*hidden)
        for each in (source, target):
            peftkern.delete_adapter(each, "a" if each is source else "b")


@pytest.mark.parametrize("width", [16, 30, 768, 4096])
def test_reduction_gives_every_bottleneck(width: int) -> None:
    """Rounded down as AdapterHub does."""
    for size in range(1, 2 * width):
        assert _bottleneck(_reduction(width, size), 0, width) == size
    assert _bottleneck({"0": 2, "default": 4.0}, 0, 16) == 8 and _bottleneck({"0": 2, "default": 4.0}, 1, 16) == 4


def test_saving_removes_the_other_weights(tmp_path: Path, seed: int) -> None:
    """Else those would be read."""
    (tmp_path / SAFETENSORS_NAME).write_bytes(b"of another adapter")
    peftkern.save(peftkern.tune(make_model("llama"), "houlsby", bottleneck=4), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {BIN_NAME, "adapter_config.json"}


def test_what_has_no_room_in_the_files(tmp_path: Path, seed: int) -> None:
    model = peftkern.tune(make_model("llama"), "houlsby", bottleneck=4)
    sublayer = next(m for m in model.modules() if isinstance(m, AdaptedSublayer))
    sublayer.delete_adapter("default")
    with pytest.raises(ValueError, match="save: adapter 'default' must be the same in all layers that have it"):
        peftkern.save(model, tmp_path)
    with pytest.raises(ValueError, match="save: adapter 'default' is on meta or sharded"):
        peftkern.save(peftkern.tune(make_model("llama").to("meta"), "houlsby"), tmp_path)
    assert not list(tmp_path.iterdir())


def copy_of(case: str, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / case, tmp_path / case)
    return tmp_path / case


def with_option(directory: Path, option: str, value: Any) -> None:
    config = config_of(directory)
    (config["config"] if option in config["config"] else config)[option] = value
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("original_ln_before", True, "original_ln_before is not supported, got True"),
        ("ln_after", True, "ln_after is not supported"),
        ("use_gating", True, "use_gating is not supported"),
        ("inv_adapter", "nice", "inv_adapter is not supported, got 'nice'"),
        ("phm_layer", True, "phm_layer is not supported"),
        ("dropout", 0.1, "dropout is not supported, got 0.1"),
        ("non_linearity", "leakyrelu", "non_linearity must be one of relu, .*, got 'leakyrelu'"),
        ("scaling", "channel", "scaling must be a number or 'learned', got 'channel'"),
        ("is_parallel", "yes", "parallel must be a bool, got 'yes'"),
        ("reduction_factor", 0, "reduction_factor must be a positive number, got 0"),
        ("reduction_factor", {"0": 4}, "reduction_factor has neither layer 1 nor a default"),
        ("reduction_factor", 8, r"must have .*adapter_down.0.weight': \[2, 16\].*, got .*\[4, 16\]"),
        ("leave_out", [0, 1], "has adapters in none of the model's 2 layers"),
        ("leave_out", [1], r'"encoder.layer.1.attention.*.weight" has no place in BertModel'),
        ("name", "other", '"encoder.layer.0.attention.output.adapters.task.adapter_down.0.weight" has no place'),
        ("hidden_size", 768, "hidden_size must be the model's 16, got 768"),
        ("config", {"architecture": "lora"}, "no method reads"),
        ("config", None, "no method reads"),
    ],
)  # fmt: skip
def test_bad_configs_change_nothing(option: str, value: Any, message: str, tmp_path: Path) -> None:
    directory = copy_of("bert_double_seq", tmp_path)
    with_option(directory, option, value)
    refused(golden_model("bert_double_seq"), directory, message)


def refused(model: nn.Module, directory: Path, message: str, error: Any = ValueError) -> None:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error, match=f"^load: .*{message}"):
        peftkern.load(model, directory)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(isinstance(m, AdaptedSublayer | AdaptedNorm) for m in model.modules())


def test_bad_weights_change_nothing(tmp_path: Path) -> None:
    directory = copy_of("bert_double_seq", tmp_path)
    file, good = directory / BIN_NAME, tensors_of(directory)
    first = next(iter(good))
    for change, message in (
        ({first: None}, r"must have .*, got .*"),
        ({first: good[first] / 0}, "must be finite floating-point values"),
        ({first: good[first].int()}, "must be finite floating-point values, got torch.int32"),
        ({"encoder.layer.9.output.adapters.task.adapter_up.weight": good[first]}, "has no place in BertModel"),
        ({"encoder.layer.9.output.LayerNorm.weight": good[first]}, "BertModel has no such module"),
        ({"encoder.layer.1.output.dense.weight": good[first]}, "the model has none there"),
        ({"encoder.layer.1.output.LayerNorm.weight": torch.ones(16)}, r"LayerNorm.bias': \[16\]}, got .*"),
    ):
        torch.save({key: value for key, value in {**good, **change}.items() if value is not None}, file)
        refused(golden_model("bert_double_seq"), directory, message)
    torch.save([1, 2], file)
    refused(golden_model("bert_double_seq"), directory, "must hold a state dict, got list")
    file.write_bytes(file.read_bytes()[:100])
    refused(golden_model("bert_double_seq"), directory, "is corrupt")
    file.unlink()
    refused(
        golden_model("bert_double_seq"), directory, f"has no {BIN_NAME} and no {SAFETENSORS_NAME}", FileNotFoundError
    )
    (directory / SAFETENSORS_NAME).write_bytes(b"nothing")
    refused(golden_model("bert_double_seq"), directory, "is corrupt")


def test_files_of_another_model(tmp_path: Path) -> None:
    refused(golden_model("gpt2_output_only"), GOLDEN / "bert_double_seq", "has no place in GPT2Model")
    refused(golden_model("llama_parallel"), GOLDEN / "bert_double_seq", "has no place in LlamaModel")
    refused(make_model("t5", d_model=16), GOLDEN / "bert_double_seq", "no layer of T5Model is built like")


def test_activations_before_there_were_versions(tmp_path: Path) -> None:
    """There "gelu" meant the tanh approximation."""
    directory = copy_of("gpt2_output_only", tmp_path)
    config = config_of(directory)
    del config["version"]
    for theirs, ours in (("gelu", "gelu_tanh"), ("gelu_orig", "gelu"), ("relu", "relu")):
        config["config"]["non_linearity"] = theirs
        (directory / "adapter_config.json").write_text(json.dumps(config))
        model = peftkern.load(golden_model("gpt2_output_only"), directory)
        settings = {m.settings["default"].activation for m in model.modules() if isinstance(m, AdaptedSublayer)}
        assert settings == {ours}
