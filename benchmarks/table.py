"""Results as Markdown, targets beside them: `python -m benchmarks.table [benchmarks/results/FILE.json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "speed.json"

# (title, case, ours, peer, {rows: least ratio peer / ours}); the ratio of the last line is ours / peer, at most.
TARGETS: list[tuple[str, str, str, dict[int, float]]] = [
    (
        "`nf4_linear` forward / bitsandbytes eval",
        "nf4_linear forward",
        "bitsandbytes eval",
        {1: 1.2, 4: 1.2, 16: 1.1, 64: 1.15, 256: 1.35, 1024: 1.35},
    ),
    (
        "`nf4_linear` forward / dense bf16",
        "nf4_linear forward",
        "torch dense bfloat16",
        {1: 4.0, 4: 3.0, 16: 1.4, 64: 1.0, 256: 0.95, 1024: 0.95},
    ),
    (
        "`nf4_linear` training step / bitsandbytes",
        "nf4_linear forward+backward",
        "bitsandbytes train",
        {16: 8.0, 64: 3.5, 256: 1.7, 1024: 1.15},
    ),
    (
        "`lora_linear` on NF4, training step / PEFT + bitsandbytes",
        "lora_linear nf4 forward+backward",
        "PEFT + bitsandbytes",
        {16: 6.0, 64: 3.5, 256: 1.7, 1024: 1.25},
    ),
    (
        "the same, dropout 0.1",
        "lora_linear nf4 forward+backward dropout 0.1",
        "PEFT + bitsandbytes",
        {16: 6.0, 64: 3.5, 256: 1.7, 1024: 1.25},
    ),
    (
        "`lora_linear` on dense bf16, training step / PEFT",
        "lora_linear dense forward+backward",
        "PEFT",
        {16: 1.05, 64: 1.1, 256: 1.1, 1024: 1.1},
    ),
    ("`nf4_linear` fp32 forward / dense fp32", "nf4_linear forward fp32", "torch dense float32", {256: 1.8}),
]
OVERHEAD = {16: 1.25, 64: 1.12, 256: 1.08, 1024: 1.08}
ROWS = (1, 4, 16, 64, 256, 1024)

Key = tuple[str, str, int, int, tuple[int, int]]


def medians(report: dict[str, Any]) -> dict[Key, float]:
    """(case, contender, rows, threads, shape) -> ms, of the runs that caches do not help."""
    rows = [row for row in report["rows"] if not row["cached"]]
    return {
        (row["case"], row["contender"], row["rows"], row["threads"], tuple(row["shape"])): row["median_ms"]
        for row in rows
    }


def _cell(ratio: float | None, target: float | None, at_most: bool = False) -> str:
    if ratio is None:
        return ""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
    if target is None:
        return text
    met = ratio <= target if at_most else ratio >= target
    return f"{'**' + text + '**' if met else text} ({target:g})"


def _line(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def tables(report: dict[str, Any]) -> str:
    """One table for each shape and number of threads; bold where the target (in brackets) is met."""
    times = medians(report)
    places = sorted({(key[4], key[3]) for key in times})
    sections = []
    for shape, threads in places:

        def ms(case: str, contender: str, rows: int, place: tuple[Any, int] = (shape, threads)) -> float | None:
            return times.get((case, contender, rows, place[1], place[0]))

        word = "thread" if threads == 1 else "threads"
        lines = [f"**{shape[0]} x {shape[1]}, {threads} {word}** (times faster than the peer)", ""]
        lines += [_line("rows", [str(rows) for rows in ROWS]), "|---|" + "---|" * len(ROWS)]
        for title, case, peer, targets in TARGETS:
            cells = []
            for rows in ROWS:
                ours, theirs = ms(case, "peftkern", rows), ms(case, peer, rows)
                cells.append(_cell(theirs / ours if ours and theirs else None, targets.get(rows)))
            if any(cells):
                lines.append(_line(title, cells))
        for title, case in (
            ("cost of `lora_linear` over `nf4_linear`, at most", "lora_linear nf4 forward+backward"),
            ("the same, dropout 0.1", "lora_linear nf4 forward+backward dropout 0.1"),
        ):
            cells = []
            for rows in ROWS:
                ours, base = ms(case, "peftkern", rows), ms(case, "peftkern nf4_linear", rows)
                cells.append(_cell(ours / base if ours and base else None, OVERHEAD.get(rows), at_most=True))
            if any(cells):
                lines.append(_line(title, cells))
        cells = [f"{value:.3g}" if (value := ms("nf4_linear forward", "peftkern", rows)) else "" for rows in ROWS]
        lines.append(_line("`nf4_linear` forward, ms", cells))
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0]) if arguments else RESULTS
    report = json.loads(path.read_text())
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    print(f"{machine['cpu']} ({', '.join(machine['isas'])}); {versions}. `{report['command']}`\n")
    print(tables(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
