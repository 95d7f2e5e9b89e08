"""Every Triton kernel compiles for five chips, as it is launched: no spills, shared memory that fits, tensor cores."""

import importlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

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
    """A target, the shared memory of one block in KiB, what its matrix instructions are, and whether spills may be."""

    target: GPUTarget
    shared_kib: int
    matrix: str
    may_spill: bool = False


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163, r"\bHMMA\b"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227, r"\bHG?MMA\b"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227, r"\b(HMMA|UTCHMMA)\b", may_spill=True),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99, r"\bHMMA\b", may_spill=True),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64, r"\bv_mfma_", may_spill=True),
}


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


def launches(module: str, chip: Chip = CHIPS["sm_90"]) -> list[_triton.Launch]:
    """The launches of a module's shipped configurations on a chip, each kind once."""
    device = _triton.Device(chip.target.warp_size, chip.shared_kib * 1024)
    with _triton.recording(device) as recorded:
        importlib.import_module(f"peftkern.ops.{module}").configurations()
    return list({f"{each.kernel.__name__} {signature(each)} {each[4:]}": each for each in recorded}.values())


def nvidia_report(kernel: CompiledKernel, folder: Path) -> tuple[int, int, str]:
    """Registers of a thread, bytes of its stack, and the machine code."""
    tool = Path(importlib.import_module("triton.backends.nvidia").__file__ or "").parent / "bin/cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([tool, "-sass", file], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    return registers, stack, code


def amd_report(kernel: CompiledKernel, folder: Path) -> tuple[int, int, str]:
    """Vector registers of a thread, how many of them spill, and the machine code."""
    code = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spilled, code


REPORTS: dict[str, Callable[[CompiledKernel, Path], tuple[int, int, str]]] = {"cuda": nvidia_report, "hip": amd_report}


def described(launch: _triton.Launch) -> str:
    types, constants, _ = signature(launch)
    shown = [f"{name}={constants.get(name, type)}" for name, type in types.items() if type != "i32"]
    return f"{launch.kernel.__name__}({', '.join(shown)}), {launch.num_warps} warps, {launch.num_stages} stages"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles(module: str, chip: str, tmp_path: Path) -> None:
    """A dot of 16-bit operands runs on tensor cores; what is built here and what a GPU gets is the same launch."""
    target, shared_kib, matrix, may_spill = CHIPS[chip]
    found = launches(module, CHIPS[chip])
    assert found, f"{module}.configurations launches nothing"
    for launch in found:
        kernel = compiled(launch, CHIPS[chip])
        registers, spilled, code = REPORTS[target.backend](kernel, tmp_path)
        summary = f"{described(launch)}: {registers} registers, {spilled} spilled, {kernel.metadata.shared} B shared"
        print(summary)
        assert registers <= (512 if target.backend == "hip" else 255), summary
        assert may_spill or spilled == 0, summary
        assert kernel.metadata.shared <= shared_kib * 1024, summary
        if re.search(r"tt\.dot .*xb?f16> \*", kernel.asm["ttir"]):
            assert re.search(matrix, code), f"{summary}: no {matrix}"


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
    assert kernels == {each.kernel.__name__ for module in MODULES for each in launches(module)}
