"""docs/gpu-status.md from the committed reports of GPUs: `python -m benchmarks.gpu_status --update docs/gpu-status.md`.

What no report shows is an open row, never a claim.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_timing import DEQUANTIZED
from benchmarks.run import ROOT
from benchmarks.table import update

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
OURS = ("triton", "cuda")
FLOOR = "floor"
STEMS = (
    *("nf4_quantize", "nf4_dequantize", "nf4_linear", "lora_linear", "dora_linear", "ia3_linear"),
    *("bottleneck_adapter", "prompt_embedding", "prefix_attention", "lora_qkv", "lora_mlp"),
)
LLAMA = ((4096, 4096), (14336, 4096))


class Target(NamedTuple):
    """Peers' time over ours that is aimed at: of the fastest peer, as a geometric mean over shapes and rows.

    The peer FLOOR is the least time that bytes and operations take at the measured ceilings; DEQUANTIZED is the
    backend's own nf4_dequantize and a product in bf16. Where a peer was not timed the row is open.
    """

    title: str
    case: str
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    peers: tuple[Any, ...]
    aim: float


_LORA, _DROPOUT = "lora_linear dense forward+backward", "lora_linear dense forward+backward dropout 0.1"
_DORA, _DECODE = "dora_linear dense forward+backward", (1, 2, 4, 8)
_SQUARE, _SMALL = ((4096, 4096),), ((2048, 2048),)
TARGETS = (
    Target("LoRA step, 4096 x 4096, 8192 rows / PEFT", _LORA, _SQUARE, (8192,), ("PEFT",), 1.2),
    Target("LoRA step, 2048 x 2048, 8192 rows / PEFT", _LORA, _SMALL, (8192,), ("PEFT",), 1.4),
    Target("the same with dropout 0.1, 4096 x 4096", _DROPOUT, _SQUARE, (8192,), ("PEFT",), 1.3),
    Target("the same with dropout 0.1, 2048 x 2048", _DROPOUT, _SMALL, (8192,), ("PEFT",), 1.5),
    Target(
        "QLoRA step, 4096 x 4096, 8192 rows / PEFT + bitsandbytes",
        "lora_linear nf4 forward+backward",
        _SQUARE,
        (8192,),
        ("PEFT + bitsandbytes",),
        1.3,
    ),
    Target("DoRA step / PEFT", _DORA, _SQUARE, (8192,), ("PEFT",), 1.8),
    Target("our LoRA step / DoRA step", _DORA, _SQUARE, (8192,), ("peftkern lora_linear",), 0.926),
    Target("DoRA norm refresh / dense route", "dora_norm nf4", _SQUARE, (0,), ("torch dense bfloat16",), 3.0),
    Target("nested dequantisation / bitsandbytes", "nf4_dequantize", LLAMA, (0,), ("bitsandbytes",), 1.8),
    Target("nested dequantisation, share of copy bandwidth", "nf4_dequantize", LLAMA, (0,), (FLOOR,), 0.85),
    Target("decode, 1 to 8 rows / bitsandbytes", "nf4_linear forward", LLAMA, _DECODE, ("bitsandbytes eval",), 1.15),
    Target("decode, 1 to 8 rows, share of copy bandwidth", "nf4_linear forward", LLAMA, _DECODE, (FLOOR,), 0.8),
    *(
        Target(
            f"NF4 GEMM, {rows} rows / the better of bitsandbytes and dequantise + cuBLAS",
            "nf4_linear forward",
            LLAMA,
            (rows,),
            ("bitsandbytes eval", DEQUANTIZED),
            aim,
        )
        for rows, aim in {64: 2.5, 128: 2.0, 256: 1.4, 512: 1.15, 1024: 0.97, 8192: 0.97}.items()
    ),
)


def measured(report: dict[str, Any], target: Target) -> float | None:
    """The geometric mean of the target's ratios; None where the report lacks one."""
    found = {}
    for step in report["steps"]:
        for row in step.get("result", {}).get("rows", ()):
            if "median_ms" in row:
                key = row["case"], tuple(row["shape"]), row["rows"]
                found.setdefault(key, {})[row["contender"], row["backend"]] = row
    ratios = []
    for shape in target.shapes:
        for rows in target.rows:
            timed = found.get((target.case, shape, rows), {})
            ours = [timed["peftkern", backend] for backend in OURS if ("peftkern", backend) in timed]
            if not ours:
                return None
            best = min(ours, key=lambda row: row["median_ms"])
            peers = [_peer_ms(timed, best, peer) for peer in target.peers]
            known = [each for each in peers if each is not None]
            if len(known) < len(peers):
                return None
            ratios.append(min(known) / best["median_ms"])
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _peer_ms(timed: dict[tuple[str, str | None], Any], best: dict[str, Any], peer: Any) -> float | None:
    if peer == FLOOR:
        return best["floor_ms"]
    # Another op of ours is compared on the same backend.
    for key in [peer] if isinstance(peer, tuple) else [(peer, None), (peer, best["backend"])]:
        if key in timed:
            return timed[key]["median_ms"]
    return None


def errors(report: dict[str, Any], op: str, backend: str) -> str | None:
    """What the comparison with float64 found: the worst error by dtype, or what is wrong; None: it has not run."""
    rows = [
        row
        for step in report["steps"]
        if step["step"].startswith("errors")
        for row in step.get("result", {}).get("rows", ())
        if row["op"] == op and row["backend"] == backend and "error" in row
    ]
    if not rows:
        return None
    if wrong := [row for row in rows if not (row["right"] and row["repeats"])]:
        return f"**wrong** in {len(wrong)} of {len(rows)} checks"
    worst = max(row["error"] for row in rows if row["dtype"] == "bfloat16")
    return f"right, bf16 error {worst:.1e}"


def kernels(op: str, backend: str) -> bool:
    """Whether this repository has some."""
    if backend == "triton":
        return (ROOT / "peftkern" / "ops" / f"{op}_triton.py").exists()
    return any((ROOT / "csrc" / "cuda").glob(f"{op}*.cu"))


def table(report: dict[str, Any]) -> str:
    """One report as Markdown: each op's state, then the targets."""
    return "\n\n".join([_heading(report), _states([report]), _targets([report])])


def status(reports: Sequence[dict[str, Any]]) -> str:
    """All reports as Markdown."""
    headings = [_heading(report) for report in reports] or ["No kernel here has run on a GPU yet."]
    return "\n\n".join([*headings, _states(reports), _targets(reports)])


def _heading(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items() if version)
    failed = [f"{step['step']} ({step['status']})" for step in report["steps"] if step["status"] != 0]
    states = f"Steps that failed: {', '.join(failed)}." if failed else "Every step passed."
    return f"{report['gpu']['name']}, CUDA {report['gpu']['cuda']}, {versions}, commit {report['commit']}. {states}"


def _states(reports: Sequence[dict[str, Any]]) -> str:
    lines = ["| op | Triton | CUDA C++ |", "|---|---|---|"]
    for op in STEMS:
        cells = []
        for backend in OURS:
            if not kernels(op, backend):
                cells.append("no kernel")
                continue
            ran = [f"{r['gpu']['name']}: {found}" for r in reports if (found := errors(r, op, backend))]
            cells.append("; ".join(ran) or "never run on a GPU")
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _targets(reports: Sequence[dict[str, Any]]) -> str:
    names = [report["gpu"]["name"] for report in reports] or ["measured"]
    lines = [f"| peer's time over ours | aim | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for target in TARGETS:
        found = [measured(report, target) for report in reports] or [None]
        cells = ["open" if ratio is None else _cell(ratio, target.aim) for ratio in found]
        lines.append(f"| {target.title} | {target.aim:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(ratio: float, aim: float) -> str:
    return f"**{ratio:.2f}**" if ratio >= aim else f"{ratio:.2f}"


def committed() -> list[dict[str, Any]]:
    """The reports under benchmarks/results/gpu/, by name."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_status", description=__doc__)
    parser.add_argument("--update", type=Path, default=None, metavar="FILE.md", help="between its marks; else printed")
    args = parser.parse_args(argv)
    text = status(committed())
    if args.update is None:
        print(text)
    else:
        update(args.update, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
