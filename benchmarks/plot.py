"""Draws results: `python -m benchmarks.plot [FILE.json [PICTURE.png]]`. Time against rows, with the machine's floor."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, Place, read_report

PANELS = (
    ("nf4_linear forward", "forward"),
    ("nf4_linear forward+backward", "training step"),
    ("lora_linear nf4 forward+backward", "LoRA (rank 16) training step"),
)
COLOURS = ("#0b6e4f", "#c1440e", "#5b6c8f", "#8f6b8f")


def _draw_panel(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Milliseconds against rows on logarithmic axes, a line for each contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for name, colour in zip(names, COLOURS):
        points = sorted((row["rows"], row["median_ms"]) for row in rows if row["contender"] == name)
        width = 2.2 if name == "peftkern" else 1.3
        axis.plot(*zip(*points), marker="o", markersize=4, color=colour, linewidth=width, label=name)
    floor = sorted({(row["rows"], row["floor_ms"]) for row in rows})
    axis.plot(*zip(*floor), color="#999999", linestyle="--", linewidth=1, label="floor of this machine")
    axis.set(xscale="log", yscale="log", xlabel="rows (tokens)", ylabel="milliseconds", title=title)
    counts = [count for count, _ in floor]
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def draw(report: dict[str, Any], path: Path) -> None:
    """A panel for each case that was measured at the first shape and number of threads.

    Raises:
        SystemExit: none was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    place = min(Place.of(row) for row in report["rows"])
    rows = [r for r in report["rows"] if Place.of(r) == place and r["contender"] != "peftkern nf4_linear"]
    panels = [(title, [row for row in rows if row["case"] == case]) for case, title in PANELS]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        raise SystemExit(f"benchmarks.plot: {place}: none of {', '.join(case for case, _ in PANELS)} was measured")
    # Not pyplot: it would choose a window system and keep the figure.
    figure = Figure(figsize=(4.2 * len(panels), 4), dpi=130, layout="constrained")
    for axis, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _draw_panel(axis, found, title)
    figure.suptitle(f"NF4 {place}, bf16; {report['machine']['cpu']}", fontsize=11)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, metavar="FILE.json")
    parser.add_argument("picture", nargs="?", type=Path, default=None, metavar="PICTURE.png")
    args = parser.parse_args(argv)
    draw(read_report(args.results), args.picture or args.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
