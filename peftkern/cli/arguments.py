"""Types of arguments, each with one line on what is wrong."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: parsed by `kind`, and refused with `wanted` unless `accepts` it."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


count = _number(int, lambda n: n >= 1, "a whole number from 1")
seed = _number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive = _number(float, lambda x: 0 < x < math.inf, "a positive number")
probability = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
