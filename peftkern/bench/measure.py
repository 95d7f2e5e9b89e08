"""Timing several contenders in one process, so that a noisy machine is noisy for all of them."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from peftkern._native import caps

# Weights take turns through this much memory, more than a last-level cache holds for one core.
ROTATED_BYTES = 128 * 2**20

Run = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles over the rounds."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    rounds: int


def summary(seconds: list[float]) -> Timing:
    """The median and quartiles of some durations."""
    if len(seconds) < 2:
        seconds = seconds * 2
    p25, median, p75 = (1e3 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
    return Timing(median, p25, p75, len(seconds))


def copies(instance_bytes: int, rotated_bytes: int = ROTATED_BYTES) -> int:
    """How many instances of a weight take turns."""
    return max(1, -(-rotated_bytes // instance_bytes))


def durations(contenders: Mapping[str, Run], budget_s: float = 4.0, least_rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each `run(i)` of each contender, i counting up, in rounds whose order rotates.

    Rounds end after `budget_s` seconds, but not before `least_rounds`. Two rounds of warm-up are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = None
    for number in range(-2, 10_000):
        if number == 0:
            end = time.perf_counter() + budget_s
        for name in names:
            begin = time.perf_counter()
            contenders[name](number + 2)
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
        names = names[1:] + names[:1]
        if end is not None and number + 1 >= least_rounds and time.perf_counter() > end:
            break
    return seconds


def interleaved(contenders: Mapping[str, Run], budget_s: float = 4.0, least_rounds: int = 5) -> dict[str, Timing]:
    """Medians and quartiles of `durations`."""
    return {name: summary(values) for name, values in durations(contenders, budget_s, least_rounds).items()}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, object]:
    """What the figures depend on: CPU, instruction sets, versions."""
    packages = ("peftkern", "torch", "bitsandbytes", "peft", "transformers")
    return {
        "cpu": _cpu_model(),
        "isas": [name for name, present in caps.isas().items() if present],
        "compiler": caps.build_info().get("compiler"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "mkldnn": torch.backends.mkldnn.is_available(),
    }
