"""Times the ops against their peers and writes JSON: `python -m benchmarks.run --output benchmarks/results/NAME.json`.

One process per number of threads, so that libraries that read it at start see the same number. Within it all contenders
take turns; see peftkern/bench/measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import peaks, shapes
from peftkern._native import caps
from peftkern.bench.cases import CASES, contenders, work
from peftkern.bench.measure import ROTATED_BYTES, interleaved, machine

PEER_ISA = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--shapes", default="table", help=f"{', '.join(shapes.SHAPES)}, or OUTxIN,OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(shapes.ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--isa", default=None, help="instruction set of our kernels (PEFTKERN_ISA)")
    parser.add_argument("--peer-isa", default=None, choices=list(PEER_ISA), help="hold torch's kernels to this level")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per case")
    parser.add_argument("--cached", action="store_true", help="also time one copy of each weight, which may be cached")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that everything runs")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rows, args.threads, args.budget = "512x512", [1, 16], [1], 0.05
    return args


def shape_list(text: str) -> list[tuple[int, int]]:
    """The shapes that --shapes names."""
    if text in shapes.SHAPES:
        return shapes.SHAPES[text]
    pairs = [item.split("x") for item in text.split(",")]
    if any(len(pair) != 2 or not all(part.isdigit() for part in pair) for pair in pairs):
        raise SystemExit(f"--shapes must be one of {', '.join(shapes.SHAPES)} or OUTxIN,OUTxIN, got {text!r}")
    return [(int(out), int(columns)) for out, columns in pairs]


def run_case(case: str, shape: tuple[int, int], rows: int, args: argparse.Namespace, limits: dict[str, float]) -> list:
    """The result rows of one case."""
    results = []
    floor, limit = peaks.floor_ms(*work(case, *shape, rows), limits, caps.isa(), not case.endswith("fp32"))
    for rotated in (ROTATED_BYTES, 0) if args.cached else (ROTATED_BYTES,):
        if args.quick:
            rotated = 0
        timings = interleaved(contenders(case, *shape, rows, rotated), args.budget)
        for name, timing in timings.items():
            common = {"case": case, "shape": list(shape), "rows": rows, "threads": torch.get_num_threads()}
            isa = {"isa": caps.isa(), "peer_isa": args.peer_isa, "cached": rotated == 0}
            results.append({**common, **isa, "contender": name, **asdict(timing), "floor_ms": floor, "limit": limit})
        medians = ", ".join(f"{name} {timing.median_ms:.3f}" for name, timing in timings.items())
        print(f"{case} {shape} rows {rows}: {medians}", file=sys.stderr)
    return results


def child(args: argparse.Namespace) -> dict[str, Any]:
    """All cases at one number of threads."""
    torch.set_num_threads(args.threads[0])
    limits = peaks.measure(args.threads[0])
    rows = [
        row
        for shape in shape_list(args.shapes)
        for case in args.cases
        for count in (args.rows if "linear" in case else [0])
        for row in run_case(case, shape, count, args, limits)
    ]
    return {"peaks": limits, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    shape_list(args.shapes)
    if args.child:
        args.output.write_text(json.dumps(child(args)))
        return 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    report: dict[str, Any] = {
        "machine": machine(),
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python -m benchmarks.run", *arguments]),
        "peaks": {},
        "rows": [],
    }
    environment = {**os.environ, **PEER_ISA.get(args.peer_isa, {})}
    if args.isa:
        environment["PEFTKERN_ISA"] = args.isa
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads:
            target = Path(folder) / f"{threads}.json"
            command = [sys.executable, "-m", "benchmarks.run", *arguments, "--child", "--output", str(target)]
            command += ["--threads", str(threads)]
            environment["OMP_NUM_THREADS"] = str(threads)
            subprocess.run(command, check=True, env=environment)
            part = json.loads(target.read_text())
            report["peaks"][str(threads)] = part["peaks"]
            report["rows"] += part["rows"]
    text = json.dumps(report, indent=1) + "\n"
    if args.output is None:
        print(text)
    else:
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
