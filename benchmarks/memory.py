"""Extra memory of a training step of lora_linear on NF4: `python -m benchmarks.memory --output FILE.json`.

Each case runs in a process of its own. Extra is the rise of the peak resident size over a step, less what any
implementation must hold: y, dx, the saved x A^T and the adapters' gradients. Engine workspaces are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from peftkern.bench import contenders as c
from peftkern.bench.measure import machine

LIMIT_PER_THREAD = 4 * 2**20


def resident_bytes() -> int:
    """Resident size now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def case(contender: str, out_features: int, in_features: int, rows: int, threads: int) -> dict[str, float]:
    """Measures in this process."""
    torch.set_num_threads(threads)
    build = {
        "peftkern": lambda: c.lora(c.nf4_linear(out_features, in_features), 0.1),
        "PEFT + bitsandbytes": lambda: c.peft_lora(c.bnb_linear(out_features, in_features), 0.1),
    }
    # Threads, allocator and imports are set up by a step on a layer too small to matter.
    small = c.lora(c.nf4_linear(64, 64), 0.1) if contender == "peftkern" else c.peft_lora(c.bnb_linear(64, 64), 0.1)
    c.forward_backward(torch.randn(rows, 64).bfloat16(), torch.randn(rows, 64).bfloat16())(small)
    layer = build[contender]()
    x = torch.randn(rows, in_features).bfloat16().requires_grad_()
    grad = torch.randn(rows, out_features).bfloat16()
    before = resident_bytes()
    layer(x).backward(grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    needed = 2 * rows * (out_features + in_features) + 4 * c.RANK * (rows + out_features + in_features)
    return {"extra_bytes": max(0, peak - before - needed), "needed_bytes": needed}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--case", nargs=5, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args.case[0], *(int(value) for value in args.case[1:]))))
        return 0
    rows = []
    for contender in ("peftkern", "PEFT + bitsandbytes"):
        for shape in ((4096, 4096), (14336, 4096)):
            for count in (16, 256, 1024):
                for threads in (1, 2):
                    values = [contender, *map(str, (*shape, count, threads))]
                    command = [sys.executable, "-m", "benchmarks.memory", "--case", *values]
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    result = json.loads(output.splitlines()[-1])
                    rows.append({"contender": contender, "shape": shape, "rows": count, "threads": threads, **result})
                    print(rows[-1], file=sys.stderr)
    text = json.dumps({"machine": machine(), "command": "python -m benchmarks.memory", "rows": rows}, indent=1) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
