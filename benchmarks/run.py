"""Times the ops against their peers and writes JSON: `python -m benchmarks.run --output benchmarks/results/NAME.json`.

One process per number of threads, so that libraries that read it at start see the same number. Within it all contenders
take turns; see peftkern/bench/measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import peaks, shapes
from peftkern._native import caps
from peftkern.bench.cases import CASES, ROWLESS, contenders, work
from peftkern.bench.measure import ROTATED_BYTES, interleaved, machine

ROOT = Path(__file__).parents[1]
MOST_CACHED_ROWS = 64
PEER_ISA = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, all checked; `shapes` as a list.

    Raises:
        SystemExit: 2, after one line that names the argument.
    """
    parser = OneLineParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--shapes", default="table", help=f"{', '.join(shapes.SHAPES)}, or OUTxIN,OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(shapes.ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    isas = [name for name, present in caps.isas().items() if present]
    parser.add_argument("--isa", default=None, choices=isas, help="instruction set of our kernels (PEFTKERN_ISA)")
    parser.add_argument("--peer-isa", default=None, choices=list(PEER_ISA), help="hold torch's kernels to this level")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds per case")
    parser.add_argument("--cached", action="store_true", help="also time one copy of each weight, which may be cached")
    parser.add_argument("--quick", action="store_true", help="one small shape, to see that everything runs")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rows, args.threads, args.budget = "512x512", [1, 16], [1], 0.05
    for name in ("rows", "threads"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} must be positive, got {min(getattr(args, name))}")
    if not args.budget >= 0:
        parser.error(f"--budget must be a number of seconds, got {args.budget:g}")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output: {args.output.parent} is not a folder")
    try:
        args.shapes = shape_list(args.shapes)
        if args.isa is None:
            caps.isa()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def shape_list(text: str) -> list[tuple[int, int]]:
    """The shapes that --shapes names.

    Raises:
        ValueError: it names none.
    """
    if text in shapes.SHAPES:
        return shapes.SHAPES[text]
    pairs = [item.split("x") for item in text.split(",")]
    if any(len(pair) != 2 or not all(part.isdigit() and int(part) for part in pair) for pair in pairs):
        raise ValueError(f"--shapes must be one of {', '.join(shapes.SHAPES)} or OUTxIN,OUTxIN, got {text!r}")
    return [(int(out), int(columns)) for out, columns in pairs]


def recorded_command(arguments: list[str], module: str = "benchmarks.run") -> str:
    """The command line that repeats a run, without the place of its output."""
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output")
    return shlex.join(["python", "-m", module, *output.parse_known_args(arguments)[1]])


def commit() -> str | None:
    """The commit of this checkout, marked if files in it have changed; None outside one."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip() or None


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Writes JSON, whole or not at all; to the standard output if there is no file."""
    text = json.dumps(report, indent=1) + "\n"
    if output is None:
        print(text, end="")
        return
    temporary = output.with_name(f".{output.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, output)


def run_case(case: str, shape: tuple[int, int], rows: int, args: argparse.Namespace, limits: dict[str, float]) -> list:
    """The result rows of one case."""
    results = []
    floor, limit = peaks.floor_ms(*work(case, *shape, rows), limits, caps.isa(), not case.endswith("fp32"))
    # With more rows than these it makes no difference where the weight comes from.
    cached = args.cached and rows <= MOST_CACHED_ROWS
    rotations = (0,) if args.quick else (ROTATED_BYTES, 0) if cached else (ROTATED_BYTES,)
    for rotated in rotations:
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
        for shape in args.shapes
        for case in args.cases
        for count in ([0] if case in ROWLESS else args.rows)
        for row in run_case(case, shape, count, args, limits)
    ]
    return {"peaks": limits, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    os.environ.setdefault("PEFTKERN_BNB", "0")  # bitsandbytes is a peer here: on its own kernels
    if args.child:
        args.output.write_text(json.dumps(child(args)))
        return 0
    report: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "command": recorded_command(arguments),
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
            # Bound, since two threads that meet on one core stay there for whole time slices.
            environment |= {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true"}
            status = subprocess.run(command, env=environment, cwd=ROOT).returncode
            if status:
                raise SystemExit(f"benchmarks.run: the process with {threads} threads failed with status {status}")
            part = json.loads(target.read_text())
            report["peaks"][str(threads)] = part["peaks"]
            report["rows"] += part["rows"]
    write_report(report, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
