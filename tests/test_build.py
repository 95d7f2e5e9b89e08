"""What cmake would compile: levels and CUDA sources, read from its compile commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftkern._native import caps

ROOT = Path(__file__).parents[1]
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia").glob("gpus/*"))

pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")


def configured(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """cmake's run in a folder of its own, by the interpreter of the tests."""
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def sources_of(folder: Path) -> set[str]:
    commands = json.loads((folder / "compile_commands.json").read_text())
    return {Path(each["file"]).relative_to(ROOT).as_posix() for each in commands}


def levels_of(sources: set[str]) -> set[str]:
    return {match.group(1) for name in sources if (match := re.search(r"/kernels_(\w+)\.cpp", name))}


def test_native_is_scalar_and_the_best_of_this_cpu(tmp_path):
    """What `make demo` builds; and without a GPU no CUDA source, whether there is an nvcc or not."""
    done = configured(tmp_path, "-DPEFTKERN_LEVELS=native")
    assert done.returncode == 0, done.stderr
    if caps.built_isas() == ["scalar", "avx2", "avx512", "avx512bf16"]:
        best = [name for name in caps.built_isas() if caps.isas()[name]][-1]
        assert levels_of(sources_of(tmp_path)) == {"scalar", best}
    if not HAS_GPU:
        assert not any("/cuda/" in name for name in sources_of(tmp_path))
        assert "CUDA: not built, no GPU is visible" in done.stdout


def test_levels_by_name(tmp_path):
    """AVX-512-BF16 quantises as the level below does, whose kernels are not built for that."""
    done = configured(tmp_path, "-DPEFTKERN_LEVELS=avx512bf16", "-DPEFTKERN_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    sources = sources_of(tmp_path)
    assert levels_of(sources) == {"scalar", "avx512bf16"}
    assert {"csrc/cpu/quantize_scalar.cpp", "csrc/cpu/quantize_avx512.cpp"} <= sources
    assert "csrc/cpu/quantize_avx2.cpp" not in sources
    assert "CPU levels: scalar,avx512bf16" in done.stdout


def test_an_unknown_level(tmp_path):
    done = configured(tmp_path, "-DPEFTKERN_LEVELS=avx1024")
    assert done.returncode == 1
    assert "PEFTKERN_LEVELS must be all, native or some of" in done.stderr and "got avx1024" in done.stderr
