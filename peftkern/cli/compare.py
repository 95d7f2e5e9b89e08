"""`peftkern compare`: every method from the same base on the same data with the same steps, one row each."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from peftkern.cli import arguments, comparison, info, loading, measured, output
from peftkern.cli.errors import Diverged, UsageError
from peftkern.cli.finetune import EMBEDDED_MODEL
from peftkern.cli.report import progress
from peftkern.cli.tasks import BASE_STEPS, DTYPES, Digits, Task, Text, check_digits
from peftkern.methods import METHODS

TEXT_STEPS, DIGITS_STEPS = 100, 200


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="train every method on the same data and compare them",
        description="Train every method from the same base on the same data with the same number of steps, each in a "
        "process of its own, and print one row each: trainable parameters, whether the architecture changes, held-out "
        "quality, time of a step, peak memory, size of the file, inference against the base. Without arguments: the "
        "small embedded model, on the help texts of the Python standard library.",
    )
    shown = "(default %(default)s)"
    add = parser.add_argument
    add("--task", choices=("text", "digits"), default="text", help=f"digits: a small vision transformer {shown}")
    add("--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)} (default all)")
    add("--model", type=Path, metavar="DIR", help="text: Hugging Face model folder (default: the embedded model)")
    add("--data", type=Path, metavar="FILE", help='text: .txt, or .jsonl with "text" (default: the Python help texts)')
    add("--output", type=Path, default=Path("runs/compare"), metavar="DIR", help=f"CSV, Markdown and picture {shown}")
    add("--steps", type=arguments.count, help=f"optimizer steps (default {TEXT_STEPS}, digits {DIGITS_STEPS})")
    add("--batch-size", type=arguments.count, default=8, help=f"text: sequences per step {shown}")
    add("--sequence-length", type=arguments.count, default=256, help=f"text: tokens per sequence {shown}")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help=f"text: weights and activations {shown}")
    add("--seed", type=arguments.seed, default=0, help=f"of data order, base and adapters {shown}")
    add("--threads", type=arguments.count, help="CPU threads (default: torch's choice)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures the methods one after another, prints the table and writes the files.

    Raises:
        UsageError, OSError, Diverged: as `peftkern.cli.main` reports them; a method that cannot be used on the model,
            or diverges, is a row that says so.
    """
    loading.check_installed()
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = list(dict.fromkeys(args.methods or METHODS))
    with tempfile.TemporaryDirectory() as folder:
        task = _task(args, Path(folder))
        output.prepare(args.output)
        if isinstance(task, Digits):
            with progress("training the base", BASE_STEPS, task.unit) as display:
                task.train_base(display)
        print("measuring the base", flush=True)
        base = task.quality(task.load())
        print(f"base: {task.quality_name} {base:.4f}", flush=True)
        rows: list[measured.Measured] = []
        failures: dict[str, str] = {}
        for number, method in enumerate(methods, start=1):
            try:
                with progress(f"{number}/{len(methods)} {method}", task.steps, task.unit) as display:
                    rows.append(measured.run(task, method, args.threads, display))
            except (UsageError, Diverged) as error:
                failures[method] = str(error).removeprefix(f"{method}: ")
                print(f"{method}: {failures[method]}", flush=True)
    if not rows:
        raise Diverged("no method could be measured")
    found = comparison.Comparison(task, base, rows, failures, _conditions(args, task))
    with output.all_or_nothing(args.output) as staging:
        comparison.write(found, staging)
    comparison.show(found)
    print(f"saved in {args.output}")
    return 0


def _task(args: argparse.Namespace, folder: Path) -> Task:
    """The task, with all but the model checked."""
    if args.task == "digits":
        for name in ("model", "data"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name}: --task digits brings its own, got {getattr(args, name)}")
        check_digits()
        return Digits(folder, args.steps or DIGITS_STEPS, args.seed)
    model = EMBEDDED_MODEL if args.model is None else args.model
    loading.check_folder(model)
    task = Text(
        folder=model,
        embedded=args.model is None,
        data_file=args.data,
        steps=args.steps or TEXT_STEPS,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=args.dtype,
        seed=args.seed,
    )
    _, tokens = task.read()
    loading.check_fits(task.load(), tokens, args.sequence_length)
    return task


def _conditions(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    versions = {name: version for name, version in info.versions().items() if version}
    found: dict[str, Any] = {"task": args.task, "steps": task.steps, "seed": args.seed}
    if isinstance(task, Text):
        data = "pydoc_data.topics" if args.data is None else str(args.data)
        model = "embedded" if args.model is None else str(args.model)
        batch = f"{args.batch_size} x {args.sequence_length}"
        found |= {"model": model, "data": data, "batch": batch, "dtype": args.dtype}
    return found | {"threads": torch.get_num_threads(), "isa": info.isa(), **versions}
