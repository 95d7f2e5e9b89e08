"""PEFTKERN_ISA, and what the object files of each instruction set level may refer to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_cases import only_level, random_nf4

from peftkern import lora_linear, nf4_linear
from peftkern._native import caps, ops

ROOT = Path(__file__).parents[1]
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")


NF4 = random_nf4((7, 33))


def run_one() -> None:
    nf4_linear(torch.ones(3, 33), NF4)


def test_levels_in_order() -> None:
    """Each level needs the one below it; every CPU has the first, and every build."""
    isas, built = caps.isas(), caps.built_isas()
    assert set(isas) == set(LEVELS) and isas["scalar"]
    assert built == [level for level in LEVELS if level in built] and built[0] == "scalar"
    assert [isas[level] for level in built] == sorted((isas[level] for level in built), reverse=True)
    assert not any(isas[level] for level in LEVELS if level not in built)


def test_a_level_runs(isa: str) -> None:
    assert caps.isa() == isa
    with only_level(isa):
        run_one()


@pytest.mark.parametrize("value", [None, ""])
def test_the_best_level_by_default(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("PEFTKERN_ISA", raising=False)
    else:
        monkeypatch.setenv("PEFTKERN_ISA", value)
    best = [level for level in LEVELS if caps.isas()[level]][-1]
    assert caps.isa() == best
    with only_level(best):
        run_one()


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx", " avx2", "avx512bf16 "])
def test_an_unknown_level_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_ISA", name)
    message = "PEFTKERN_ISA must be scalar, avx2, avx512 or avx512bf16"
    with pytest.raises(RuntimeError, match=f"nf4_linear: {message}, got {name}"):
        run_one()
    with pytest.raises(RuntimeError, match=f"lora_linear: {message}, got {name}"):
        lora_linear(torch.ones(3, 33), torch.ones(7, 33), torch.ones(2, 33), torch.ones(7, 2))
    with pytest.raises(RuntimeError, match=f"{message}, got {name}"):
        caps.isa()


def test_a_level_that_the_cpu_lacks_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [level for level in caps.built_isas() if not caps.isas()[level]]
    if not lacking:
        pytest.skip("this CPU has every level")
    for level in lacking:
        monkeypatch.setenv("PEFTKERN_ISA", level)
        with pytest.raises(RuntimeError, match=f"nf4_linear: PEFTKERN_ISA .*CPU lacks.*{level}"):
            run_one()


def test_a_level_in_a_new_process() -> None:
    """From the start, without torch having seen another."""
    level = "avx2" if caps.isas()["avx2"] else "scalar"
    program = (
        "import torch, peftkern; from peftkern._native import caps, ops; "
        "peftkern.nf4_linear(torch.ones(2, 64), peftkern.nf4_quantize(torch.ones(3, 64))); "
        "print(caps.isa(), *(level for level in caps.isas() if ops.cpu_tiles_run(level)))"
    )
    environment = {**os.environ, "PEFTKERN_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [level, level]


def test_tile_counter_names_an_unknown_level() -> None:
    with pytest.raises(RuntimeError, match="cpu_tiles_run: unknown level sse9"):
        ops.cpu_tiles_run("sse9")


SHOWS_THE_LEVEL = """
#include <cstdio>
#include "cpu/isa.h"
int main() {
    std::string error;
    const peftkern::Isa isa = peftkern::current_isa(&error);
    std::puts(error.empty() ? peftkern::isa_name(isa) : error.c_str());
}"""


def test_a_build_of_some_levels(compiler: str, tmp_path: Path) -> None:
    """The best of the levels that are built, and an error that names them for one that is not."""
    source, program = tmp_path / "level.cpp", tmp_path / "level"
    source.write_text(SHOWS_THE_LEVEL)

    def level_of(built: str, forced: str) -> str:
        arguments = ["-std=c++17", f'-DPEFTKERN_LEVELS="{built}"', "-I", ROOT / "csrc", source]
        subprocess.run([compiler, *arguments, ROOT / "csrc/cpu/isa.cpp", "-o", program], check=True)
        environment = {**os.environ, "PEFTKERN_ISA": forced}
        return subprocess.run([program], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    if not caps.isas()["avx2"]:
        pytest.skip("needs a CPU of two levels, and a build of both")
    assert level_of("scalar", "") == "scalar"
    assert level_of("scalar,avx2", "") == "avx2"
    assert level_of("scalar", "avx2") == "PEFTKERN_ISA must be one of this build's levels (scalar), got avx2"
    assert level_of("scalar,avx2", "scalar") == "scalar"


def flags_of(level: str) -> list[str]:
    """The compiler flags that CMakeLists.txt gives the level's files."""
    text = (ROOT / "CMakeLists.txt").read_text()
    common = re.search(r"target_compile_options\(kernels_\$\{name\} PRIVATE (.*?)\$\{ARGN\}", text, re.S)
    own = re.search(rf"^add_isa_kernels\({level}(.*?)\)", text, re.M)
    assert common and own
    return [*common.group(1).split(), *own.group(1).split(), "-std=c++17", "-fPIC", "-fvisibility=hidden"]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    if not found:
        pytest.skip("no C++ compiler")
    if not shutil.which("nm"):
        pytest.skip("no nm")
    return found


KERNELS = sorted(path.stem for stem in ("kernels", "quantize") for path in (ROOT / "csrc/cpu").glob(f"{stem}_*.cpp"))
KERNELS = [name for name in KERNELS if name.partition("_")[2] in LEVELS]


def test_every_level_has_kernels() -> None:
    assert {f"kernels_{level}" for level in LEVELS} <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_symbols(name: str, compiler: str, tmp_path: Path) -> None:
    """An inline function of a library, compiled for AVX-512, could be the copy that the linker keeps for every CPU. So
    these files define only their extern "C" symbols and refer to nothing but functions of the C library."""
    source, compiled = ROOT / "csrc/cpu" / f"{name}.cpp", tmp_path / "kernels.o"
    # The level's -O3 takes three times as long, and inlines more, not less.
    flags = [flag for flag in flags_of(name.partition("_")[2]) if flag != "-O3"]
    subprocess.run([compiler, *flags, "-O1", "-I", ROOT / "csrc", "-c", source, "-o", compiled], check=True)
    listed = subprocess.run(["nm", compiled], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    undefined = {symbol for kind, symbol in symbols if kind == "U"}
    exported = {symbol for kind, symbol in symbols if kind != "U" and not kind.islower()}
    assert undefined <= {"memcpy", "memset", "memmove", "memcmp", "expf", "logf", "_GLOBAL_OFFSET_TABLE_"}
    assert exported and all(symbol.startswith("peftkern_") for symbol in exported), exported
