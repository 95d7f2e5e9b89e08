"""What `peftkern finetune` shows: progress, the loss curve and the comparison."""

import io
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate

from peftkern.cli.training import Display

PLAIN_LINES = 20
PLAIN_SECONDS = 5.0
CURVE_SMOOTHING = 0.9


def _status(loss: float, per_second: float, unit: str) -> str:
    return f"loss {loss:.4f}  {per_second:,.0f} {unit}/s"


class _Lines:
    """A line of text for the first step, and every few, for logs; none is silent for long, however slow its steps."""

    def __init__(self, label: str, steps: int, unit: str) -> None:
        self.label, self.steps, self.unit = label, steps, unit
        self.every = max(1, steps // PLAIN_LINES)
        self.shown_at = -math.inf

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        late = time.monotonic() - self.shown_at >= PLAIN_SECONDS
        if late or step % self.every == 0 or step == self.steps:
            self.shown_at = time.monotonic()
            print(f"{self.label}: step {step}/{self.steps}  {_status(loss, tokens_per_second, self.unit)}", flush=True)


@contextmanager
def progress(label: str, steps: int, unit: str = "tokens") -> Iterator[Display]:
    """A progress bar on a terminal, lines otherwise."""
    if not (sys.stdout.isatty() and find_spec("rich")):
        yield _Lines(label, steps, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=steps, status="")

        class _Bar:
            def update(self, step: int, loss: float, tokens_per_second: float) -> None:
                bar.update(task, completed=step, status=_status(loss, tokens_per_second, unit))

        yield _Bar()


def loss_curve(curves: dict[str, list[float]]) -> bytes | None:
    """A PNG of the losses over steps, as they are and smoothed; None without matplotlib.

    Args:
        curves: one or two runs, each a name and its losses in nats per token.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would choose a window system and keep the figure.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, losses), color, line in zip(curves.items(), ("C0", "C1"), ("-", "--")):
        steps = range(1, len(losses) + 1)
        smooth = accumulate(losses, lambda mean, loss: CURVE_SMOOTHING * mean + (1 - CURVE_SMOOTHING) * loss)
        axes.plot(steps, losses, color=color, linestyle=line, alpha=0.3, linewidth=1)
        axes.plot(steps, list(smooth), color=color, linestyle=line, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def print_comparison(ours: dict, peer: dict) -> None:
    """Both runs side by side.

    Args:
        ours, peer: `tokens_per_second`, `final_loss`, `bits_per_byte_after`; the peer's `name` too.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("", "peftkern", peer["name"], "ratio", title="the same steps, data and first adapter")
    rows = {
        "tokens/s": ("tokens_per_second", ",.0f"),
        "loss, last steps": ("final_loss", ".4f"),
        "held-out bits per byte": ("bits_per_byte_after", ".4f"),
    }
    for label, (key, form) in rows.items():
        table.add_row(label, f"{ours[key]:{form}}", f"{peer[key]:{form}}", f"{ours[key] / peer[key]:.3f}")
    Console().print(table)
