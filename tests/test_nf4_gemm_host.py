"""The NF4 GEMMs' arithmetic without a GPU: their own loaders, maps, decoders and loops, compiled for the CPU."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_tools import nvcc

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def run(program: str, directory: Path, *flags: str) -> str:
    """Compiles and runs tests/cpp/`program`; its output, which names what failed."""
    assert COMPILER
    binary = directory / "program"
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-Icsrc", "-Itests/cpp"]
    subprocess.run([*command, *flags, f"tests/cpp/{program}.cpp", "-o", str(binary)], cwd=ROOT, check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lanes(tmp_path):
    """Every lane of the four kernels, on emulated instructions, gives the plain product exactly, over awkward shapes.

    Operands are allocated to the byte, so that the sanitizer sees a copy that reaches past them.
    """
    lines = run("nf4_gemm_lanes", tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert len(lines.splitlines()) == 15


def test_pipeline(tmp_path):
    """No interleaving deadlocks, reads a stage that is not full or fills one that is in use."""
    lines = run("nf4_gemm_pipeline", tmp_path, "-O2")
    assert [line.split(":")[0] for line in lines.splitlines()] == [f"{stages} stages" for stages in range(2, 7)]


def test_banks(tmp_path):
    """No shared-memory access meets itself in a bank."""
    assert run("nf4_gemm_banks", tmp_path, "-O1") == ""


def test_tiles(tmp_path):
    """Each output and each step of it has one place in a plan, whatever the shape."""
    assert run("nf4_gemm_tiles", tmp_path, "-O1") == "4096 rows of weight: 4 slices of 8 steps; 14336: 1\n"


def test_a_build_without_90a_runs_hopper_by_mma_sync(tmp_path):
    """Its wgmma kernels are empty: they would leave y as it was."""
    assert run("nf4_gemm_wgmma", tmp_path) == "9.0: wgmma\n"
    assert run("nf4_gemm_wgmma", tmp_path, "-DPEFTKERN_NO_SM90A") == "9.0: mma.sync\n"


@pytest.mark.parametrize(("archs", "has_wgmma"), [("80-real;90a-real", True), ("80-real;90-real;80-virtual", False)])
def test_cmake_tells_the_kernels_what_is_compiled(tmp_path, archs, has_wgmma):
    if not (nvcc() and shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs nvcc, cmake and ninja")
    arguments = [f"-DPython_EXECUTABLE={sys.executable}", "-DPEFTKERN_CUDA=ON", f"-DPEFTKERN_CUDA_ARCHS={archs}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *arguments], check=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    of_kernels = [each["command"] for each in commands if "/csrc/cuda/" in each["file"]]
    assert of_kernels and all(("PEFTKERN_NO_SM90A" not in command) == has_wgmma for command in of_kernels)


KERNELS = (
    "nf4_gemm_sm80",
    "nf4_gemm_backward_sm80",
    "nf4_gemm_sm90",
    "nf4_gemm_backward_sm90",
    "tensor_map",
    "split_sum",
)


def test_kernels(tmp_path):
    """The kernels' own source and launchers on the emulated device; copies and products happen as late as they may."""
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = ["-Itests/cpp/emulation", "-Icsrc", "-Itests/cpp", "-include", "cuda_runtime.h"]
    sources = [*(f"csrc/cuda/{kernel}.cu" for kernel in KERNELS), "tests/cpp/nf4_gemm_kernels.cpp"]

    def compiled(source: str) -> Path:
        assert COMPILER
        target = tmp_path / f"{Path(source).stem}.o"
        subprocess.run(
            [COMPILER, *flags, *includes, "-x", "c++", "-c", source, "-o", str(target)], cwd=ROOT, check=True
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    assert COMPILER
    program = tmp_path / "kernels"
    subprocess.run([COMPILER, *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "17 kernels\n")
