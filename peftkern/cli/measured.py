"""One method measured in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.cli import loading
from peftkern.cli.errors import Diverged, UsageError
from peftkern.cli.tasks import Digits, Task
from peftkern.cli.training import Display
from peftkern.explain import report
from peftkern.methods import METHODS
from peftkern.tuning import disable_adapters, merge, save, tune

LATENCY_ROUNDS, WARM_UP_ROUNDS = 30, 3


@dataclass(frozen=True)
class Measured:
    """One row of the comparison.

    Attributes:
        method: its name.
        trainable_parameters, parameters: elements, the adapter's and all.
        changes_architecture: whether the model, once merged, is another than the base.
        quality: after training, see the task.
        step_seconds: of the median step.
        peak_memory_bytes: of the process, with Python and torch.
        training_memory_bytes: of that, what was not there before the model was loaded.
        file_bytes: of what `save` wrote.
        latency, merged_latency: of one small inference over the base's; None if it does not merge.
        base_unchanged: whether the old task's outputs are the same bits with the adapter off.
        old_quality: on the old task with the adapter on, where the task has such a measure.
    """

    method: str
    trainable_parameters: int
    parameters: int
    changes_architecture: bool
    quality: float
    step_seconds: float
    peak_memory_bytes: int
    training_memory_bytes: int
    file_bytes: int
    latency: float
    merged_latency: float | None
    base_unchanged: bool
    old_quality: float | None

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / self.parameters


def run(task: Task, method: str, threads: int | None, display: Display) -> Measured:
    """Measures a method in a new process.

    Raises:
        UsageError: the method cannot be used on this task's model; the text says why.
        Diverged: its training did, or the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, task, method, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, *content = ours.recv()
            if kind == "step":
                display.update(*content)
            elif kind == "done":
                return content[0]
            else:
                raise (UsageError if kind == "unusable" else Diverged)(content[0])
    except EOFError as error:
        process.join()
        raise Diverged(f"its process died with exit code {process.exitcode}") from error
    finally:
        ours.close()
        process.terminate()
        process.join()


class _Remote:
    """A Display in the process that asked."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.connection.send(("step", step, loss, tokens_per_second))


def _work(connection: Connection, task: Task, method: str, threads: int | None) -> None:
    # Ctrl-C reaches every process of the terminal; the one that asked ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads:
        torch.set_num_threads(threads)
    try:
        connection.send(("done", measure(task, method, _Remote(connection))))
    except (UsageError, TypeError, ValueError) as error:
        connection.send(("unusable", loading.first_line(error)))
    except (RuntimeError, OSError, Diverged) as error:
        connection.send(("failed", loading.first_line(error)))


def measure(task: Task, method: str, display: Display) -> Measured:
    """Measures a method in this process; see `run`."""
    loading.check_installed()
    # What the libraries load at their first use is not the method's.
    task.run_once(task.load())
    gc.collect()
    resident = _status_bytes("VmRSS") or _peak_bytes()
    model = task.load()
    pristine = task.old_task(model)
    torch.manual_seed(0)
    tune(model, method, **task.options(method))
    with disable_adapters(model):
        off_before = task.old_task(model)
    counts = report(model)
    _reset_peak()
    step_seconds = task.train(model, method, display)
    peak = _peak_bytes()
    quality = task.quality(model)
    with disable_adapters(model):
        off_after = task.old_task(model)
    # QLoRA's base is the quantised one.
    unchanged = torch.equal(off_after, off_before) and (method == "qlora" or torch.equal(off_after, pristine))
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        file_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    merged = None
    if METHODS[method].mergeable:
        merged = copy.deepcopy(model)
        merge(merged, keep_base=False)
    plain = task.load()
    latency, merged_latency = _latencies(task, plain, model, merged)
    return Measured(
        method=method,
        trainable_parameters=counts.trainable_parameters,
        parameters=counts.parameters,
        changes_architecture=merged is None or _architecture(merged) != _architecture(plain),
        quality=quality,
        step_seconds=step_seconds,
        peak_memory_bytes=peak,
        training_memory_bytes=peak - resident,
        file_bytes=file_bytes,
        latency=latency,
        merged_latency=merged_latency,
        base_unchanged=unchanged,
        old_quality=task.old_accuracy(task.old_task(model)) if isinstance(task, Digits) else None,
    )


def _architecture(model: nn.Module) -> list[tuple[Any, ...]]:
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return [(name, type(module).__name__) for name, module in model.named_modules()] + sorted(parameters.items())


def _latencies(task: Task, base: nn.Module, model: nn.Module, merged: nn.Module | None) -> tuple[float, float | None]:
    """The model's and the merged one's over the base's: taken in turns, the median of the turns' ratios."""
    models = [each.eval() for each in (base, model, merged) if each is not None]
    turns = [[_seconds(task, each) for each in models] for _ in range(WARM_UP_ROUNDS + LATENCY_ROUNDS)]
    ratios = [[taken / first for taken in rest] for first, *rest in turns[WARM_UP_ROUNDS:]]
    ours, *merged_ratio = (statistics.median(column) for column in zip(*ratios))
    return ours, merged_ratio[0] if merged_ratio else None


def _seconds(task: Task, model: nn.Module) -> float:
    started = time.perf_counter()
    task.run_once(model)
    return time.perf_counter() - started


def _reset_peak() -> None:
    """Forgets the peak, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Of this process alone: on Linux getrusage's peak starts at that of the process that started it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int | None:
    path = Path(f"/proc/{os.getpid()}/status")
    if not path.exists():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024 if field in lines else None
