"""The machine code in the built library, for every architecture: what a GPU would run, read where there is none."""

import re
from itertools import product
from pathlib import Path

import pytest
from cuda_tools import Kernel, cuobjdump, read_kernels, read_resources

import peftkern
from peftkern._native import caps

LIBRARY = Path(peftkern.__file__).parent / "_C.abi3.so"
ARCHS = [arch for arch in caps.cuda_archs().split(",") if arch]
KERNELS = (
    *("nf4_quantize", "nf4_quantize_absmax", "nf4_dequantize", "nf4_linear_decode", "lora_down", "split_sum"),
    *("nf4_gemm_sm80", "nf4_gemm_backward_sm80", "nf4_gemm_sm90", "nf4_gemm_backward_sm90"),
)
# Of decode: how many masks of 4 rows of x, and how many tiles of 16 rows of the weight.
KINDS = ((1, 1), (1, 2), (2, 1))
# For a weight, of flat and of nested scales. Reading codes at 4.3 TB/s leaves time for 3.7 on an H200; the look-up
# alone takes 1.
MOST_INSTRUCTIONS = {(1, 1): (1.85, 2.15), (1, 2): (1.7, 2.05), (2, 1): (2.25, 2.55)}

pytestmark = [
    pytest.mark.skipif(not ARCHS, reason="built without CUDA kernels, which `make cuda` compiles"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump"),
]


@pytest.fixture(scope="module", params=ARCHS or ["none"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def kernels(arch: str) -> dict[str, Kernel]:
    return read_kernels(LIBRARY, arch)


def named(kernels: dict[str, Kernel], stem: str) -> dict[tuple[int, ...], Kernel]:
    """A stem's kernels by their template parameters: dtype (1 is bf16) and flags."""
    pattern = rf"\d+{stem}(?:I((?:L\w+?E)+)E)?E?v"
    found = {name: match for name in kernels if (match := re.search(pattern, name))}
    return {
        tuple(int(n) for n in re.findall(r"(?:DtypeE|L[bi])(\d+)E", match.group(1) or "")): kernels[name]
        for name, match in found.items()
    }


def test_every_architecture_is_there() -> None:
    assert ARCHS == ["80", "86", "89", "90a", "100a", "120a"]


def test_nothing_spills(arch: str) -> None:
    resources = read_resources(LIBRARY, arch)
    for stem in KERNELS:
        mine = {name: found for name, found in resources.items() if re.search(rf"\d+{stem}(I|E)", name)}
        assert mine, stem
        assert {name for name, found in mine.items() if found["STACK"] or found["LOCAL"]} == set()


def test_no_atomics(kernels: dict[str, Kernel]) -> None:
    for stem in KERNELS:
        for kernel in named(kernels, stem).values():
            assert kernel.count("ATOM") == kernel.count("RED.") == kernel.count("LDL") == kernel.count("STL") == 0


def test_dequantize(kernels: dict[str, Kernel]) -> None:
    found = named(kernels, "nf4_dequantize")
    assert set(found) == {(dtype, nested) for dtype in (0, 1, 2) for nested in (0, 1)}
    for (dtype, nested), kernel in found.items():
        # A thread has four steps of 8 weights in flight, and 16-byte stores for each.
        assert kernel.count("STG.E.128") == (8 if dtype == 0 else 4)
        first_store = next(i for i, line in enumerate(kernel.code) if "STG.E.128" in line)
        ahead = kernel.code[:first_store]
        loads = [line for line in ahead if re.search(r"LDG\.E(\.EF)? R", line)]
        assert len(loads) >= 4, "all codes are on their way before the first is used"
        last_store = max(i for i, line in enumerate(kernel.code) if "STG.E.128" in line)
        assert last_store / 32 <= (11.5 if nested else 9.5), "instructions for a weight"


def test_decode(kernels: dict[str, Kernel]) -> None:
    found = named(kernels, "nf4_linear_decode")
    assert set(found) == {
        (d, *masks_and_tiles, nested) for d, masks_and_tiles, nested in product((1, 2), KINDS, (0, 1))
    }
    for (_, masks, tiles, nested), kernel in found.items():
        loop = kernel.loop("HMMA")
        weights = 64 * tiles
        assert kernel.count("HMMA.16816.F32", loop) == 8 * masks * tiles
        assert kernel.count("LDG.E.NA.LTC128B.128", loop) == 2 * tiles, "16 bytes of codes at a time, not kept in L1"
        assert kernel.count("LDG.E.128", loop) == 4 * masks, "16 bytes of x at a time"
        # Two weights for one permutation and one load.
        assert kernel.count("PRMT", loop) <= weights // 2 + 8 * tiles
        assert weights // 2 <= kernel.count("LDS", loop) <= weights // 2 + 4 * tiles
        assert len(loop) / weights <= MOST_INSTRUCTIONS[masks, tiles][nested]


def test_low_rank(kernels: dict[str, Kernel]) -> None:
    pattern = r"lora_downI\w+?DtypeE(\d)ELS\w*?_(\d)ELi(\d)E"  # dtypes of x and of lora_a, rows
    found = {
        tuple(map(int, match.groups())): kernel
        for name, kernel in kernels.items()
        if (match := re.search(pattern, name))
    }
    adapters = {1: (0, 1), 2: (0, 2)}
    assert set(found) == {(dtype, a, rows) for dtype in adapters for a in adapters[dtype] for rows in (1, 4, 8)}
    for (_, adapter, rows), kernel in found.items():
        loop = kernel.loop("FFMA")
        assert kernel.count("LDG.E.128", loop) == rows + (2 if adapter == 0 else 1), "16 bytes at a time"
        assert kernel.count("FFMA", loop) == 8 * rows


def test_quantize(kernels: dict[str, Kernel]) -> None:
    for (dtype,), kernel in named(kernels, "nf4_quantize").items():
        assert kernel.count("LDG.E.EF.128") == (2 if dtype == 0 else 1)
        assert kernel.count("LDS.64") == 8, "a cell's midpoint and code at once"
