"""The benchmark of whole models runs end to end, goes on where it stopped, and its table divides the right way."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from benchmarks import backends, backends_table
from peftkern.integrations.peft import calls

TINY = "--hidden 128 --intermediate 192 --layers 1 --vocabulary 64 --tokens 6 --new-tokens 2 --threads 1 --budget 0"
ARGUMENTS = [*TINY.split(), "--layer", "128"]
ARGS = backends.parse(ARGUMENTS)
SIZES = backends.sizes_of(ARGS)


def test_the_default_model_has_about_100_million_parameters():
    assert 95e6 < backends.parameters(backends.sizes_of(backends.parse([]))) < 105e6
    assert backends.parameters(SIZES) == backends.base(SIZES, four_bit=False).num_parameters()


@pytest.mark.parametrize("name", backends.CASES)
def test_both_sides_compute_the_same(name):
    case = backends.CASES[name]
    models = {contender: backends.build(case, contender, SIZES) for contender in (backends.STOCK, backends.OURS)}
    ids = torch.arange(6)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        stock, ours = (model(input_ids=ids).logits.float() for model in models.values())
    # bf16 all the way, and bitsandbytes' eval forward alone is 2e-2 off. The adapters are new: dropout changes nothing.
    assert (ours - stock).norm() < 5e-2 * stock.norm()
    counts = calls(models[backends.OURS])
    assert counts and all(count.fast and not count.stock for count in counts.values()) and not calls(models["stock"])


@pytest.mark.parametrize("name", backends.CASES)
def test_a_case_is_timed(name, set_threads):
    set_threads(1)
    rows = list(backends.time_case(name, ARGS))
    assert [(row["contender"], row["tokens"], row["threads"]) for row in rows] == [("stock", 6, 1), ("peftkern", 6, 1)]
    for row in rows:
        assert 0 < row["p25_ms"] <= row["median_ms"] <= row["p75_ms"]
        assert row["rounds"] >= backends.LEAST_ROUNDS and 0 < sum(row["profile"].values()) <= 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEFTKERN_BNB", "0")
    file = tmp_path / "speed.json"
    monkeypatch.setattr(backends, "LAYER_TURNS", 1)
    cases = ["LoRA on bf16", backends.LAYER]
    arguments = [*ARGUMENTS, "--output", str(file), "--cases"]
    assert backends.main([*arguments, *cases]) == 0
    report = json.loads(file.read_text())
    assert report["command"].startswith("python -m benchmarks.backends --hidden 128") and str(file) not in str(report)
    assert {(row["case"], row["contender"]) for row in report["rows"]} == {
        (case, contender) for case in cases for contender in ("stock", "peftkern")
    }
    assert [(row["case"], row["contender"]) for row in report["memory"]] == [
        (cases[0], "stock"),
        (cases[0], "peftkern"),
    ]
    assert all(row["peak_bytes"] > row["rise_bytes"] for row in report["memory"])

    def run_child(kind, contender, names, threads, args):
        yield from backends.time_case(names[0], args) if kind == "time" else ()

    monkeypatch.setattr(backends, "run_child", run_child)
    assert backends.main([*arguments, "QLoRA", *cases]) == 0
    again = json.loads(file.read_text())
    assert again["rows"][: len(report["rows"])] == report["rows"] and len(again["rows"]) == len(report["rows"]) + 2
    assert again["command"].count("; ") == 1 and again["memory"] == report["memory"]

    with pytest.raises(SystemExit, match=r'has another model: .*"layers": 1.*"layers": 2.*give --restart'):
        backends.main([*arguments, "QLoRA", "--layers", "2"])
    assert json.loads(file.read_text()) == again


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cases", "dance"], "--cases"),
        (["--hidden", "100"], "--hidden must be a multiple of 64, got 100"),
        (["--new-tokens", "0"], "--new-tokens"),
        (["--tokens", "8", "-1"], "--tokens"),
        (["--budget", "nan"], "--budget"),
        (["--output", "nowhere/file.json"], "nowhere"),
    ],
)
def test_bad_arguments(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        backends.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and named in said


def row(contender, median, case="QLoRA", tokens=128, threads=1):
    place = {"case": case, "tokens": tokens, "threads": threads, "isa": "avx2", "contender": contender}
    shares = {"GeneratedBackwardFor_peftkern_lora_linear_default": 0.5, "aten::mm": 0.25}
    return place | {"median_ms": median, "p25_ms": median, "p75_ms": median, "rounds": 3, "profile": shares}


def report_of_one_case():
    rows = [row("stock", 3.0), row("peftkern", 2.0), row("stock", 3.0, tokens=512), row("peftkern", 2.0, tokens=512)]
    rows += [row("stock", 8.0, backends.LAYER, 64), row("peftkern", 2.0, backends.LAYER, 64)]
    sides = {"case": "QLoRA", "tokens": 512, "peak_bytes": 3e8}
    memory = [
        {**sides, "contender": "stock", "rise_bytes": 2e8},
        {**sides, "contender": "peftkern", "rise_bytes": 1e8},
    ]
    model = SIZES._asdict() | {"parameters": 1e8}
    machine = {"cpu": "a CPU", "versions": {"torch": "2", "peft": None}}
    return {"machine": machine, "command": "c", "model": model, "new_tokens": 2, "rows": rows, "memory": memory}


def test_table():
    text = backends_table.markdown(report_of_one_case())
    assert "| stock / peftkern | 128 tokens, 1 thread | 512 tokens, 1 thread |" in text
    assert "| QLoRA | 1.50 (1.6) | **1.50** (1.25) |" in text
    assert "for who only installs peftkern: **4.00** (3) on 1 thread." in text
    assert "| QLoRA | **100 / 200** | 300 / 300 |" in text
    assert "| QLoRA | 128 | 1 | 3 (3 - 3) | 2 (2 - 2) |" in text
    assert "| QLoRA | 128 | 1 | `lora_linear` forward 50%, `mm` 25% |" in text and text.count("forward 50%") == 1


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    backends_table.draw(report_of_one_case(), tmp_path / "speed.png")
    assert [path.name for path in tmp_path.iterdir()] == ["speed.png"]
    with pytest.raises(SystemExit, match="nothing was measured at one thread"):
        backends_table.draw({**report_of_one_case(), "rows": [row("stock", 3.0, threads=2)]}, tmp_path / "none.png")


def test_table_without_results(tmp_path):
    assert backends_table.of_file(tmp_path / "speed.json") == "Not measured yet: `python -m benchmarks.backends`."
