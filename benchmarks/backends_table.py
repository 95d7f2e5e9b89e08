"""What `benchmarks.backends` measured, as Markdown and as a picture.

`python -m benchmarks.backends_table [FILE.json] [--update docs/peft.md] [--plot PICTURE.png]`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.backends import LAYER, LAYER_ROWS, MODULE, OURS, STOCK
from benchmarks.plot import save
from benchmarks.table import RESULTS as OPS_RESULTS
from benchmarks.table import cell, grid, read_report, update

RESULTS = OPS_RESULTS.parent / "backends" / "speed.json"
# Stock's time over ours, at least, by tokens.
AIMS: dict[str, dict[int, float]] = {
    "QLoRA": {128: 1.6, 512: 1.25},
    "QLoRA, dropout 0.1": {128: 1.6, 512: 1.25},
    "QDoRA": {128: 5.0, 512: 2.5},
    "LoRA on bf16": {128: 1.1, 512: 1.05},
    "(IA)^3 on 4-bit": {128: 1.5, 512: 1.2},
    "generation, QLoRA": {128: 1.5, 512: 1.5},
    LAYER: {LAYER_ROWS: 3.0},
}
# torch names the backward of a custom op so; the time is that of what it calls.
_GENERATED = "GeneratedBackwardFor_"
Rows = list[dict[str, Any]]


def _by_contender(rows: Rows, **place: Any) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in rows if place.items() <= row.items()}


def _pair(rows: Rows, **place: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Stock's row and ours at a place, if both are there."""
    found = _by_contender(rows, **place)
    return (found[STOCK], found[OURS]) if found.keys() >= {STOCK, OURS} else None


def _ratio(rows: Rows, **place: Any) -> float | None:
    pair = _pair(rows, **place)
    return None if pair is None else pair[0]["median_ms"] / pair[1]["median_ms"]


def _speed(rows: Rows) -> str:
    threads = sorted({row["threads"] for row in rows})
    tokens = sorted({row["tokens"] for row in rows if row["case"] != LAYER})
    places = [(count, n) for count in tokens for n in threads]
    head = [f"{count} tokens, {n} thread{'s' * (n > 1)}" for count, n in places]
    lines = [("stock / peftkern", head)]
    for case in dict.fromkeys(row["case"] for row in rows if row["case"] != LAYER):
        ratios = [_ratio(rows, case=case, tokens=count, threads=n) for count, n in places]
        lines.append((case, [cell(ratio, AIMS[case].get(count)) for (count, _), ratio in zip(places, ratios)]))
    return grid(lines)


def _layer(rows: Rows) -> str:
    """The layer of who only installs the package, in a sentence."""
    parts = []
    for threads in sorted({row["threads"] for row in rows}):
        ratio = _ratio(rows, case=LAYER, threads=threads)
        if ratio is not None:
            parts.append(f"{cell(ratio, AIMS[LAYER][LAYER_ROWS])} on {threads} thread{'s' * (threads > 1)}")
    title = f"{LAYER}, {LAYER_ROWS} rows, for who only installs peftkern"
    return f"{title}: {', '.join(parts)}." if parts else ""


def _memory(rows: Rows) -> str:
    tokens = sorted({row["tokens"] for row in rows})
    lines = [("MB, peftkern / stock", [f"rise in a step of {count} tokens" for count in tokens] + ["peak"])]
    for case in dict.fromkeys(row["case"] for row in rows):
        pairs = [_pair(rows, case=case, tokens=count) for count in tokens]
        cells = [_megabytes(pair, "rise_bytes") for pair in pairs]
        lines.append((case, [*cells, _megabytes(pairs[-1], "peak_bytes")]))
    return grid(lines)


def _megabytes(pair: tuple[dict[str, Any], dict[str, Any]] | None, name: str) -> str:
    if pair is None:
        return ""
    stock, ours = (row[name] / 1e6 for row in pair)
    text = f"{ours:.0f} / {stock:.0f}"
    return f"**{text}**" if ours < stock else text


def _times(rows: Rows) -> str:
    lines = [("ms, median (quartiles)", ["tokens", "threads", "stock", "peftkern"])]
    for case, tokens, threads in dict.fromkeys((row["case"], row["tokens"], row["threads"]) for row in rows):
        pair = _pair(rows, case=case, tokens=tokens, threads=threads)
        if pair is not None:
            times = [f"{r['median_ms']:.4g} ({r['p25_ms']:.4g} - {r['p75_ms']:.4g})" for r in pair]
            lines.append((case, [str(tokens), str(threads), *times]))
    return grid(lines)


def _missed(rows: Rows) -> str:
    """Where our time goes in the rows below their aim."""
    lines = [("where peftkern's time goes", ["tokens", "threads", "share of the CPU time"])]
    for row in rows:
        case, tokens, threads = row["case"], row["tokens"], row["threads"]
        aim, ratio = AIMS[case].get(tokens), _ratio(rows, case=case, tokens=tokens, threads=threads)
        if row["contender"] == OURS and aim and ratio and ratio < aim and "profile" in row:
            shares = [f"{_op(name)} {share:.0%}" for name, share in row["profile"].items()]
            lines.append((case, [str(tokens), str(threads), ", ".join(shares)]))
    return grid(lines) if lines[1:] else ""


def _op(name: str) -> str:
    if name.startswith(_GENERATED):
        return f"`{name.removeprefix(_GENERATED).removesuffix('_default').replace('peftkern_', '')}` forward"
    return f"`{name.removeprefix('peftkern::').removeprefix('aten::')}`"


def markdown(report: dict[str, Any]) -> str:
    """Ratios with the aims beside, memory, and folded the times and where they go."""
    machine, rows, model = report["machine"], report["rows"], report["model"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    isas = ", ".join(sorted({row["isa"] for row in rows}))
    legend = (
        f"A Llama of {model['parameters'] / 1e6:.0f} M parameters ({model['layers']} layers of {model['hidden']}, "
        f"{model['vocabulary']:,} tokens), bf16, fp32 adapters of rank 16 on all linear layers, one sequence; a step "
        f"is forward, backward and AdamW. Generation is of {report['new_tokens']} tokens after a prompt, the adapter "
        "not merged. (IA)^3 runs in autocast, without which PEFT's layers fail in a bf16 model. Above 1 stock takes "
        "longer; in brackets what is aimed at, bold where it is met."
    )
    folded = [_times(rows), _missed(rows)]
    parts = [
        f"{machine['cpu']}, {isas}; {versions}. `{report['command']}`",
        legend,
        _speed(rows),
        _layer(rows),
        _memory(report["memory"]) if report["memory"] else "",
        "\n\n".join(["<details><summary>Times, and where they go</summary>", *filter(None, folded), "</details>"]),
    ]
    return "\n\n".join(part for part in parts if part)


def draw(report: dict[str, Any], path: Path) -> None:
    """Stock's time and memory beside ours, a pair of bars for each case and number of tokens, at one thread.

    Raises:
        SystemExit: nothing of both was measured at one thread.
    """
    from matplotlib.figure import Figure

    panels = (
        (
            "milliseconds",
            [row for row in report["rows"] if row["threads"] == 1 and row["case"] != LAYER],
            "median_ms",
            1.0,
        ),
        ("MB that a step rises by", report["memory"], "rise_bytes", 1e-6),
    )
    places = list(dict.fromkeys((row["case"], row["tokens"]) for row in panels[0][1]))
    if not places:
        raise SystemExit("benchmarks.backends_table: nothing was measured at one thread")
    figure = Figure(figsize=(12, 0.42 * len(places) + 1.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, rows, name, unit) in zip(axes, panels):
        for shift, contender, colour in ((-0.2, STOCK, "#b8b8b8"), (0.2, OURS, "#0b6e4f")):
            found = [_by_contender(rows, case=case, tokens=tokens).get(contender) for case, tokens in places]
            values = [0.0 if row is None else row[name] * unit for row in found]
            at = [i + shift for i in range(len(places))]
            bars = axis.barh(at, values, 0.38, color=colour, label=contender)
            axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
        axis.set(xlabel=label)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(places)), [f"{case}, {tokens} tokens" for case, tokens in places])
    axes[0].invert_yaxis()
    axes[0].legend(frameon=False, fontsize=9)
    millions = report["model"]["parameters"] / 1e6
    figure.suptitle(
        f"A training step, or 32 new tokens, of a Llama of {millions:.0f} M parameters; one thread", fontsize=11
    )
    save(figure, path)


def of_file(results: Path) -> str:
    """The tables of a file, or how to measure it where there is none yet.

    Raises:
        SystemExit: as `read_report`.
    """
    if not results.exists():
        return f"Not measured yet: `python -m {MODULE}`."
    return markdown(read_report(results))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends_table", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, metavar="FILE.json")
    parser.add_argument("--update", type=Path, metavar="FILE.md", help="write between the marks for results")
    parser.add_argument("--plot", type=Path, metavar="PICTURE.png", help="draw them")
    args = parser.parse_args(argv)
    text = of_file(args.results)
    if args.plot is not None:
        draw(read_report(args.results), args.plot)
    if args.update is None:
        print(text)
    else:
        update(args.update, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
