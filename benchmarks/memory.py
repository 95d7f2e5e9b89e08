"""Extra memory of a training step of lora_linear on NF4: `python -m benchmarks.memory --output FILE.json`.

Each case runs in a process of its own, on Linux with glibc. Extra is the rise of the peak resident size over a step,
less what any implementation must hold: y, dx, the saved x A^T and the adapters' gradients. Engine workspaces are
counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks.run import commit, write_report
from peftkern.bench import contenders as c
from peftkern.bench.measure import machine

LIMIT_PER_THREAD = 4 * 2**20
CONTENDERS = ("peftkern", "PEFT + bitsandbytes")
DROPOUT = 0.1


def reset_peak() -> None:
    """Gives freed memory back, which a step would use again, and makes the peak resident size the present one."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(entry: str) -> int:
    """VmRSS, the resident size now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry + ":"))


def _wrapped(contender: str, out_features: int, in_features: int) -> nn.Module:
    """The layer that is measured."""
    if contender == "peftkern":
        return c.lora(c.nf4_linear(out_features, in_features), DROPOUT)
    return c.peft_lora(c.bnb_linear(out_features, in_features), DROPOUT)


def case(contender: str, out_features: int, in_features: int, rows: int, threads: int) -> dict[str, int]:
    """Measures in this process."""
    torch.set_num_threads(threads)
    # Threads, allocator and imports are set up by a step too small to matter for the workspaces.
    small = torch.randn(1, 64).bfloat16()
    c.forward_backward(small, small)(_wrapped(contender, 64, 64))
    layer = _wrapped(contender, out_features, in_features)
    x = torch.randn(rows, in_features).bfloat16().requires_grad_()
    grad = torch.randn(rows, out_features).bfloat16()
    reset_peak()
    before = resident_bytes("VmRSS")
    layer(x).backward(grad)
    peak = resident_bytes("VmHWM")
    needed = 2 * rows * (out_features + in_features) + 4 * c.RANK * (rows + out_features + in_features)
    return {"extra_bytes": peak - before - needed, "needed_bytes": needed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256, 1024])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--case", nargs=5, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault("PEFTKERN_BNB", "0")  # bitsandbytes is a peer here: on its own kernels
    if args.case:
        print(json.dumps(case(args.case[0], *(int(value) for value in args.case[1:]))))
        return 0
    shapes = [[int(size) for size in text.split("x")] for text in args.shapes]
    results = []
    for contender, shape, rows, threads in product(CONTENDERS, shapes, args.rows, args.threads):
        values = [contender, *map(str, (*shape, rows, threads))]
        command = [sys.executable, "-m", "benchmarks.memory", "--case", *values]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        results.append({"contender": contender, "shape": shape, "rows": rows, "threads": threads, **result})
        print(results[-1], file=sys.stderr)
    report = {"machine": machine(), "commit": commit(), "limit_per_thread": LIMIT_PER_THREAD, "rows": results}
    write_report(report, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
