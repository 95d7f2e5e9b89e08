"""Which peak learning rate suits each method: `python -m benchmarks.learning_rates --output FILE.json`.

Trains the tasks of `peftkern compare` at several rates around each method's default, and writes what each reached. The
defaults of peftkern/cli/presets.py are read off it. Only qualities are recorded: the machine may be busy. The
file's rows of other rates and methods stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import commit, recorded_command, write_report
from peftkern.bench.measure import machine
from peftkern.cli.errors import Diverged
from peftkern.cli.finetune import EMBEDDED_MODEL
from peftkern.cli.report import progress
from peftkern.cli.tasks import BASE_STEPS, Digits, Text
from peftkern.methods import METHODS
from peftkern.tuning import tune

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TEXT_STEPS, TEXT_BATCH, TEXT_LENGTH, DIGITS_STEPS = 60, 4, 256, 200


@dataclass(frozen=True)
class TextAt(Text):
    rate: float = 0.0

    def learning_rate(self, method: str) -> float:
        return self.rate


@dataclass(frozen=True)
class DigitsAt(Digits):
    rate: float = 0.0

    def learning_rate(self, method: str) -> float:
        return self.rate


def text(rate: float, seed: int, steps: int) -> TextAt:
    return TextAt(EMBEDDED_MODEL, True, None, steps, TEXT_BATCH, TEXT_LENGTH, "bf16", seed, rate)


def quality_at(task: TextAt | DigitsAt, method: str) -> float | None:
    """What the method reaches; None where it diverges."""
    model = task.load()
    torch.manual_seed(0)
    tune(model, method, **task.options(method))
    with progress(f"{method} at {task.rate:g}", task.steps, task.unit) as display:
        try:
            task.train(model, method, display)
        except Diverged:
            return None
    return task.quality(model)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_rates", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", default=list(METHODS))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the default rate")
    parser.add_argument("--tasks", nargs="+", choices=("text", "digits"), default=["text", "digits"])
    parser.add_argument("--steps", type=int, default=None, help=f"default {TEXT_STEPS}, digits {DIGITS_STEPS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if args.output is not None and args.output.exists():
        rows = json.loads(args.output.read_text())["rows"]
    command = recorded_command(arguments).replace("benchmarks.run", "benchmarks.learning_rates")
    report = {"machine": machine(), "commit": commit(), "command": command, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        base = DigitsAt(Path(folder), args.steps or DIGITS_STEPS, args.seed)
        with progress("training the base", BASE_STEPS, base.unit) as display:
            base.train_base(display)
        for method in args.methods:
            for factor in args.factors:
                presets = text(0.0, args.seed, args.steps or TEXT_STEPS), base
                for name, task in zip(("text", "digits"), presets):
                    if name not in args.tasks:
                        continue
                    default = super(type(task), task).learning_rate(method)
                    at = type(task)(**{**vars(task), "rate": default * factor})
                    row = {"task": name, "method": method, "default": default, "learning_rate": at.rate}
                    rows[:] = [other for other in rows if not row.items() <= other.items()]
                    rows.append({**row, task.quality_name: quality_at(at, method)})
                    print(rows[-1], file=sys.stderr, flush=True)
            if args.output is not None:
                write_report(report, args.output)
    if args.output is None:
        write_report(report, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
