"""The results of `peftkern compare` as a table, CSV, Markdown and a picture."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftkern.cli.measured import Measured
from peftkern.cli.tasks import Digits, Task

MIB = 2**20


@dataclass(frozen=True)
class Comparison:
    """Everything measured.

    Attributes:
        task: what was trained on.
        base_quality: before any training.
        rows: one per method, in the order they ran.
        failures: method -> why it has no row.
        conditions: settings, machine and versions.
    """

    task: Task
    base_quality: float
    rows: list[Measured]
    failures: dict[str, str]
    conditions: dict[str, Any]

    def columns(self) -> list[str]:
        """The table's headings."""
        old = ["old task, on"] if isinstance(self.task, Digits) else []
        return [
            "method",
            "trained",
            "%",
            "architecture",
            self.task.quality_name,
            "ms/step",
            "peak MiB",
            "training MiB",
            "file KiB",
            "inference",
            "merged",
            *old,
            "off = base",
        ]

    def cells(self, row: Measured) -> list[str]:
        """A row of the table."""
        old = [] if row.old_quality is None else [f"{row.old_quality:.3f}"]
        return [
            row.method,
            f"{row.trainable_parameters:,}",
            f"{100 * row.trainable_share:.2f}",
            "changed" if row.changes_architecture else "kept",
            f"{row.quality:.4f}",
            f"{1000 * row.step_seconds:.1f}",
            f"{row.peak_memory_bytes / MIB:,.0f}",
            f"{row.training_memory_bytes / MIB:,.0f}",
            f"{row.file_bytes / 1024:,.0f}",
            f"{row.latency:.2f}x",
            "-" if row.merged_latency is None else f"{row.merged_latency:.2f}x",
            *old,
            "bitwise" if row.base_unchanged else "CHANGED",
        ]


def show(found: Comparison) -> None:
    """Prints the table."""
    lines = [found.columns(), *(found.cells(row) for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
    for method, reason in found.failures.items():
        print(f"{method}: not measured: {reason}")


def write(found: Comparison, folder: Path) -> None:
    """compare.csv, compare.md and, with matplotlib, compare.png."""
    (folder / "compare.csv").write_text(_csv(found))
    (folder / "compare.md").write_text(_markdown(found))
    picture = _picture(found)
    if picture is None:
        print("no compare.png: matplotlib is not installed (pip install 'peftkern[bench]')")
    else:
        (folder / "compare.png").write_bytes(picture)


def _csv(found: Comparison) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(found.rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found.rows)
    return text.getvalue()


def _markdown(found: Comparison) -> str:
    columns = found.columns()
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *(found.cells(row) for row in found.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    better = "higher" if found.task.higher_is_better else "lower"
    notes = [
        f"{found.task.quality_name} of the base: {found.base_quality:.4f}; {better} is better.",
        "Memory: of the training process in all, and without what was there before the model was loaded. Inference: "
        "time over the base's, with the adapter beside it and merged. Off = base: outputs on the old task with the "
        "adapter off against those before training.",
        *(f"{method}: not measured: {reason}" for method, reason in found.failures.items()),
        ", ".join(f"{name} {value}" for name, value in found.conditions.items()),
    ]
    return "\n\n".join([table, *notes]) + "\n"


def _picture(found: Comparison) -> bytes | None:
    """A PNG: quality against training memory, and against time."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    sides = {
        "training memory (MiB)": lambda row: row.training_memory_bytes / MIB,
        "time of a step (ms)": lambda row: 1000 * row.step_seconds,
    }
    for axes, (label, value) in zip(figure.subplots(1, 2, sharey=True), sides.items()):
        for number, row in enumerate(found.rows):
            axes.scatter(value(row), row.quality, color=f"C{number % 10}", marker="os^D"[number // 10 % 4])
            axes.annotate(row.method, (value(row), row.quality), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.axhline(found.base_quality, color="gray", linestyle="--", linewidth=1, label="base")
        axes.set(xlabel=label, ylabel=found.task.quality_name)
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
