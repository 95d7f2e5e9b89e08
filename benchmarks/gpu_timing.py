"""Times the ops on a GPU under each backend, their peers beside them: `python -m benchmarks.gpu_timing`.

The cases and contenders are those of benchmarks/run.py, made on the GPU. A contender's calls are captured in a graph,
so that the host's time does not count; where capture fails they are queued one by one, and the row says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.run import shape_list, write_report
from peftkern.bench.cases import CASES, ROWLESS, contenders, work
from peftkern.bench.contenders import nf4_linear, normal, rotate
from peftkern.bench.measure import ROTATED_BYTES, Run, summary
from peftkern.nn import NF4Linear

BACKENDS = ("triton", "cuda", "reference")
CALLS, ROUNDS, WARM_UP = 20, 30, 3
DEQUANTIZED = "peftkern dequantize + matmul"  # once for each backend's nf4_dequantize
COPY_BYTES, MATMUL_SIZE = 2 * 2**30, 8192

Measure = Callable[[], float]


@contextmanager
def backend_of(name: str) -> Iterator[None]:
    """Our ops run on this backend, or raise."""
    before = os.environ.get("PEFTKERN_BACKEND")
    os.environ["PEFTKERN_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("PEFTKERN_BACKEND")
        if before is not None:
            os.environ["PEFTKERN_BACKEND"] = before


def on_gpu(run: Run, calls: int) -> tuple[Measure, str]:
    """A function that takes the seconds of one call, and whether of a graph or of queued calls ("events")."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(WARM_UP):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(calls):
                run(i)
        replay, how = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()

        def replay() -> None:
            for i in range(calls):
                run(i)

        how = "events"
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return measure, how


def on_cpu(run: Run, calls: int) -> tuple[Measure, str]:
    """The same by the clock: what the program itself is tested with."""

    def measure() -> float:
        begin = time.perf_counter()
        for i in range(calls):
            run(i)
        return (time.perf_counter() - begin) / calls

    return measure, "clock"


def ceilings(device: str, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE) -> dict[str, float]:
    """Bytes and bf16 operations per second: a copy, counted read and written, and a large product."""
    prepare = on_gpu if device == "cuda" else on_cpu
    with torch.device(device):
        source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8)
        target = torch.empty_like(source)
        left, right = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
        copied, _ = prepare(lambda _: target.copy_(source), 2)
        multiplied, _ = prepare(lambda _: left @ right, 2)
    return {
        "copy_bandwidth": 2 * copy_bytes / min(copied() for _ in range(5)),
        "bf16_flops": 2 * size**3 / min(multiplied() for _ in range(5)),
    }


def dequantized(shape: tuple[int, int], rows: int, rotated: int) -> Run:
    """What a fused NF4 product must beat: the weight dequantised in bf16, then the library's product."""
    x = normal(torch.Generator().manual_seed(rows), rows, shape[1]).bfloat16()

    def call(layer: NF4Linear) -> Tensor:
        with torch.no_grad():
            return F.linear(x, layer.dequantize(x.dtype))

    return rotate(partial(nf4_linear, *shape), call, rotated)


def all_contenders(case: str, shape: tuple[int, int], rows: int, device: str, backends: Sequence[str]) -> dict:
    """(contender, backend) -> run(i), ours once for each backend that can, peers without one.

    What a backend cannot run is left out, with a line that says why.
    """
    runs: dict[tuple[str, str | None], Run] = {}
    for backend in backends:
        try:
            with torch.device(device), backend_of(backend):
                rotated = ROTATED_BYTES if device == "cuda" else 0
                found = contenders(case, *shape, rows, rotated)
                if case == "nf4_linear forward":
                    found[DEQUANTIZED] = dequantized(shape, rows, rotated)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{case} {shape} rows {rows}: {backend}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            continue
        for name, run in found.items():
            if name.startswith("peftkern"):
                runs[name, backend] = _under(backend, run)
            else:
                runs.setdefault((name, None), run)
    return runs


def _under(backend: str, run: Run) -> Run:
    def call(i: int) -> object:
        with backend_of(backend):
            return run(i)

    return call


def time_case(
    case: str, shape: tuple[int, int], rows: int, device: str, backends: Sequence[str], calls: int, rounds: int
) -> list[dict[str, Any]]:
    """The rows of one case: medians of rounds in which the contenders take turns."""
    prepare = on_gpu if device == "cuda" else on_cpu
    prepared = {key: prepare(run, calls) for key, run in all_contenders(case, shape, rows, device, backends).items()}
    seconds: dict[tuple[str, str | None], list[float]] = {key: [] for key in prepared}
    keys = list(prepared)
    for number in range(-WARM_UP, rounds):
        for key in keys:
            taken = prepared[key][0]()
            if number >= 0:
                seconds[key].append(taken)
        keys = keys[1:] + keys[:1]
    common = {"case": case, "shape": list(shape), "rows": rows}
    return [
        {**common, "contender": name, "backend": backend, "timed": how, **asdict(summary(seconds[name, backend]))}
        for (name, backend), (_, how) in prepared.items()
    ]


def with_floors(rows: list[dict[str, Any]], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The rows with the least time that the machine's limits allow."""
    for row in rows:
        moved, operations = work(row["case"], *row["shape"], row["rows"])
        row["floor_ms"] = 1e3 * max(moved / limits["copy_bandwidth"], operations / limits["bf16_flops"])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_timing", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", required=True)
    parser.add_argument("--shapes", type=shape_list, default="4096x4096", help="OUTxIN,OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=[8192])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--calls", type=int, default=CALLS, help="in one graph")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    args = parser.parse_args(argv)
    os.environ.setdefault("PEFTKERN_BNB", "0")  # bitsandbytes is a peer here: on its own kernels
    small = {} if args.device == "cuda" else {"copy_bytes": 2**20, "size": 64}
    limits = ceilings(args.device, **small)
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        for shape in args.shapes:
            for count in [0] if case in ROWLESS else args.rows:
                rows += time_case(case, shape, count, args.device, args.backends, args.calls, args.rounds)
                if args.output is not None:  # after each case: a run that is cut short keeps what it has
                    write_report({"ceilings": limits, "rows": with_floors(rows, limits)}, args.output)
    if args.output is None:
        write_report({"ceilings": limits, "rows": with_floors(rows, limits)}, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
