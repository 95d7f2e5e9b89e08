"""`peftkern bench`: what an op costs on this machine, beside the installed peers."""

from __future__ import annotations

import argparse
import json

import torch

from peftkern._native import caps
from peftkern.bench.cases import CASES
from peftkern.bench.measure import Timing
from peftkern.cli.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="time an op against the installed peers")
    parser.add_argument("--case", default="nf4_linear forward", choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--shape", default="4096x4096", help="OUTxIN of the weight")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per number of rows")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape must be OUTxIN, such as 4096x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def _line(rows: int, timings: dict[str, Timing]) -> str:
    ours = timings["peftkern"].median_ms
    parts = [f"peftkern {ours:.3f} ms"]
    parts += [f"{n} {t.median_ms:.3f} ms ({t.median_ms / ours:.2f}x)" for n, t in timings.items() if n != "peftkern"]
    return f"rows {rows:5d}: " + ", ".join(parts)


def run(args: argparse.Namespace) -> int:
    from peftkern.bench.cases import contenders
    from peftkern.bench.measure import interleaved

    shape = _shape(args.shape)
    if any(rows < 1 for rows in args.rows):
        raise UsageError(f"--rows must be positive, got {min(args.rows)}")
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads must be positive, got {args.threads}")
        torch.set_num_threads(args.threads)
    results = {}
    if not args.json:
        print(f"{args.case}, {shape[0]} x {shape[1]}, {torch.get_num_threads()} threads, {caps.isa()}; medians")
    for rows in args.rows:
        timings = interleaved(contenders(args.case, *shape, rows), args.budget)
        results[rows] = {name: timing.median_ms for name, timing in timings.items()}
        if not args.json:
            print(_line(rows, timings), flush=True)
    if args.json:
        print(json.dumps({"case": args.case, "shape": shape, "isa": caps.isa(), "median_ms": results}))
    return 0
