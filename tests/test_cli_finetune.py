"""`peftkern finetune`: results, exact resumption, comparison with the peers, bad input."""

import errno
import hashlib
import json
import shutil
import signal

import pytest
import torch

import peftkern
from peftkern.cli import data, finetune, main, peers, report, training

pytest.importorskip("transformers")

SEED = 20
RESULTS = {"adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.json"}
TINY = ["--steps", "6", "--batch-size", "2", "--sequence-length", "16", "--rank", "4", "--learning-rate", "1e-2"]
PANGRAMS = ("the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "sphinx of quartz")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of 2 layers, width 64, with the embedded model's tokenizer (a token is a byte)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"model seed {SEED}")
    torch.manual_seed(SEED)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finetune.EMBEDDED_MODEL / name, folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{PANGRAMS[i % 3]} {i}\n" for i in range(60)))
    return file


@pytest.fixture
def command(model_folder, text_file, tmp_path):
    """The arguments of a run of 6 small steps, output in tmp_path / "out"."""
    return [
        "finetune",
        "--model",
        str(model_folder),
        "--data",
        str(text_file),
        "--output",
        str(tmp_path / "out"),
        *TINY,
    ]


def files(folder):
    return {file.name for file in folder.iterdir()}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def interrupt_at(monkeypatch, step, label="peftkern"):
    """Presses Ctrl-C while `label` shows `step`; the context undoes it."""
    update = report._Lines.update

    def press(lines, at, *figures):
        update(lines, at, *figures)
        if (lines.label, at) == (label, step):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report._Lines, "update", press)


def test_run_writes_its_results(command, tmp_path, text_file):
    assert main(command) == 0
    out = tmp_path / "out"
    assert files(out) == RESULTS
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = metrics(out)
    assert found["bits_per_byte_after"] < found["bits_per_byte_before"]
    # An untrained model of 256 tokens is near uniform, and a token is a byte.
    assert found["bits_per_byte_before"] == pytest.approx(8, rel=0.02)
    assert len(found["losses"]) == 6 and found["losses"][-1] < found["losses"][0]
    assert found["tokens_per_second"] > 0 and found["peak_memory_bytes"] > 2**20
    assert found["configuration"]["rank"] == 4 and found["configuration"]["method"] == "qlora"
    assert found["versions"]["torch"] == torch.__version__
    assert found["peer"] is None
    held_out = "".join(data.split([text_file.read_text()]).held_out).encode()
    assert text_file.read_bytes().endswith(held_out)
    assert found["held_out_bytes"] == len(held_out)
    assert found["held_out_sha256"] == hashlib.sha256(held_out).hexdigest()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_peft_loads_the_adapter(method, command, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    trained = []
    monkeypatch.setattr(finetune, "train", lambda model, *rest: trained.append(model) or training.train(model, *rest))
    assert main([*command, "--method", method, "--dtype", "fp32"]) == 0
    adapter = tmp_path / "out"
    folder = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "qlora":
        base = peftkern.quantize(base)
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        wanted = trained[0].eval()(input_ids=ids).logits
        without = base.eval()(input_ids=ids).logits
        got = peft.PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - without).abs().max() > 1e-2


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_resumed_run_equals_an_uninterrupted_one(dropout, command, tmp_path, monkeypatch, capsys):
    command = [*command, "--dropout", dropout]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "after step 4 of 6" in said and f"--dropout {dropout}" in said
    assert files(out) == {"checkpoint.pt"}
    torch.manual_seed(999)
    assert main(command) == 0
    assert "step 4/6" not in capsys.readouterr().out
    assert files(out) == RESULTS
    assert metrics(out)["losses"] == metrics(whole)["losses"]
    assert metrics(out)["bits_per_byte_after"] == metrics(whole)["bits_per_byte_after"]
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch, capsys):
    def press_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(report._Lines, "update", press_twice)
    assert main(command) == 130
    assert capsys.readouterr().err == "peftkern: interrupted\n"
    assert files(tmp_path / "out") == set()
    assert signal.getsignal(signal.SIGINT) is before


def test_unfinished_run_of_other_settings_is_kept(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main(command) == 130
    capsys.readouterr()
    saved = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert main([*command, "--rank", "5", "--seed", "7"]) == 2
    said = capsys.readouterr().err
    assert "seed 0 (now 7)" in said and "rank 4 (now 5)" in said and "--restart" in said
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == saved
    assert main([*command, "--rank", "5", "--restart"]) == 0
    assert metrics(tmp_path / "out")["configuration"]["rank"] == 5


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damaged_checkpoint(keep, command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main(command) == 130
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{checkpoint} is damaged" in said and said.count("\n") == 1


def test_compare_runs_the_peers_and_resumes_them(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    command = [*command, "--compare"]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, peers.NAMES["qlora"])
        assert main(command) == 130
    assert files(out) == {"checkpoint.pt", "checkpoint-peer.pt"}
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "peftkern: step" not in said and "tokens/s" in said and "HF PEFT + bitsandbytes" in said
    assert files(out) == RESULTS
    ours = metrics(out)
    peer = ours["peer"]
    assert len(ours["losses"]) == len(peer["losses"]) == 6
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-2)
    # The first step runs the same adapter (B = 0) on the same codes.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=1e-3)
    assert ours["bits_per_byte_after"] == pytest.approx(peer["bits_per_byte_after"], rel=1e-2)
    assert peer["name"] == "HF PEFT + bitsandbytes" and peer["tokens_per_second"] > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_peer_starts_from_the_same_model(method, model_folder, tmp_path):
    pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    base = finetune.loading.load_model(model_folder, torch.bfloat16)
    base = peftkern.quantize(base) if method == "qlora" else base
    peftkern.save_adapter(peftkern.add_lora(base, rank=4, alpha=8.0, dropout=0.25), tmp_path)
    peer = peers.load(method, model_folder, tmp_path, torch.bfloat16)
    trainable = {name.replace(".default", ""): p.detach() for name, p in peer.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert trainable.keys() == saved.keys() and len(saved) == 2 * 7 * 2
    assert all(torch.equal(trainable[name], saved[name]) for name in saved)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    layer = peer.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert layer.lora_dropout["default"].p == 0.25 and layer.scaling["default"] == 2.0
    if method == "qlora":
        assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
        state = layer.base_layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert layer.base_layer.compute_dtype == torch.bfloat16


def test_compare_without_the_peers(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert main([*command, "--compare"]) == 2
    assert "--compare needs bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main(command) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert files(tmp_path / "out") == RESULTS - {"loss.png"}


def test_without_transformers(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune.loading, "find_spec", lambda name: None)
    assert main(command) == 2
    assert "peftkern[hf]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_embedded_model_and_the_help_topics(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT_CHARACTERS", 4096)
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--steps", "2", "--batch-size", "4", "--sequence-length", "64"]) == 0
    found = metrics(tmp_path / "runs" / "finetune")
    assert found["configuration"]["data"] == "pydoc_data.topics"
    # The base model reads English at 2 bits per byte; a token it saw the wrong way would cost 8.
    assert 1.5 < found["bits_per_byte_before"] < 3


BAD_DATA = {
    "missing.txt": ("", "No such file"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\n", "is empty"),
    "binary.txt": (b"text\xff\xfe\x00", "is not UTF-8 text (byte 4)"),
    "zeros.txt": (b"a\0b", "binary"),
    "short.txt": (b"too little text " * 2, "too short"),
    "tiny.txt": (b"a", "too short"),
    "held_out.txt": (b"just enough " * 5, "held-out text has"),
    "table.csv": (b"a,b", ".txt or .jsonl"),
    "noext": (b"text", "no extension"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', 'line 2: wanted an object with a string "text"'),
    "list.jsonl": (b'["text"]', "line 1: wanted an object"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "line 1"),
    "nothing.jsonl": (b'{"text": ""}\n', "is empty"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_file(name, command, tmp_path, capsys):
    content, named = BAD_DATA[name]
    file = tmp_path / name
    if content or name == "empty.txt":
        file.write_bytes(content)
    assert main([*command, "--data", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("peftkern: error: --data") and named in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate(file):
    file.write_bytes(file.read_bytes()[:1000])


def drop_weight(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BAD_FOLDERS = {
    "missing": (lambda folder: shutil.rmtree(folder), "is not a folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "has no usable"),
    "not a causal LM": (lambda folder: edit_config(folder, model_type="clip"), "has no usable"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no usable causal LM"),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "has no usable causal LM"),
    "a weight lacks": (drop_weight, "model.layers.1.mlp.up_proj.weight"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "small vocabulary": (lambda folder: edit_config(folder, vocab_size=100), "usable causal LM"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_model_folder(name, command, model_folder, tmp_path, capsys):
    spoil, named = BAD_FOLDERS[name]
    folder = shutil.copytree(model_folder, tmp_path / "spoilt")
    spoil(folder)
    assert main([*command, "--model", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"peftkern: error: --model: {folder}") and named in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rank", "0"),
        ("--rank", "1.5"),
        ("--steps", "0"),
        ("--batch-size", "-1"),
        ("--sequence-length", "0"),
        ("--sequence-length", "65"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--alpha", "inf"),
        ("--dropout", "1"),
        ("--dtype", "int8"),
        ("--method", "nothing"),
        ("--seed", "-1"),
        ("--threads", "0"),
    ],
)
def test_bad_number(option, value, command, tmp_path, capsys):
    assert main([*command, "--batch-size", "1", option, value]) == 2
    said = capsys.readouterr().err
    assert option in said and value in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(command, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(command) == 1
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_disk_full_while_saving_results(command, tmp_path, monkeypatch, capsys):
    def half(model, folder, **_):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save", half)
        assert main(command) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert files(tmp_path / "out") == {"checkpoint.pt"}
    assert main(command) == 0
    assert "step 6/6" not in capsys.readouterr().out
    assert files(tmp_path / "out") == RESULTS


def test_a_loss_that_is_not_finite(command, tmp_path, capsys):
    assert main([*command, "--learning-rate", "1e38"]) == 1
    assert "lower --learning-rate" in capsys.readouterr().err
    assert files(tmp_path / "out") == set()
