"""Every Triton kernel compiles for five chips, as it is launched: no spills, shared memory that fits, tensor cores."""

import importlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from peftkern.backends import interpreting
from peftkern.ops import _triton

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")

# FP fusion is off by launch; triton 3.9 warns about its default all the same.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

OPS = Path(_triton.__file__).parent
MODULES = sorted(file.stem for file in OPS.glob("[a-z]*_triton.py"))
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Chip(NamedTuple):
    """A target, the shared memory of one block in KiB, its matrix instructions, and the most that a thread spills.

    On the last two of NVIDIA ptxas aims at more threads in place of registers: 8 bytes mostly, 64 the most.
    """

    target: GPUTarget
    shared_kib: int
    matrix: str
    most_spilled: int = 0


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163, r"\bmma\.sync"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227, r"\b(mma\.sync|wgmma\.mma_async)"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227, r"\b(mma\.sync|tcgen05\.mma)", 8),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99, r"\bmma\.sync", 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64, r"\bv_mfma_"),
}


# What triton before 3.9 spills beyond that: one kernel 8 bytes on sm_80.
OLDER_SPILLS = 0 if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9) else 8


def divisible(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def signature(launch: _triton.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and alignments, as Triton specialises them at a launch. Tensors of torch start at 16 bytes."""
    names = launch.kernel.arg_names
    values = {**dict(zip(names, launch.arguments)), **launch.constants}
    types, constants, alignments = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = "*" + TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if divisible(value) and types[name] != "constexpr":
            alignments[(index,)] = [["tt.divisibility", 16]]
    return types, constants, alignments


def compiled(launch: _triton.Launch, chip: Chip) -> CompiledKernel:
    types, constants, alignments = signature(launch)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=alignments)
    return compile_kernel(source, target=chip.target, options=options)


@cache
def launches(module: str, chip: str = "sm_90") -> dict[str, _triton.Launch]:
    """The launches of a module's shipped configurations on a chip, each kind once, by what is compiled of them."""
    device = _triton.Device(CHIPS[chip].target.warp_size, CHIPS[chip].shared_kib * 1024)
    with _triton.recording(device) as recorded:
        importlib.import_module(f"peftkern.ops.{module}").configurations()
    return {f"{each.kernel.__name__} {signature(each)} {each[4:]}": each for each in recorded}


class Report(NamedTuple):
    """What a compiled kernel takes; `matrix` says whether its dots of 16-bit operands run on tensor cores."""

    summary: str
    registers: int
    spilled: int
    shared: int
    matrix: bool


def nvidia_usage(kernel: CompiledKernel) -> tuple[int, int, str]:
    """Registers of a thread, bytes of its stack, and the code, of which ptxas keeps every matrix instruction."""
    tool = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent / "bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    return registers, stack, kernel.asm["ptx"]


def amd_usage(kernel: CompiledKernel) -> tuple[int, int, str]:
    """Vector registers of a thread, how many of them spill, and the machine code."""
    code = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spilled, code


USAGES: dict[str, Callable[[CompiledKernel], tuple[int, int, str]]] = {"cuda": nvidia_usage, "hip": amd_usage}


def described(launch: _triton.Launch) -> str:
    types, constants, _ = signature(launch)
    shown = [f"{name}={constants.get(name, type)}" for name, type in types.items() if type != "i32"]
    return f"{launch.kernel.__name__}({', '.join(shown)}), {launch.num_warps} warps, {launch.num_stages} stages"


def reported(module: str, chip: str, key: str) -> Report:
    launch = launches(module, chip)[key]
    kernel = compiled(launch, CHIPS[chip])
    registers, spilled, code = USAGES[CHIPS[chip].target.backend](kernel)
    shared = kernel.metadata.shared
    matrix = not re.search(r"tt\.dot .*xb?f16> \*", kernel.asm["ttir"]) or bool(re.search(CHIPS[chip].matrix, code))
    summary = f"{described(launch)}: {registers} registers, {spilled} spilled, {shared} B shared"
    return Report(summary, registers, spilled, shared, matrix)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Spawned: a fork of a process that has used torch's threads may hang."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as executor:
        yield executor


_known: dict[tuple[str, str], Report] = {}


def reports(pool: Executor, module: str, chip: str) -> list[Report]:
    """Of each launch of a module; what another module launches as well is compiled once."""
    keys = list(launches(module, chip))
    new = [key for key in keys if (chip, key) not in _known]
    for key, report in zip(new, pool.map(reported, repeat(module), repeat(chip), new)):
        _known[chip, key] = report
    return [_known[chip, key] for key in keys]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles(pool: Executor, module: str, chip: str) -> None:
    """A dot of 16-bit operands runs on tensor cores; what is built here and what a GPU gets is the same launch."""
    found = reports(pool, module, chip)
    assert found, f"{module}.configurations launches nothing"
    for report in found:
        print(report.summary)
        assert report.registers <= (512 if chip.startswith("gfx") else 255), report.summary
        assert report.spilled <= CHIPS[chip].most_spilled + OLDER_SPILLS, report.summary
        assert report.shared <= CHIPS[chip].shared_kib * 1024, report.summary
        assert report.matrix, f"{report.summary}: no {CHIPS[chip].matrix}"


def test_modules_are_found() -> None:
    assert "nf4_dequantize_triton" in MODULES


def test_every_kernel_is_compiled() -> None:
    """Those of the ops and those that they share."""
    files = [importlib.import_module(f"peftkern.ops.{file.stem}") for file in OPS.glob("*_triton.py")]
    kernels = {
        name
        for file in files
        for name, value in vars(file).items()
        if isinstance(value, JITFunction) and name.startswith("_")
    }
    assert kernels == {each.kernel.__name__ for module in MODULES for each in launches(module).values()}
