"""nvcc's and cuobjdump's output for one file of csrc/cuda: registers, spills, machine code."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    usual = "/usr/local/cuda/bin/nvcc"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (usual if os.access(usual, os.X_OK) else None)


def cuobjdump() -> str | None:
    """The disassembler: nvcc's, or the one that triton brings."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(brought) if brought.is_file() else None
    return found


@dataclass
class Kernel:
    """A kernel's machine code, an instruction an entry, and the address of each."""

    addresses: list[int]
    code: list[str]

    def count(self, opcode: str, code: list[str] | None = None) -> int:
        """The instructions whose opcode, modifiers included, begins with `opcode`."""
        lines = self.code if code is None else code
        return sum(re.match(rf"(?:@!?U?P\w+ )?{re.escape(opcode)}", line) is not None for line in lines)

    def loop(self, opcode: str) -> list[str]:
        """The shortest loop with `opcode` in it."""
        loops = []
        for end, (address, line) in enumerate(zip(self.addresses, self.code, strict=True)):
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
            if target and int(target.group(1), 16) < address:
                body = self.code[self.addresses.index(int(target.group(1), 16)) : end + 1]
                if self.count(opcode, body):
                    loops.append(body)
        return min(loops, key=len)


def compile_kernels(source: str, arch: str, output: Path) -> tuple[dict[str, Kernel], str]:
    """Compiles csrc/cuda/`source`: the kernels by their mangled names, and ptxas' report."""
    compiler, disassembler = nvcc(), cuobjdump()
    assert compiler and disassembler
    target = output / f"{source}.{arch}.o"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Icsrc", "-Xptxas", "-v", "-Werror", "all-warnings"]
    code = f"arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run(
        [compiler, *flags, "-gencode", code, "-c", f"csrc/cuda/{source}", "-o", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return read_kernels(target), done.stderr


def read_kernels(binary: Path, arch: str | None = None) -> dict[str, Kernel]:
    """The kernels of an object or a library by their mangled names, of one architecture where it has several."""
    disassembler = cuobjdump()
    assert disassembler
    only = [] if arch is None else ["-arch", f"sm_{arch}"]
    listing = subprocess.run(
        [disassembler, "-sass", *only, str(binary)], env=with_tools(), capture_output=True, text=True, check=True
    ).stdout
    kernels: dict[str, Kernel] = {}
    for line in listing.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            kernel = kernels[name.group(1)] = Kernel([], [])
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            kernel.addresses.append(int(instruction.group(1), 16))
            kernel.code.append(instruction.group(2))
    return kernels


def with_tools() -> dict[str, str]:
    """The environment in which cuobjdump finds the disassembler beside it."""
    return {**os.environ, "PATH": f"{Path(str(cuobjdump())).parent}{os.pathsep}{os.environ['PATH']}"}


def read_resources(binary: Path, arch: str) -> dict[str, dict[str, int]]:
    """Registers, stack and shared memory of a library's kernels, as cuobjdump names them."""
    command = [str(cuobjdump()), "-res-usage", "-arch", f"sm_{arch}", str(binary)]
    report = subprocess.run(command, env=with_tools(), capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+(REG:.*)", report)
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in found}
