"""What measures on a GPU, run without one: the programs on the CPU, the driver on commands of its own, the page."""

import json
import sys
from itertools import product

import pytest
import torch

from benchmarks import gpu_check, gpu_errors, gpu_status, gpu_timing
from benchmarks.run import ROOT
from benchmarks.table import shown


def test_timing_gives_every_contender_under_every_backend(tmp_path):
    output = tmp_path / "timing.json"
    arguments = ["--device", "cpu", "--shapes", "64x128", "--rows", "4", "--calls", "1", "--rounds", "2"]
    cases = ["--cases", "lora_linear nf4 forward+backward", "nf4_dequantize", "nf4_linear forward"]
    assert gpu_timing.main([*arguments, *cases, "--backends", "cpu", "reference", "cuda", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    timed = {(row["case"], row["contender"], row["backend"]) for row in report["rows"]}
    assert ("nf4_dequantize", "peftkern", "cpu") in timed
    assert ("lora_linear nf4 forward+backward", "peftkern", "reference") in timed
    assert ("lora_linear nf4 forward+backward", "PEFT + bitsandbytes", None) in timed
    assert ("nf4_linear forward", gpu_timing.DEQUANTIZED, "cpu") in timed
    assert ("nf4_linear forward", "torch dense bfloat16", None) in timed
    assert not any(backend == "cuda" for _, _, backend in timed)
    assert all(row["median_ms"] > 0 and row["floor_ms"] > 0 for row in report["rows"])


def test_every_op_is_compared_with_float64(tmp_path):
    output = tmp_path / "errors.json"
    arguments = ["--device", "cpu", "--sizes", "5,33,64", "--output", str(output)]
    assert gpu_errors.main([*arguments, "--backends", "cpu", "reference"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["op"] for row in rows} == set(gpu_status.STEMS)
    assert all(row["right"] and row["repeats"] for row in rows)


def test_a_wrong_gradient_fails(monkeypatch, tmp_path):
    right = gpu_errors.run

    def wrong(case, leaves, weight, backend):
        found = right(case, leaves, weight, backend)
        if backend == "cpu" and case.op == "ia3_linear":
            found["grad scale"] = found["grad scale"] * 1.1
        return found

    monkeypatch.setattr(gpu_errors, "run", wrong)
    output = tmp_path / "errors.json"
    arguments = ["--device", "cpu", "--sizes", "5,33,64", "--ops", "ia3_linear", "--backends", "cpu"]
    assert gpu_errors.main([*arguments, "--output", str(output)]) == 1
    assert {row["worst"] for row in json.loads(output.read_text())["rows"]} == {"grad scale"}


def test_one_wrong_element_fails(monkeypatch, tmp_path):
    right = gpu_errors.run

    def wrong(case, leaves, weight, backend):
        found = right(case, leaves, weight, backend)
        if backend == "cpu" and "y0" in found:
            found["y0"].view(-1)[-1] = 0
        return found

    monkeypatch.setattr(gpu_errors, "run", wrong)
    output = tmp_path / "errors.json"
    arguments = ["--device", "cpu", "--sizes", "200,320,64", "--ops", "nf4_linear", "--backends", "cpu"]
    assert gpu_errors.main([*arguments, "--output", str(output)]) == 1
    bf16 = next(row for row in json.loads(output.read_text())["rows"] if row["dtype"] == "bfloat16")
    assert bf16["error"] < gpu_errors.LIMITS[torch.bfloat16] and not bf16["right"]


def test_random_sizes_are_those_of_the_seed(tmp_path):
    output = tmp_path / "errors.json"
    arguments = ["--device", "cpu", "--random", "2", "--ops", "nf4_dequantize", "--backends", "cpu"]
    assert gpu_errors.main([*arguments, "--output", str(output)]) == 0
    sizes = [",".join(map(str, row["sizes"])) for row in json.loads(output.read_text())["rows"]]
    assert list(dict.fromkeys(sizes)) == gpu_errors.random_sizes(2, 0)


def report_of(medians, errors=()):
    rows = [
        {"case": case, "shape": [4096, 4096], "rows": 8192, "contender": name, "backend": backend}
        | {"median_ms": ms, "floor_ms": 1.0}
        for case, name, backend, ms in medians
    ]
    steps = [
        {"step": "errors", "status": 0, "result": {"rows": list(errors)}},
        {"step": "time lora", "status": 0, "result": {"rows": rows}},
    ]
    gpu = {"name": "NVIDIA X", "cuda": "13.0"}
    return {"gpu": gpu, "machine": {"versions": {"torch": "2.11"}}, "commit": "abc", "steps": steps}


def test_a_target_is_the_fastest_peer_over_our_fastest_kernel():
    case = "lora_linear dense forward+backward"
    target = next(each for each in gpu_status.TARGETS if each.case == case and each.shapes == ((4096, 4096),))
    ours = [(case, "peftkern", "triton", 4.0), (case, "peftkern", "cuda", 2.0), (case, "peftkern", "reference", 1.0)]
    assert gpu_status.measured(report_of([*ours, (case, "PEFT", None, 3.0)]), target) == pytest.approx(1.5)
    assert gpu_status.measured(report_of(ours), target) is None
    assert gpu_status.measured(report_of([ours[2], (case, "PEFT", None, 3.0)]), target) is None


def test_the_gemm_is_compared_with_both_ways_around_it():
    """Its target is the better of them: with one alone, or with the reference's fp32 product, it says nothing."""
    target = next(each for each in gpu_status.TARGETS if "64 rows" in each.title)
    names = [("peftkern", "cuda", 2.0), ("bitsandbytes eval", None, 6.0), (gpu_timing.DEQUANTIZED, "cuda", 5.0)]
    names += [(gpu_timing.DEQUANTIZED, "reference", 3.0), ("peftkern", "reference", 4.0)]

    def report(kept):
        medians = [("nf4_linear forward", name, backend, ms) for name, backend, ms in kept]
        found = report_of(medians)
        rows = found["steps"][1]["result"]["rows"]
        found["steps"][1]["result"]["rows"] = [
            {**row, "shape": list(shape), "rows": 64} for row in rows for shape in target.shapes
        ]
        return found

    assert gpu_status.measured(report(names), target) == pytest.approx(2.5)
    for missing in (1, 2):
        assert gpu_status.measured(report([*names[:missing], *names[missing + 1 :]]), target) is None


def test_another_op_of_ours_is_compared_on_the_same_backend():
    case = "dora_linear dense forward+backward"
    target = next(each for each in gpu_status.TARGETS if each.peers == ("peftkern lora_linear",))
    medians = [(case, "peftkern", "triton", 2.0), (case, "peftkern lora_linear", "triton", 1.9)]
    medians.append((case, "peftkern lora_linear", "reference", 1.0))
    assert gpu_status.measured(report_of(medians), target) == pytest.approx(0.95)


def test_a_wrong_kernel_is_named_as_such():
    row = {"op": "ia3_linear", "backend": "triton", "dtype": "bfloat16", "error": 1e-3, "right": True, "repeats": True}
    assert gpu_status.errors(report_of([], [row]), "ia3_linear", "triton") == "right, bf16 error 1.0e-03"
    assert "wrong" in gpu_status.errors(report_of([], [row, {**row, "repeats": False}]), "ia3_linear", "triton")
    assert gpu_status.errors(report_of([], [row]), "ia3_linear", "cuda") is None


def test_the_page_is_that_of_the_committed_reports():
    document = (ROOT / "docs" / "gpu-status.md").read_text()
    begin, end = shown(document)
    assert document[begin:end].strip() == gpu_status.status(gpu_status.committed()).strip()


def test_a_step_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(tmp_path):
    python = [sys.executable, "-c"]
    failed = gpu_check.run_step(gpu_check.Step("fails", [*python, "raise SystemExit(3)"], 30), tmp_path)
    hung = gpu_check.run_step(gpu_check.Step("hangs", [*python, "import time; time.sleep(60)"], 1), tmp_path)
    missing = gpu_check.run_step(gpu_check.Step("missing", ["no-such-program"], 1), tmp_path)
    writes = "import sys; open(sys.argv[-1], 'w').write('{\"rows\": [1]}'); print('said')"
    wrote = gpu_check.run_step(gpu_check.Step("writes", [*python, writes], 30, writes=True), tmp_path)
    assert failed["status"] == 3
    assert hung["status"] == "stopped after 1 s"
    assert "no-such-program" in missing["status"]
    assert wrote["status"] == 0 and wrote["result"] == {"rows": [1]}
    assert (tmp_path / "writes.log").read_text() == "said\n"


def test_it_times_nf4_linear_on_the_shapes_of_both_models(monkeypatch):
    monkeypatch.setattr(gpu_check, "_build", lambda: "")  # which asks the GPU
    timed = set()
    for step in gpu_check.steps():
        if "nf4_linear forward" in step.command:
            shapes, rows = (step.command.index(option) for option in ("--shapes", "--rows"))
            timed |= set(product(step.command[shapes + 1].split(","), map(int, step.command[rows + 1 :])))
    counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 8192)
    assert timed == set(product(("4096x4096", "14336x4096", "8192x28672"), counts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmarks.gpu_check: error: torch finds no GPU here\n"


def test_its_plot_has_a_line_for_each_backend(tmp_path):
    report = report_of([("nf4_linear forward", "peftkern", "cuda", 1.0), ("nf4_linear forward", "bnb", None, 2.0)])
    rows = report["steps"][1]["result"]["rows"]
    rows += [{**row, "rows": 16} for row in rows]
    gpu_check.draw(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
