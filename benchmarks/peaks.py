"""The machine's measured limits: read bandwidth and floating-point peaks, by threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).parent / "peaks.cpp"
SECONDS = 0.3
BUFFER_BYTES = 256 * 2**20


def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("benchmarks.peaks: a C++ compiler is needed to measure the machine's limits; set CXX")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peaks.so"
        subprocess.check_call([compiler, "-O2", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(target)])
        return ctypes.CDLL(str(target))


def _use_every_core() -> None:
    """Threads are born on the core that OpenMP has bound the main thread to."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def measure(threads: int) -> dict[str, float]:
    """Units per second over `threads` threads: read_bandwidth (bytes) and the flops functions the CPU has."""
    library = _library()
    buffers = [torch.ones(BUFFER_BYTES, dtype=torch.uint8) for _ in range(threads)]
    with ThreadPoolExecutor(threads, initializer=_use_every_core) as pool:

        def best(name: str, arguments: list[tuple[Any, ...]]) -> float:
            function = getattr(library, name)
            function.restype = ctypes.c_double
            totals = [sum(pool.map(lambda a: function(*a), arguments)) for _ in range(3)]
            return max(totals)

        seconds = ctypes.c_double(SECONDS)
        result = {
            "read_bandwidth": best(
                "read_bandwidth",
                [(ctypes.c_void_p(b.data_ptr()), ctypes.c_int64(BUFFER_BYTES), seconds) for b in buffers],
            )
        }
        for name in ("fp32_flops_avx2", "fp32_flops_avx512", "bf16_flops_avx512bf16"):
            if hasattr(library, name):
                result[name] = best(name, [(seconds,)] * threads)
    return result


def floor_ms(moved_bytes: float, operations: float, peaks: dict[str, float], isa: str, bf16: bool) -> tuple[float, str]:
    """The least time (ms) that bandwidth and arithmetic at this level allow, and which of them sets it."""
    flops = peaks.get("fp32_flops_avx512" if isa.startswith("avx512") else "fp32_flops_avx2", float("inf"))
    if bf16 and isa == "avx512bf16":
        flops = peaks.get("bf16_flops_avx512bf16", flops)
    times = {"bandwidth": moved_bytes / peaks["read_bandwidth"], "arithmetic": operations / flops}
    limit = max(times, key=lambda name: times[name])
    return 1e3 * times[limit], limit
