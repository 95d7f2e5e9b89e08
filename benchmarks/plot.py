"""Draws results: `python -m benchmarks.plot [FILE.json [PICTURE.png]]`. Time against rows, with the machine's floor."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, Place, read_report

PANELS = (
    ("nf4_linear forward", "NF4, forward"),
    ("nf4_linear forward+backward", "NF4, training step"),
    ("lora_linear nf4 forward+backward", "LoRA (rank 16) on NF4, training step"),
    ("dora_linear nf4 forward+backward", "DoRA (rank 16) on NF4, training step"),
    ("ia3_linear nf4 forward+backward", "(IA)$^3$ on NF4, training step"),
    ("lora_mlp nf4 forward+backward", "lora_mlp on NF4, training step"),
    ("lora_qkv nf4 forward+backward", "lora_qkv on NF4, training step"),
    ("bottleneck_adapter forward+backward", "bottleneck_adapter, training step"),
    ("prefix_attention forward+backward", "prefix_attention (length 16), training step"),
)
COLUMNS = 3
COLOURS = ("#0b6e4f", "#c1440e", "#5b6c8f", "#8f6b8f", "#c9a227", "#444444", "#2e86ab")


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
    place = min(Place.of(row) for row in report["rows"])
    rows = [r for r in report["rows"] if Place.of(r) == place and r["contender"] != "peftkern nf4_linear"]
    panels = [(title, [row for row in rows if row["case"] == case]) for case, title in PANELS]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        raise SystemExit(f"benchmarks.plot: {place}: none of {', '.join(case for case, _ in PANELS)} was measured")
    draw_panels(panels, f"{place}, bf16; {report['machine']['cpu']}", path)


def draw_panels(panels: list[tuple[str, list[dict[str, Any]]]], title: str, path: Path) -> None:
    """A picture of (title, rows) side by side, written whole or not at all."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    # Not pyplot: it would choose a window system and keep the figure.
    figure = Figure(figsize=(4.2 * columns, 3.8 * lines), dpi=130, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (name, rows) in zip(axes, panels):
        _draw_panel(axis, rows, name)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a picture whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

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
