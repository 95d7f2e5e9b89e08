"""The machine code of the NF4 GEMMs: what a GPU would run, read where there is none."""

import re

import pytest
from cuda_tools import Kernel, compile_kernels, cuobjdump, nvcc

pytestmark = pytest.mark.skipif(not (nvcc() and cuobjdump()), reason="needs nvcc and cuobjdump")

# Instructions per weight and thread in the main loop, by the tile's tokens: the tensor core's and the memory's time
# leave room for about that many.
SM90_FORWARD = {16: 3.6, 32: 3.6, 64: 3.6, 128: 4.2, 256: 4.2}
SM90_BACKWARD = {16: 4.2, 32: 4.2, 64: 4.2, 128: 4.2}
SM80_FORWARD = {16: 4.2, 32: 4.8, 64: 6.6}
SM80_BACKWARD = {16: 4.9, 32: 5.8, 64: 6.8}
WEIGHTS = 64  # of a thread in one pass of the loop


def compiled(source: str, arch: str, limits: dict[int, float], directory) -> dict[tuple[int, int], Kernel]:
    """The kernels by dtype and tokens; none spills, and ptxas serialised no product."""
    found, report = compile_kernels(source, arch, directory)
    kernels = {}
    for name, kernel in found.items():
        parameters = re.search(r"DtypeE(\d)ELi(\d+)E", name)
        assert parameters
        kernels[int(parameters.group(1)), int(parameters.group(2))] = kernel
    assert set(kernels) == {(dtype, tokens) for dtype in (1, 2) for tokens in limits}
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(kernels)
    assert "C75" not in report and "warning" not in report.lower()
    for kernel in kernels.values():
        assert kernel.count("LDL") == kernel.count("STL") == 0
        assert kernel.count("ATOM") == kernel.count("RED.") == 0
    return kernels


@pytest.mark.parametrize(
    ("source", "limits"), [("nf4_gemm_sm80.cu", SM80_FORWARD), ("nf4_gemm_backward_sm80.cu", SM80_BACKWARD)]
)
def test_mma_kernels(source, limits, tmp_path):
    for (_, tokens), kernel in compiled(source, "80", limits, tmp_path).items():
        loop = kernel.loop("HMMA")
        assert kernel.count("HMMA.16816.F32", loop) == tokens
        assert kernel.count("LDGSTS.E.BYPASS", loop) >= 3
        assert len(loop) <= limits[tokens] * WEIGHTS
        # Codes are looked up, one permutation and one load for two weights.
        assert kernel.count("PRMT", loop) <= WEIGHTS // 2 + 4


@pytest.mark.parametrize(
    ("source", "limits"), [("nf4_gemm_sm90.cu", SM90_FORWARD), ("nf4_gemm_backward_sm90.cu", SM90_BACKWARD)]
)
def test_wgmma_kernels(source, limits, tmp_path):
    for (_, tokens), kernel in compiled(source, "90a", limits, tmp_path).items():
        loop = kernel.loop("HGMMA")
        assert kernel.count(f"HGMMA.64x{tokens}x16.F32", loop) == 8
        # One wait for each half: a third would be ptxas' own, and would serialise the products.
        assert kernel.count("WARPGROUP.DEPBAR", loop) == 2
        assert kernel.count("PRMT", loop) == WEIGHTS // 2
        assert len(loop) <= limits[tokens] * WEIGHTS
        assert kernel.count("UTMALDG.2D") > 0
        assert producer_registers(kernel) < 40


def producer_registers(kernel: Kernel) -> int:
    """The highest register behind the producer's gift of all but 40."""
    start = next(i for i, line in enumerate(kernel.code) if "USETMAXREG.DEALLOC" in line)
    end = next(i for i in range(start, len(kernel.code)) if re.fullmatch(r"EXIT", kernel.code[i]))
    return max(int(register) for line in kernel.code[start:end] for register in re.findall(r"\bR(\d+)\b", line))


def test_wgmma_needs_its_architecture(tmp_path):
    """Elsewhere the kernels are empty, so that one build makes a binary for every device."""
    kernels, _ = compile_kernels("nf4_gemm_sm90.cu", "80", tmp_path)
    assert all(kernel.count("HGMMA") == 0 and len(kernel.code) < 40 for kernel in kernels.values())
