"""What the command line takes for a method when it is not told."""

import argparse
from typing import Any

from peftkern.cli.errors import UsageError
from peftkern.methods import METHODS

# Peak learning rates: for the embedded model (4.5 M parameters, which takes steps that would wreck a real one) the best
# on 60 steps of 4 x 256 tokens of the default text in benchmarks/results/methods/learning_rates.json (`full`: between
# the best for text and for digits); and for a real model, from the papers and PEFT's method comparison.
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "lora": (4e-3, 2e-4),
    "qlora": (4e-3, 2e-4),
    "dora": (4e-3, 2e-4),
    "ia3": (1e-1, 3e-3),
    "bitfit": (8e-2, 1e-3),
    "houlsby": (8e-3, 3e-4),
    "prompt_tuning": (6e-1, 1e-3),
    "p_tuning": (1.6e-2, 1e-3),
    "prefix_tuning": (3.2e-1, 5e-3),
    "p_tuning_v2": (3.2e-1, 5e-3),
    "full": (1e-3, 1e-5),
}
# Options of the command line that are passed to a method that has them.
SIZES: dict[str, Any] = {"rank": 16, "alpha": 32.0, "dropout": 0.0}


def learning_rate(method: str, embedded: bool) -> float:
    """The peak learning rate for a method, LoRA's for one that has none of its own."""
    return LEARNING_RATES.get(method, LEARNING_RATES["lora"])[0 if embedded else 1]


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The options in SIZES that the method has, as given or by default; None for those that it lacks.

    Raises:
        UsageError: one was given that the method lacks.
    """
    known = METHODS[args.method].options()
    for name in SIZES:
        if getattr(args, name) is not None and name not in known:
            raise UsageError(f"--{name}: {args.method} has none, got {getattr(args, name)}")
    given = {name: getattr(args, name) if name in known else None for name in SIZES}
    return {name: SIZES[name] if value is None and name in known else value for name, value in given.items()}


def default_sizes(method: str) -> dict[str, Any]:
    """The options in SIZES that a method has."""
    return {name: value for name, value in SIZES.items() if name in METHODS[method].options()}
