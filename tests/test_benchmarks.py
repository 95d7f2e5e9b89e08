"""The benchmarks run end to end, compare like with like, and say in a line what they cannot use. No time is judged."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory, plot, run, shapes, table
from peftkern._native import caps
from peftkern.bench import cases, contenders, measure
from peftkern.cli import main

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
PEERS = {
    "nf4_quantize": ["bitsandbytes"],
    "nf4_dequantize": ["bitsandbytes"],
    "nf4_linear forward": ["torch dense bfloat16", "bitsandbytes eval"],
    "nf4_linear forward+backward": ["bitsandbytes train"],
    "nf4_linear forward fp32": ["torch dense float32"],
    "lora_linear nf4 forward": ["peftkern nf4_linear", "PEFT + bitsandbytes"],
    "lora_linear nf4 forward+backward": ["peftkern nf4_linear", "PEFT + bitsandbytes"],
    "lora_linear nf4 forward+backward dropout 0.1": ["peftkern nf4_linear", "PEFT + bitsandbytes"],
    "lora_linear dense forward+backward": ["PEFT"],
    "lora_linear dense forward+backward dropout 0.1": ["PEFT"],
    "multi_lora_linear nf4 forward": ["peftkern lora_linear", "PEFT + bitsandbytes"],
    "multi_lora_linear dense forward": ["peftkern lora_linear", "PEFT"],
    "lora_qkv nf4 forward+backward": ["peftkern lora_linear", "PEFT + bitsandbytes"],
    "lora_qkv dense forward+backward": ["peftkern lora_linear", "PEFT"],
    "lora_mlp nf4 forward+backward": ["peftkern lora_linear", "PEFT + bitsandbytes"],
    "lora_mlp dense forward+backward": ["peftkern lora_linear", "PEFT"],
    "dora_linear nf4 forward+backward": ["peftkern lora_linear", "PEFT + bitsandbytes"],
    "dora_linear dense forward+backward": ["peftkern lora_linear", "PEFT"],
    "dora_norm nf4": ["torch dense bfloat16"],
    "ia3_linear nf4 forward+backward": ["peftkern nf4_linear", "PEFT + bitsandbytes"],
    "prompt_embedding forward+backward": ["torch"],
    "bottleneck_adapter forward+backward": ["torch eager"],
    "prefix_attention forward": ["torch concatenated"],
    "prefix_attention forward+backward": ["torch concatenated"],
    "prefix_attention forward+backward fp32": ["torch concatenated"],
    "prefix_attention encoder forward": ["torch concatenated"],
    "prefix_attention encoder forward+backward": ["torch concatenated"],
    "cross_entropy forward+backward": ["torch fp32"],
}


@pytest.fixture
def one_copy(monkeypatch, set_threads):
    """Benchmarks of a single copy of each weight on one thread, so that they take no time."""
    set_threads(1)
    monkeypatch.setattr(cases, "contenders", partial(cases.contenders, rotated=0))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The file that `python -m benchmarks.run --quick` writes."""
    file = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--output", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return file


def one_line(capsys):
    """What was said on stderr, which must be one line."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("case", cases.CASES)
def test_bench_times_every_case_beside_its_peers(case, one_copy, capsys):
    assert main(["bench", "--case", case, "--shape", "64x64", "--rows", "1", "3", "--budget", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["case"], found["shape"], found["isa"]) == (case, [64, 64], caps.isa())
    assert found["median_ms"].keys() == {"1", "3"}
    for medians in found["median_ms"].values():
        assert list(medians) == ["peftkern", *PEERS[case]]
        assert all(ms > 0 for ms in medians.values())


def test_bench_in_words(one_copy, capsys):
    assert main(["bench", "--shape", "64x64", "--rows", "2", "--threads", "1", "--budget", "0"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("nf4_linear forward, 64 x 64, 1 threads")
    assert second.startswith("rows     2: peftkern ") and "bitsandbytes eval" in second


@pytest.mark.parametrize("case", cases.CASES)
def test_bench_of_a_shape_that_a_peer_cannot_run(case, one_copy, capsys):
    assert main(["bench", "--case", case, "--shape", "33x30", "--rows", "2", "--budget", "0", "--json"]) == 0
    medians = json.loads(capsys.readouterr().out)["median_ms"]["2"]
    assert list(medians) == ["peftkern", *(name for name in PEERS[case] if name != "bitsandbytes eval")]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--case", "dance"], "--case"),
        (["--shape", "64"], "'64'"),
        (["--shape", "0x64"], "'0x64'"),
        (["--rows", "0"], "--rows"),
        (["--rows", "few"], "--rows"),
        (["--threads", "0"], "--threads"),
        (["--budget", "long"], "--budget"),
    ],
)
def test_bench_with_bad_arguments(arguments, named, one_copy, capsys):
    assert main(["bench", "--shape", "64x64", *arguments]) == 2
    said = one_line(capsys)
    assert said.startswith("peftkern: error: ") and named in said


def test_quick_run_records_what_the_figures_depend_on(quick):
    report = json.loads(quick.read_text())
    assert report["machine"]["cpu"] and caps.isa() in report["machine"]["isas"]
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["machine"]["versions"]["bitsandbytes"] == bitsandbytes.__version__
    assert report["command"] == "python -m benchmarks.run --quick"
    assert report["commit"] == run.commit()
    assert report["peaks"]["1"]["read_bandwidth"] > 0
    places = {(row["case"], row["rows"]) for row in report["rows"]}
    assert places == {(case, rows) for case in cases.CASES for rows in ((0,) if case in cases.ROWLESS else (1, 16))}
    for row in report["rows"]:
        assert row["contender"] in ["peftkern", *PEERS[row["case"]]]
        assert (row["shape"], row["threads"], row["isa"], row["cached"]) == ([512, 512], 1, caps.isa(), True)
        assert 0 < row["p25_ms"] <= row["median_ms"] <= row["p75_ms"] and row["rounds"] >= 5
        assert row["floor_ms"] > 0 and row["limit"] in ("bandwidth", "arithmetic")


def test_table_and_picture_come_from_the_results(quick, tmp_path, capsys):
    assert table.main([str(quick)]) == 0
    text = capsys.readouterr().out
    for comparison in table.COMPARISONS:
        assert f"| {comparison.title} |" in text
    assert "**512 x 512, 1 thread, weights in cache**" in text and "| rows | 1 | 16 |" in text
    document = tmp_path / "document.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        assert table.main([str(quick), "--update", str(document)]) == 0
        assert document.read_text() == f"before\n{table.BEGIN}\n{text}{table.END}\nafter\n"
    picture = tmp_path / "picture.png"
    assert plot.main([str(quick), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"document.md", "picture.png"}


def row(contender, median, cached=False, threads=1, rows=16, case="nf4_linear forward+backward"):
    place = {"case": case, "shape": [128, 64], "rows": rows, "threads": threads, "isa": "avx2", "cached": cached}
    return place | {"contender": contender, "median_ms": median, "floor_ms": 0.5}


def report_of(*rows):
    machine = {"cpu": "a CPU", "versions": {"torch": "2", "peft": None}}
    return {"machine": machine, "command": "python -m benchmarks.run", "rows": list(rows)}


def test_table_divides_the_right_way_and_marks_what_is_met():
    lora = "lora_linear nf4 forward+backward"
    rows = [
        row("peftkern", 1.0),
        row("bitsandbytes train", 8.5),
        row("peftkern", 2.0, rows=64),
        row("bitsandbytes train", 3.0, rows=64),
        row("peftkern", 1.5, case=lora),
        row("peftkern nf4_linear", 1.0, case=lora),
        row("peftkern", 1.25, case=lora, rows=64),
        row("peftkern nf4_linear", 1.25, case=lora, rows=64),
        row("peftkern", 1.0, cached=True),
        row("bitsandbytes train", 9.0, cached=True),
        row("peftkern", 1.0, threads=2),
    ]
    text = table.markdown(report_of(*rows))
    assert "a CPU, avx2; torch 2. `python -m benchmarks.run`" in text
    assert "| `nf4_linear` training step / bitsandbytes | **8.50** (8) | 1.50 (3.5) |" in text
    assert "at most | 1.50 (1.25) | **1.00** (1.12) |" in text
    assert "| `lora_linear` on NF4, training step, ms | 1.5 | 1.25 |" in text
    assert "| `lora_linear` on NF4, training step, share of the machine's limit | 33% | 40% |" in text
    first, second, third = text.split("**128 x 64, ")[1:]
    assert (first[:10], second[:11], third[:27]) == ("1 thread**", "2 threads**", "1 thread, weights in cache*")
    assert "| `nf4_linear` training step / bitsandbytes | 9.00 |" in third
    assert text.index("<details>") < text.index("2 threads")


def test_memory_beside_the_results_is_shown(tmp_path):
    results = tmp_path / "speed.json"
    results.write_text(json.dumps(report_of(row("peftkern", 1.0))))
    without = table.of_files(results)
    where = {"shape": [128, 64], "threads": 2}
    measured = [
        {**where, "contender": "peftkern", "rows": 16, "extra_bytes": 1_240_000},
        {**where, "contender": "PEFT", "rows": 16, "extra_bytes": 42_000_000},
        {**where, "contender": "peftkern", "rows": 4, "extra_bytes": -60_000},
    ]
    (tmp_path / "memory.json").write_text(json.dumps(report_of(*measured)))
    text = table.of_files(results)
    assert text.startswith(without + "\n\n**Extra memory")
    for line in ("| rows | 4 | 16 |", "2 threads: peftkern | -0.1 | 1.2 |", "2 threads: PEFT |  | 42.0 |"):
        assert line in text


@pytest.mark.parametrize(
    ("content", "named"), [(None, "No such file"), ("{", "results.json"), ("{}", "must hold"), ("[]", "must hold")]
)
def test_results_that_cannot_be_read(content, named, tmp_path):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    for program in (table, plot):
        with pytest.raises(SystemExit, match=named) as stop:
            program.main([str(file)])
        assert "\n" not in str(stop.value)


def test_documents_and_pictures_that_cannot_be_made(tmp_path):
    results, document = tmp_path / "results.json", tmp_path / "document.md"
    results.write_text(json.dumps(report_of(row("peftkern", 1.0, case="nf4_quantize", rows=0))))
    document.write_text(f"{table.END}{table.BEGIN}")
    with pytest.raises(SystemExit, match="must have"):
        table.main([str(results), "--update", str(document)])
    assert document.read_text() == f"{table.END}{table.BEGIN}"
    with pytest.raises(SystemExit, match="was measured"):
        plot.main([str(results), str(tmp_path / "picture.png")])
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cases", "dance"], "--cases"),
        (["--shapes", "64"], "--shapes"),
        (["--shapes", "64x0"], "--shapes"),
        (["--rows", "1", "0"], "--rows"),
        (["--threads", "0"], "--threads"),
        (["--isa", "mmx"], "--isa"),
        (["--budget", "nan"], "--budget"),
        (["--output", "nowhere/file.json"], "nowhere"),
        (["--quick", "--loud"], "--loud"),
    ],
)
def test_run_with_bad_arguments(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    said = one_line(capsys)
    assert said.startswith("python -m benchmarks.run: error: ") and named in said


def test_run_at_an_unknown_level(monkeypatch, capsys):
    monkeypatch.setenv("PEFTKERN_ISA", "mmx")
    with pytest.raises(SystemExit):
        run.main(["--quick"])
    assert "PEFTKERN_ISA" in one_line(capsys)


def test_run_whose_process_fails_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "commit", lambda: None)
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-8))
    with pytest.raises(SystemExit, match="1 threads failed with status -8"):
        run.main(["--quick", "--output", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())


def test_shapes_have_names():
    assert run.shape_list("table") == [(4096, 4096), (14336, 4096)]
    assert run.shape_list("8x16,32x64") == [(8, 16), (32, 64)]
    assert all(out > 0 and columns > 0 for named in shapes.SHAPES.values() for out, columns in named)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_a_training_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "CONTENDERS", ("peftkern",))
    output = tmp_path / "memory.json"
    monkeypatch.chdir(ROOT)
    arguments = ["--shapes", "512x256", "--rows", "64", "--threads", "1", "--output", str(output)]
    assert memory.main(arguments) == 0
    (found,) = json.loads(output.read_text())["rows"]
    # y and dx in bf16; x A^T and the gradients of A and B in fp32.
    assert found["needed_bytes"] == 2 * 64 * (512 + 256) + 4 * 16 * (64 + 512 + 256)
    assert found["extra_bytes"] <= memory.LIMIT_PER_THREAD


def test_contenders_take_turns():
    calls = []
    turns = {name: partial(lambda name, i: calls.append((name, i)), name) for name in "abc"}
    timings = measure.interleaved(turns, budget_s=0, least_rounds=3)
    order = ["".join(name for name, i in calls if i == number) for number in range(5)]
    assert order == ["abc", "bca", "cab", "abc", "bca"]
    assert [timing.rounds for timing in timings.values()] == [3, 3, 3]


def test_summary_is_of_the_rounds():
    assert measure.summary([0.004, 0.001, 0.002, 0.003, 0.1]) == measure.Timing(3.0, 2.0, 4.0, 5)
    assert measure.summary([0.002]).median_ms == 2.0


def test_weights_rotate_through_the_memory_asked_for():
    seen = []
    turn = contenders.rotate(lambda: torch.nn.Linear(256, 256, bias=False), seen.append, rotated=2**20)
    for i in range(5):
        turn(i)
    assert len(set(map(id, seen))) == 4 and seen[4] is seen[0]
    assert measure.copies(2**20) == 128 and measure.copies(2**20, 0) == 1


def test_the_peers_compute_what_we_do(seed):
    """On the same bytes and factors; bf16 rounds to 2^-8, and so does bitsandbytes' dense weight."""
    x, grad = torch.randn(5, 64).bfloat16(), torch.randn(5, 96).bfloat16()
    torch.manual_seed(seed)
    ours = contenders.nf4_linear(96, 64)
    torch.manual_seed(seed)
    theirs = contenders.bnb_linear(96, 64).train()
    assert torch.equal(contenders.bnb_dequantize(theirs), ours.dequantize())
    torch.testing.assert_close(theirs(x), ours(x), rtol=2e-2, atol=2e-2 * ours(x).abs().max().item())

    ours, theirs = contenders.lora(ours, 0.0), contenders.peft_lora(theirs, 0.0)
    assert theirs.scaling["default"] == ours.scaling["default"] == 2.0
    factors = ours.factors("default")
    for factor, module in zip(factors, (theirs.lora_A, theirs.lora_B)):
        assert module["default"].weight.dtype == factor.dtype == torch.float32
        module["default"].weight.data.copy_(factor.data)
    gradients = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(grad)
        gradients.append((leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
    assert contenders.lora(contenders.nf4_linear(96, 64), 0.1).settings["default"].dropout == 0.1
    assert contenders.peft_lora(contenders.bnb_linear(96, 64), 0.1).lora_dropout["default"].p == 0.1


def test_a_step_leaves_no_gradient_behind():
    layer = contenders.lora(contenders.nf4_linear(96, 64), 0.0)
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    contenders.forward_backward(torch.randn(2, 64).bfloat16(), torch.randn(2, 96).bfloat16())(layer)
    assert inputs[0].requires_grad
    assert all(tensor.grad is None for tensor in (*inputs, *layer.parameters()))


def test_work_counts_the_weight_once_a_pass():
    weight = 128 * 64 * 4.127 / 8
    assert cases.work("nf4_linear forward", 128, 64, 16) == (weight + 16 * 192 * 2, 2 * 16 * 128 * 64)
    assert cases.work("nf4_linear forward+backward", 128, 64, 16) == (
        2 * (weight + 16 * 192 * 2),
        4 * 16 * 128 * 64,
    )
    moved, operations = cases.work("lora_linear dense forward+backward", 128, 64, 16)
    assert moved == 2 * (128 * 64 * 2 + 16 * 192 * 2) and operations == 4 * 16 * 128 * 64 + 6 * 16 * 16 * 192
    with pytest.raises(ValueError, match="case must be one of"):
        cases.contenders("dance", 64, 64, 1)


def test_peaks_need_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="set CXX"):
        run.peaks.measure(1)
