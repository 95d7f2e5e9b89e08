"""Draws results: `python -m benchmarks.plot [FILE.json [PICTURE.png]]`. Time against rows, with the machine's floor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS

PANELS = (
    ("nf4_linear forward", "forward"),
    ("nf4_linear forward+backward", "training step"),
    ("lora_linear nf4 forward+backward", "LoRA (rank 16) training step"),
)
COLOURS = ("#0b6e4f", "#c1440e", "#5b6c8f", "#8f6b8f")


def draw(report: dict[str, Any], path: Path, shape: tuple[int, int], threads: int) -> None:
    """One panel a case: milliseconds against rows on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 4), constrained_layout=True)
    for axis, (case, title) in zip(axes, PANELS):
        rows = [
            row
            for row in report["rows"]
            if row["case"] == case and tuple(row["shape"]) == shape and row["threads"] == threads and not row["cached"]
        ]
        names = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != "peftkern nf4_linear"))
        for name, colour in zip(names, COLOURS):
            points = sorted((row["rows"], row["median_ms"]) for row in rows if row["contender"] == name)
            width = 2.2 if name == "peftkern" else 1.3
            axis.plot(*zip(*points), marker="o", markersize=4, color=colour, linewidth=width, label=name)
        floor = sorted({(row["rows"], row["floor_ms"]) for row in rows})
        if floor:
            axis.plot(*zip(*floor), color="#999999", linestyle="--", linewidth=1, label="floor of this machine")
        axis.set(xscale="log", yscale="log", xlabel="rows (tokens)", ylabel="milliseconds", title=title)
        axis.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    word = "thread" if threads == 1 else "threads"
    figure.suptitle(f"NF4 {shape[0]} x {shape[1]}, bf16, {threads} {word}, {report['machine']['cpu']}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    source = Path(arguments[0]) if arguments else RESULTS
    report = json.loads(source.read_text())
    first = report["rows"][0]
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    draw(report, target, tuple(first["shape"]), first["threads"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
