"""A training step of dense LoRA by the engine composed of torch's ops, against PEFT's eager layer, on the CPU.

OMP_PROC_BIND=true python -m benchmarks.torch_engine --output benchmarks/results/torch_engine.json
"""

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

import peftkern
from peftkern.bench.measure import copies, interleaved, machine

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEATURES, RANK = 4096, 16


def peft_layer(dtype: torch.dtype, dropout: float) -> Any:
    """PEFT's layer with factors in fp32, its default, that have moved."""
    base = nn.Linear(FEATURES, FEATURES, bias=False, dtype=dtype).requires_grad_(False)
    layer: Any = lora.Linear(base, "default", config=LoraConfig(r=RANK, lora_dropout=dropout), r=RANK, lora_alpha=32)
    for factor in (layer.lora_A, layer.lora_B):
        factor.float()
        nn.init.normal_(factor["default"].weight, std=0.02)
    return layer.train()


def step(layer: Any, x: Tensor, grad: Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    layer(x).backward(grad)


def measured(dtype: str, rows: int, dropout: float, budget_s: float) -> dict[str, Any]:
    """Both in turn, on weights that take turns through more than a cache holds."""
    kind = DTYPES[dtype]
    layers = [peft_layer(kind, dropout) for _ in range(copies(FEATURES * FEATURES * kind.itemsize))]
    ours = [peftkern.accelerate(copy.deepcopy(layer)) for layer in layers]
    x = torch.randn(rows, FEATURES).to(kind).requires_grad_()
    grad = torch.randn(rows, FEATURES).to(kind)
    contenders = {
        "torch engine": lambda i: step(ours[i % len(ours)], x, grad),
        "peft": lambda i: step(layers[i % len(layers)], x, grad),
    }
    timings = interleaved(contenders, budget_s)
    found = {name: vars(timing) for name, timing in timings.items()}
    ratio = timings["torch engine"].median_ms / timings["peft"].median_ms
    return {"dtype": dtype, "rows": rows, "dropout": dropout, "ratio": round(ratio, 3), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in DTYPES:
        for count in options.rows:
            for dropout in (0.0, 0.1):
                rows.append(measured(dtype, count, dropout, options.budget))
                print(*(f"{key} {rows[-1][key]}" for key in ("dtype", "rows", "dropout", "ratio")), flush=True)
    if options.output:
        report = {"machine": machine(), "threads": options.threads, "command": " ".join(sys.argv), "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    os.environ["PEFTKERN_BACKEND"] = "torch"
    main()
