"""Everything that wants a GPU, in one command: `make gpu-check OUT=DIR`, about ten minutes, without a network.

Builds for the GPU at hand, then runs the tests, the comparison with float64, compute-sanitizer and the benchmarks, each
in a process of its own with a time limit, so that one that hangs or dies leaves the others. DIR gets report.json, a log
of each step and the plots; the table comes last. `python -m benchmarks.gpu_status` makes docs/gpu-status.md of the
reports that are committed under benchmarks/results/gpu/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Nothing of the package is imported at the top: its native modules may not be built yet.
ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
LLAMA_8B, LLAMA_70B = "4096x4096,14336x4096", "8192x28672"
CUDA_OPS = ("nf4_quantize", "nf4_dequantize", "nf4_linear", "lora_linear")
# Of the comparison of the CUDA kernels, which reaches every kernel of every device (tests/test_cuda_maps.py), and what
# compute-sanitizer can look at in its time: one of each kind.
RANDOM_SIZES, SANITIZED_SIZES = 32, ("5,128,192", "40,136,320", "130,72,1024")
DECODE_ROWS, GEMM_ROWS, MANY_ROWS = ["1", "2", "4", "8"], ["16", "32", "64", "128", "256", "512"], ["1024", "8192"]


class Step(NamedTuple):
    """A command whose JSON, if it writes any, becomes a part of the report."""

    name: str
    command: list[str]
    limit_s: int
    writes: bool = False


def _timing(name: str, cases: Sequence[str], shapes: str, rows: Sequence[str], limit_s: int) -> Step:
    command = [PYTHON, "-m", "benchmarks.gpu_timing", "--cases", *cases, "--shapes", shapes, "--rows", *rows]
    return Step(f"time {name}", command, limit_s, writes=True)


def steps() -> list[Step]:
    """In the order of what the rest rests on; the limits add up to more than they take."""
    nf4, with_lora = ["nf4_linear forward"], ["lora_linear nf4 forward"]
    lora = ["lora_linear dense forward+backward", "lora_linear dense forward+backward dropout 0.1"]
    dora = ["dora_linear nf4 forward+backward", "dora_linear dense forward+backward", "dora_norm nf4"]
    blocks = ["lora_qkv nf4 forward+backward", "lora_mlp nf4 forward+backward", "ia3_linear nf4 forward+backward"]
    others = ["bottleneck_adapter forward+backward", "prompt_embedding forward+backward"]
    errors = [PYTHON, "-m", "benchmarks.gpu_errors"]
    cuda = ["--backends", "cuda", "--ops", *CUDA_OPS]
    found = [
        Step("build", ["bash", "-c", _build()], 300),
        Step("errors", errors, 120, writes=True),
        Step("errors of cuda", [*errors, *cuda, "--random", str(RANDOM_SIZES)], 150, writes=True),
        Step("tests", [PYTHON, "-m", "pytest", "-q", "--maxfail=20", "tests/gpu"], 240),
        _timing("conversions", ["nf4_dequantize", "nf4_quantize"], f"{LLAMA_8B},{LLAMA_70B}", ["1"], 60),
        _timing("decode", nf4, f"{LLAMA_8B},{LLAMA_70B}", DECODE_ROWS, 90),
        _timing("lora decode", with_lora, LLAMA_8B, DECODE_ROWS, 60),
        _timing("gemm", nf4, LLAMA_8B, [*GEMM_ROWS, *MANY_ROWS], 90),
        _timing("gemm 70b", nf4, LLAMA_70B, [*GEMM_ROWS, *MANY_ROWS], 120),
        _timing("nf4 training step", ["nf4_linear forward+backward"], "14336x4096", GEMM_ROWS, 60),
        _timing("lora", [*lora, "lora_linear nf4 forward+backward"], "4096x4096,2048x2048", ["8192"], 90),
        _timing("dora", dora, "4096x4096", ["8192"], 60),
        _timing("blocks", blocks, "4096x4096", ["8192"], 60),
        _timing("others", others, "4096x4096", ["8192"], 60),
        _timing("prefix", ["prefix_attention forward+backward"], "4096x4096", ["512"], 60),
    ]
    if shutil.which("compute-sanitizer"):
        few = [*errors, *cuda, "--sizes", *SANITIZED_SIZES]
        for tool in ("memcheck", "racecheck"):
            found.insert(4, Step(tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *few], 150))
    return found


def _build() -> str:
    """For the GPU at hand alone, into the package's folder; nothing is downloaded."""
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    arguments = f"-DPython_EXECUTABLE={PYTHON} -DPEFTKERN_CUDA=ON -DPEFTKERN_CUDA_ARCHS={major}{minor}{suffix}-real"
    return (
        f"cmake -S . -B build/gpu -G Ninja {arguments} && cmake --build build/gpu -j {os.cpu_count()} && "
        "cmake --install build/gpu --prefix peftkern"
    )


def run_step(step: Step, output: Path) -> dict[str, Any]:
    """Runs it with its log beside the report; gives its state and what it wrote."""
    name = step.name.replace(" ", "-")
    written = output / f"{name}.json"
    command = [*step.command, "--output", str(written)] if step.writes else step.command
    environment = {**os.environ, "PEFTKERN_BNB": "0", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    with (output / f"{name}.log").open("w") as log:
        try:
            status: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=step.limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.limit_s} s"
        except OSError as error:
            status = str(error)
    state = {"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    print(f"{step.name}: {'ok' if status == 0 else status} ({state['seconds']} s)", flush=True)
    if written.exists():
        state["result"] = json.loads(written.read_text())
        written.unlink()
    return state


def gpu() -> dict[str, Any]:
    """What the figures depend on."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Time against rows of every case that was timed at several numbers of rows, at its first shape."""
    from benchmarks import plot

    rows = [row for step in report["steps"] for row in step.get("result", {}).get("rows", ()) if "median_ms" in row]
    panels = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        found = [row for row in of_case if row["shape"] == of_case[0]["shape"]]
        if len({row["rows"] for row in found}) > 1:
            named = [{**row, "contender": _label(row)} for row in found]
            panels.append((f"{case}, {' x '.join(map(str, found[0]['shape']))}", named))
    if panels:
        plot.draw_panels(panels, report["gpu"]["name"], path)


def _label(row: dict[str, Any]) -> str:
    return row["contender"] if row["backend"] is None else f"{row['contender']} {row['backend']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--steps", nargs="+", default=None, help="beside the build, those whose names begin so")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu_check: error: torch finds no GPU here\n")
    args.output.mkdir(parents=True, exist_ok=True)
    build, *rest = steps()
    report: dict[str, Any] = {"gpu": gpu(), "command": "make gpu-check", "steps": [run_step(build, args.output)]}
    if report["steps"][0]["status"] != 0:
        print((args.output / "build.log").read_text()[-4000:])
        return 1
    from benchmarks.gpu_status import table
    from benchmarks.run import commit, write_report
    from peftkern.bench.measure import machine

    report |= {"machine": machine(), "commit": commit()}
    for step in rest:
        if args.steps is None or any(step.name.startswith(name) for name in args.steps):
            report["steps"].append(run_step(step, args.output))
            write_report(report, args.output / "report.json")
    draw(report, args.output / "speed.png")
    print(table(report))
    return 0 if all(step["status"] == 0 for step in report["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
