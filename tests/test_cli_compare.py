"""`peftkern compare`, and `peftkern finetune` with every method."""

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny_folder import write_model, write_text

import peftkern
from peftkern.cli import compare, finetune, main, measured, tasks
from peftkern.cli.errors import Diverged, UsageError
from peftkern.methods import METHODS

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[str]:
    text = write_text(tmp_path / "text.txt")
    sizes = ["--steps", "6", "--batch-size", "2", "--sequence-length", "16", "--dtype", "fp32"]
    return ["--model", str(folder), "--data", str(text), "--output", str(tmp_path / "out"), *sizes]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_finetune_takes_every_method(method, arguments, folder, tmp_path, capsys):
    command = ["finetune", *arguments, "--method", method]
    assert main([*command, "--learning-rate", "1e-2"]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["configuration"]["method"] == method and found["losses"][-1] < found["losses"][0]
    base = finetune.loading.load_model(folder, torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        peftkern.load(peftkern.quantize(base) if method == "qlora" else base, tmp_path / "out")
        assert not torch.equal(base(input_ids=ids, use_cache=False).logits[:, -8:], expected)
    capsys.readouterr()
    if "rank" not in METHODS[method].options():
        assert main([*command, "--rank", "4"]) == 2
        assert f"--rank: {method} has none, got 4" in capsys.readouterr().err
    if method not in ("lora", "qlora"):
        assert main([*command, "--compare"]) == 2
        assert "--compare: the peers have lora and qlora" in capsys.readouterr().err


def task_of(arguments: list[str]) -> tasks.Task:
    return compare._task(parser().parse_args(["compare", *arguments]), Path())


def parser():
    from peftkern.cli import _build_parser

    return _build_parser()


class Silent:
    steps: tuple[int, ...] = ()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.steps += (step,)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_measured(method, arguments):
    task, shown = task_of(arguments), Silent()
    row = measured.measure(task, method, shown)
    assert shown.steps == tuple(range(1, 7)) and row.method == method
    assert row.base_unchanged and 0 < row.trainable_parameters <= row.parameters
    assert row.file_bytes > 0 and row.step_seconds > 0 and row.latency > 0
    assert row.peak_memory_bytes > 2**20 and row.old_quality is None
    assert (row.merged_latency is not None) == METHODS[method].mergeable
    # BitFit adds biases to linear layers that have none.
    assert row.changes_architecture == (method == "bitfit" or not METHODS[method].mergeable)
    assert row.quality < task.quality(task.load()) + 0.5


def test_each_method_in_its_own_process(arguments, tmp_path, capsys):
    assert main(["compare", *arguments, "--methods", "lora", "full", "--threads", "1"]) == 0
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {"compare.csv", "compare.md", "compare.png"}
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [row["method"] for row in rows] == ["lora", "full"]
    assert all(row["base_unchanged"] == "True" for row in rows)
    assert int(rows[0]["file_bytes"]) < int(rows[1]["file_bytes"])
    said = capsys.readouterr().out
    assert "1/2 lora: step 6/6" in said and "bits per byte" in said
    text = (out / "compare.md").read_text()
    assert text.count("\n| ") == 3 and "seed 0" in text and "bits per byte of the base" in text
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_that_fails_is_a_line(arguments, tmp_path, capsys, monkeypatch):
    def run(task, method, threads, display):
        if method == "lora":
            raise UsageError("no linear layer")
        return measured.measure(task, method, display)

    monkeypatch.setattr(measured, "run", run)
    assert main(["compare", *arguments, "--methods", "lora", "bitfit"]) == 0
    assert "lora: not measured: no linear layer" in (tmp_path / "out" / "compare.md").read_text()
    assert main(["compare", *arguments, "--methods", "lora"]) == 1
    assert "no method could be measured" in capsys.readouterr().err


def test_a_process_says_why_it_failed(arguments):
    task = task_of(arguments)
    with pytest.raises(UsageError, match="has no usable"):
        measured.run(tasks.Text(**{**vars(task), "folder": Path("nowhere")}), "lora", 1, Silent())


def test_digits_keep_the_old_task(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(tasks, "BASE_STEPS", 150)
    task = tasks.Digits(tmp_path, steps=60, seed=0)
    task.train_base(Silent())
    base = task.load()
    old = task.old_accuracy(task.old_task(base))
    # 10 classes: chance is 0.1. The shift is one that the base cannot read.
    assert old > 0.7 and task.quality(base) < 0.4
    row = measured.measure(task, "lora", Silent())
    assert row.base_unchanged and row.quality > task.quality(base) + 0.2
    assert row.old_quality < old


def test_options_and_accuracy_of_digits(tmp_path):
    pytest.importorskip("sklearn")
    task = tasks.Digits(tmp_path, steps=1, seed=0)
    assert task.options("ia3")["feedforward_modules"] == ["fc2"]
    assert tasks.accuracy(torch.eye(3), torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--methods", "nothing"], "nothing"),
        (["--steps", "0"], "--steps"),
        (["--task", "digits"], "--model: --task digits brings its own"),
        (["--sequence-length", "129"], "--sequence-length: the model has 128 positions"),
        (["--batch-size", "1000"], "too short"),
    ],
)
def test_bad_arguments(extra, message, arguments, tmp_path, capsys):
    assert main(["compare", *arguments, *extra]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert main(["compare", "--task", "digits", "--output", str(tmp_path / "out")]) == 2
    assert "needs scikit-learn: pip install 'peftkern[bench]'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(arguments, monkeypatch):
    monkeypatch.setattr(tasks.presets, "learning_rate", lambda method, embedded: 1e38)
    with pytest.raises(Diverged, match="the loss is"):
        measured.measure(task_of(arguments), "lora", Silent())
