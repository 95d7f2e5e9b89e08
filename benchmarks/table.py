"""Results as Markdown, targets beside them: `python -m benchmarks.table [FILE.json] [--update README.md]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "speed.json"
METHODS_RESULTS = RESULTS.parent / "methods" / "speed.json"
# Read too if it lies beside the results.
MEMORY_NAME = "memory.json"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


class Comparison(NamedTuple):
    """A line of the table: a peer's time over ours, and the least that is aimed at, by rows."""

    title: str
    case: str
    peer: str
    targets: dict[int, float]


_LORA_TARGETS = {16: 6.0, 64: 3.5, 256: 1.7, 1024: 1.25}
COMPARISONS = (
    Comparison(
        "`nf4_linear` forward / bitsandbytes eval",
        "nf4_linear forward",
        "bitsandbytes eval",
        {1: 1.2, 4: 1.2, 16: 1.1, 64: 1.15, 256: 1.35, 1024: 1.35},
    ),
    Comparison(
        "`nf4_linear` forward / dense bf16",
        "nf4_linear forward",
        "torch dense bfloat16",
        {1: 4.0, 4: 3.0, 16: 1.4, 64: 1.0, 256: 0.95, 1024: 0.95},
    ),
    Comparison(
        "`nf4_linear` training step / bitsandbytes",
        "nf4_linear forward+backward",
        "bitsandbytes train",
        {16: 8.0, 64: 3.5, 256: 1.7, 1024: 1.15},
    ),
    Comparison(
        "`lora_linear` on NF4, training step / PEFT + bitsandbytes",
        "lora_linear nf4 forward+backward",
        "PEFT + bitsandbytes",
        _LORA_TARGETS,
    ),
    Comparison(
        "the same, dropout 0.1",
        "lora_linear nf4 forward+backward dropout 0.1",
        "PEFT + bitsandbytes",
        _LORA_TARGETS,
    ),
    Comparison(
        "`lora_linear` on dense bf16, training step / PEFT",
        "lora_linear dense forward+backward",
        "PEFT",
        {16: 1.05, 64: 1.1, 256: 1.1, 1024: 1.1},
    ),
    Comparison("`nf4_linear` fp32 forward / dense fp32", "nf4_linear forward fp32", "torch dense float32", {256: 1.8}),
    Comparison(
        "`dora_linear` on NF4, training step / PEFT + bitsandbytes",
        "dora_linear nf4 forward+backward",
        "PEFT + bitsandbytes",
        {16: 20.0, 256: 6.0},
    ),
    Comparison(
        "`dora_linear` on dense bf16, training step / PEFT",
        "dora_linear dense forward+backward",
        "PEFT",
        {16: 20.0, 256: 6.0},
    ),
    Comparison(
        "`ia3_linear` on NF4, training step / PEFT + bitsandbytes",
        "ia3_linear nf4 forward+backward",
        "PEFT + bitsandbytes",
        {16: 5.0, 256: 1.5},
    ),
    Comparison(
        "`bottleneck_adapter`, training step / torch eager",
        "bottleneck_adapter forward+backward",
        "torch eager",
        {16: 1.5, 256: 1.5, 1024: 1.5},
    ),
    Comparison(
        "`lora_qkv` on NF4, training step / separate `lora_linear`",
        "lora_qkv nf4 forward+backward",
        "peftkern lora_linear",
        {16: 1.1, 256: 1.1},
    ),
    Comparison(
        "`lora_mlp` on NF4, training step / separate `lora_linear`",
        "lora_mlp nf4 forward+backward",
        "peftkern lora_linear",
        {16: 1.1, 256: 1.1},
    ),
    Comparison(
        "`prefix_attention` forward / concatenated",
        "prefix_attention forward",
        "torch concatenated",
        {1: 1.0, 16: 1.0, 256: 1.0},
    ),
    Comparison(
        "`prefix_attention` training step / concatenated",
        "prefix_attention forward+backward",
        "torch concatenated",
        {16: 1.0, 256: 1.0},
    ),
    Comparison(
        "`prefix_attention` not causal, forward / concatenated",
        "prefix_attention encoder forward",
        "torch concatenated",
        {16: 1.0, 256: 1.0},
    ),
    Comparison(
        "`prefix_attention` not causal, training step / concatenated",
        "prefix_attention encoder forward+backward",
        "torch concatenated",
        {16: 1.0, 256: 1.0},
    ),
)
# The cost of an adapter: our time over that of our other op, and the most that is aimed at.
_LORA_COST = {16: 1.25, 64: 1.12, 256: 1.08, 1024: 1.08}
OVERHEADS = (
    Comparison(
        "cost of `lora_linear` over `nf4_linear`, training step, at most",
        "lora_linear nf4 forward+backward",
        "peftkern nf4_linear",
        _LORA_COST,
    ),
    Comparison(
        "the same, dropout 0.1",
        "lora_linear nf4 forward+backward dropout 0.1",
        "peftkern nf4_linear",
        _LORA_COST,
    ),
    Comparison(
        "cost of `dora_linear` over `lora_linear` on NF4, at most",
        "dora_linear nf4 forward+backward",
        "peftkern lora_linear",
        {16: 1.6, 256: 1.15},
    ),
    Comparison(
        "cost of `dora_linear` over `lora_linear` on dense bf16, at most",
        "dora_linear dense forward+backward",
        "peftkern lora_linear",
        {16: 1.6, 256: 1.15},
    ),
    Comparison(
        "cost of `ia3_linear` over `nf4_linear`, at most",
        "ia3_linear nf4 forward+backward",
        "peftkern nf4_linear",
        {256: 1.03},
    ),
)
TIMES = (
    ("`nf4_linear` forward", "nf4_linear forward"),
    ("`lora_linear` on NF4, training step", "lora_linear nf4 forward+backward"),
)
# Cases without rows, told in a sentence: case -> peer.
ROWLESS = {
    "nf4_quantize": "bitsandbytes",
    "nf4_dequantize": "bitsandbytes",
    "dora_norm nf4": "torch dense bfloat16",
    "prompt_embedding forward+backward": "torch",
}
LEGEND = (
    "Ratios are times: above 1 the peer takes longer. In brackets what is aimed at, bold where it is met. "
    "A training step is forward and backward; rank 16, fp32 adapters."
)


def read_report(path: Path) -> dict[str, Any]:
    """What `benchmarks.run` wrote.

    Raises:
        SystemExit: one line on a file that is missing or something else.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks: {path}: {error}") from error
    if not isinstance(report, dict) or not report.get("rows") or "machine" not in report:
        raise SystemExit(f"benchmarks: {path} must hold the machine and rows that benchmarks.run writes")
    return report


def _where(shape: Sequence[int], threads: int) -> str:
    return f"{shape[0]} x {shape[1]}, {threads} thread{'s' * (threads > 1)}"


class Place(NamedTuple):
    """What one table is about; the order is that of the tables."""

    cached: bool
    shape: tuple[int, int]
    threads: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Place:
        return cls(row["cached"], tuple(row["shape"]), row["threads"])

    def __str__(self) -> str:
        return _where(self.shape, self.threads) + ", weights in cache" * self.cached


def _cell(ratio: float | None, target: float | None, at_most: bool = False) -> str:
    if ratio is None:
        return ""
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
    if target is None:
        return text
    met = ratio <= target if at_most else ratio >= target
    return f"{'**' + text + '**' if met else text} ({target:g})"


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _lines(rows: list[dict[str, Any]], counts: list[int], with_targets: bool) -> list[tuple[str, list[str]]]:
    """Title and cells of each line of one place."""
    times = {(row["case"], row["contender"], row["rows"]): row["median_ms"] for row in rows}
    floors = {(row["case"], row["rows"]): row["floor_ms"] for row in rows}

    def ours(case: str, count: int) -> float | None:
        return times.get((case, "peftkern", count))

    def target(targets: dict[int, float], count: int) -> float | None:
        return targets.get(count) if with_targets else None

    lines = []
    for title, case, peer, targets in COMPARISONS:
        ratios = [_ratio(times.get((case, peer, n)), ours(case, n)) for n in counts]
        lines.append((title, [_cell(ratio, target(targets, n)) for n, ratio in zip(counts, ratios)]))
    for title, case, base, targets in OVERHEADS:
        ratios = [_ratio(ours(case, n), times.get((case, base, n))) for n in counts]
        cells = [_cell(ratio, target(targets, n), at_most=True) for n, ratio in zip(counts, ratios)]
        lines.append((title, cells))
    for title, case in TIMES:
        milliseconds = [ours(case, n) for n in counts]
        lines.append((f"{title}, ms", ["" if ms is None else f"{ms:.3g}" for ms in milliseconds]))
        shares = [_ratio(floors.get((case, n)), ms) for n, ms in zip(counts, milliseconds)]
        lines.append((f"{title}, share of the machine's limit", ["" if s is None else f"{s:.0%}" for s in shares]))
    return [line for line in lines if any(line[1])]


def _grid(lines: list[tuple[str, list[str]]]) -> str:
    """Titles and cells as a Markdown table; the first line is the head."""
    text = [f"| {title} | {' | '.join(cells)} |" for title, cells in lines]
    return "\n".join([text[0], "|---|" + "---|" * len(lines[0][1]), *text[1:]])


def _rowless(rows: list[dict[str, Any]]) -> str:
    """A sentence on the cases without rows."""
    times = {(row["case"], row["contender"]): row["median_ms"] for row in rows}
    parts = []
    for case, name in ROWLESS.items():
        ours, peer = times.get((case, "peftkern")), times.get((case, name))
        if ours is not None:
            beside = "" if peer is None else f" ({name} {peer:.3g} ms, {_cell(peer / ours, None)} times as long)"
            parts.append(f"`{case}` {ours:.3g} ms{beside}")
    return "; ".join(parts) + "." if parts else ""


def _table(place: Place, rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["rows"] for row in rows if row["rows"]})
    lines = [("rows", [str(n) for n in counts]), *_lines(rows, counts, with_targets=not place.cached)]
    parts = [f"**{place}**", _grid(lines) if counts else "", _rowless(rows)]
    return "\n\n".join(part for part in parts if part)


def _memory_table(rows: list[dict[str, Any]]) -> str:
    """What `benchmarks.memory` measured, in MB."""
    counts = sorted({row["rows"] for row in rows})
    extra = {(tuple(r["shape"]), r["threads"], r["contender"], r["rows"]): r["extra_bytes"] for r in rows}
    lines = [("rows", [str(n) for n in counts])]
    for shape, threads, contender in sorted(dict.fromkeys(key[:3] for key in extra), key=lambda key: key[:2]):
        found = [extra.get((shape, threads, contender, n)) for n in counts]
        cells = ["" if value is None else f"{value / 1e6:.1f}" for value in found]
        lines.append((f"{_where(shape, threads)}: {contender}", cells))
    title = "**Extra memory of a training step of `lora_linear` on NF4, MB**"
    return f"{title}: beyond y, dx, the saved x A^T and the gradients; dropout 0.1.\n\n" + _grid(lines)


def of_files(results: Path) -> str:
    """The tables of the results, and of the memory measured beside them.

    Raises:
        SystemExit: as `read_report`.
    """
    memory = results.with_name(MEMORY_NAME)
    text = markdown(read_report(results))
    return f"{text}\n\n{_memory_table(read_report(memory)['rows'])}" if memory.exists() else text


def markdown(report: dict[str, Any]) -> str:
    """One table for each shape and number of threads, the first in sight and the others folded."""
    machine, rows = report["machine"], report["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    isas = ", ".join(sorted({row["isa"] for row in rows}))
    head = f"{machine['cpu']}, {isas}; {versions}. `{report['command']}`"
    places = sorted({Place.of(row) for row in rows})
    tables = [_table(place, [row for row in rows if Place.of(row) == place]) for place in places]
    folded = ["<details><summary>More shapes and threads</summary>", *tables[1:], "</details>"] if tables[1:] else []
    return "\n\n".join([head, LEGEND, tables[0], *folded])


def missed(report: dict[str, Any]) -> str:
    """The comparisons below their target: by how much, and the most that the machine's limit would allow."""
    rows = {
        (Place.of(row), row["case"], row["contender"], row["rows"]): row
        for row in report["rows"]
        if not row["cached"] and row["rows"]
    }
    lines = [("", ["rows", "ratio", "wanted", "possible", "share of the limit"])]
    for place in sorted({key[0] for key in rows}):
        for title, case, peer, targets in COMPARISONS:
            for count, target in targets.items():
                ours, theirs = (rows.get((place, case, name, count)) for name in ("peftkern", peer))
                if ours is None or theirs is None or theirs["median_ms"] / ours["median_ms"] >= target:
                    continue
                ratio, possible = (theirs["median_ms"] / ours[key] for key in ("median_ms", "floor_ms"))
                cells = [str(count), f"{ratio:.2f}", f"{target:g}", f"{possible:.2f}", f"{ratio / possible:.0%}"]
                name = title if title != "the same, dropout 0.1" else "`lora_linear` on NF4, dropout 0.1"
                lines.append((f"{place}: {name}", cells))
    return _grid(lines)


def shown(document: str) -> tuple[int, int]:
    """Where the results begin and end in a document.

    Raises:
        SystemExit: the document has no place for them.
    """
    begin, end = document.find(BEGIN), document.find(END)
    if begin < 0 or end < begin:
        raise SystemExit(f"benchmarks.table: the document must have {BEGIN} and {END}, in this order")
    return begin + len(BEGIN), end


def update(path: Path, text: str) -> None:
    """Puts `text` between the marks of a document, in place of what is there."""
    document = path.read_text()
    begin, end = shown(document)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(f"{document[:begin]}\n{text}\n{document[end:]}")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, metavar="FILE.json")
    parser.add_argument("--missed", action="store_true", help="the targets that are missed instead")
    parser.add_argument("--update", type=Path, metavar="FILE.md", help=f"write between {BEGIN} and {END}")
    args = parser.parse_args(argv)
    text = missed(read_report(args.results)) if args.missed else of_files(args.results)
    if args.update is None:
        print(text)
    else:
        update(args.update, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
