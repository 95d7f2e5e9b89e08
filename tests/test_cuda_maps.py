"""The functions that CUDA kernels share with the host, over all their inputs, and the rule that picks a kernel."""

import ctypes
from collections.abc import Sequence
from ctypes import CDLL, POINTER, c_float, c_uint8
from itertools import product

import pytest
import torch
from cuda_emulation import COMPILER, DTYPES, Call, Traits, library
from torch import Tensor

from benchmarks import gpu_check, gpu_errors
from peftkern.ops.nf4_quantize import ceil_divide, codebook, dynamic_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

BF16, FP16, FP32 = DTYPES[torch.bfloat16], DTYPES[torch.float16], DTYPES[torch.float32]
# Of an A100, an H200 and a card with 99 KB of shared memory; clocks in kHz.
A100 = Traits(80, 108, 166912, 40 << 20, 1410000, 1215000, 5120)
H200 = Traits(90, 132, 232448, 60 << 20, 1980000, 3201000, 6144)
ADA = Traits(89, 128, 101376, 72 << 20, 2520000, 10501000, 384)
DEVICES = {"A100": A100, "H200": H200, "Ada": ADA}
DECODE, GEMM, DENSE = range(3)


@pytest.fixture(scope="module")
def host() -> CDLL:
    return library()


def pair_table(host: CDLL, dtype: int, wide: bool) -> bytes:
    table = ctypes.create_string_buffer(b"\xff" * 65536, 65536)
    host.host_pair_table(ctypes.addressof(table), dtype, wide)
    return table.raw


@pytest.mark.parametrize("entry", [4, 8])
def test_pair_addresses(host: CDLL, entry: int) -> None:
    """One byte permutation: the byte's row of 256, the lane's entry in it; other bytes of the word do not matter."""
    for byte in range(256):
        for i in range(4):
            word = 0xA5C3F069 & ~(0xFF << 8 * i) | byte << 8 * i
            for lane in range(32):
                assert host.host_pair_address(word, i, lane, entry) == byte * 256 + lane * entry


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pair_table_of_halves(host: CDLL, dtype: torch.dtype) -> None:
    table = torch.frombuffer(bytearray(pair_table(host, DTYPES[dtype], False)), dtype=dtype).view(256, 128)
    scale = 1 / host.host_unscale(DTYPES[dtype])
    nearest = (codebook().double() * scale).to(dtype)
    byte = torch.arange(256)
    wanted = torch.stack((nearest[byte >> 4], nearest[byte & 15]), dim=1)
    assert torch.equal(table[:, :64].reshape(256, 32, 2), wanted.unsqueeze(1).expand(256, 32, 2))
    assert table[:, 64:].isnan().all(), "half of each row stays free"


def test_pair_table_of_floats(host: CDLL) -> None:
    table = torch.frombuffer(bytearray(pair_table(host, BF16, True)), dtype=torch.float32).view(256, 32, 2)
    byte = torch.arange(256)
    wanted = torch.stack((codebook()[byte >> 4], codebook()[byte & 15]), dim=1)
    assert torch.equal(table, wanted.unsqueeze(1).expand(256, 32, 2))


def test_lane_table_addresses(host: CDLL) -> None:
    for e in range(8):
        shift = 8 * (e // 2) + (0 if e % 2 else 4)
        for code in range(16):
            word = 0x5A3C96F1 & ~(15 << shift) | code << shift
            for lane in range(32):
                assert host.host_lane_table_address(word, e, lane) == code * 128 + lane * 4


def test_nested_scales_are_rounded_twice(host: CDLL, seed: int) -> None:
    absmax, offset = torch.rand(8) * 3, torch.rand(8)
    for scale, mean in zip(absmax.tolist(), offset.tolist()):
        wanted = dynamic_map() * torch.tensor(scale) + torch.tensor(mean)
        found = [host.host_nested_scale(value, scale, mean) for value in dynamic_map().tolist()]
        assert torch.equal(torch.tensor(found), wanted)


def nearest_codes(host: CDLL, values: Tensor) -> Tensor:
    values = values.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    pointer = ctypes.cast(values.data_ptr(), POINTER(c_float))
    host.host_nearest_codes(pointer, values.numel(), ctypes.cast(codes.data_ptr(), POINTER(c_uint8)))
    return codes


def test_nearest_codes(host: CDLL) -> None:
    """At every midpoint and the floats around it, ties to the lower code; and over [-1, 1]."""
    midpoints = (codebook()[:-1] + codebook()[1:]) / 2
    above, below = midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))
    code = torch.arange(15, dtype=torch.uint8)
    assert torch.equal(nearest_codes(host, midpoints), code)
    assert torch.equal(nearest_codes(host, below), code)
    assert torch.equal(nearest_codes(host, above), code + 1)
    one_and_more = torch.tensor([-1.0000001, -1.0, -0.0, 0.0, 1e-40, 1.0, 1.0000001])
    assert nearest_codes(host, one_and_more).tolist() == [0, 0, 7, 7, 7, 15, 15]
    grid = torch.linspace(-1, 1, 1 << 20)
    assert torch.equal(nearest_codes(host, grid).long(), torch.bucketize(grid, midpoints))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(host: CDLL, dtype: torch.dtype) -> None:
    """All 65536 halves to fp32; back from each, from the midpoints between neighbours and from the floats around."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(65536)
    host.host_convert(halves.data_ptr(), 65536, DTYPES[dtype], FP32, wide.data_ptr())
    assert torch.equal(wide.nan_to_num(nan=0.5), halves.float().nan_to_num(nan=0.5))
    finite = halves[halves.isfinite()].float().sort().values
    middle = (finite[:-1].double() + finite[1:].double()).div(2).float()
    ends = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 65519.99, 65520.0, 1e-45])
    infinity = torch.tensor(float("inf"))
    values = torch.cat((finite, middle, middle.nextafter(infinity), middle.nextafter(-infinity), ends))
    found = torch.empty(values.shape, dtype=dtype)
    host.host_convert(values.data_ptr(), values.numel(), FP32, DTYPES[dtype], found.data_ptr())
    assert torch.equal(found.nan_to_num(nan=0.5), values.to(dtype).nan_to_num(nan=0.5))
    assert torch.equal(found.isnan(), values.isnan())


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1.5e-3), (torch.float16, 2.3e-4)])
def test_scaled_tables_have_no_common_error(host: CDLL, seed: int, dtype: torch.dtype, most: float) -> None:
    """The relative error of y over Gaussian weights, for x with a mean and without; the plain table fails the first."""
    scale = 1 / host.host_unscale(DTYPES[dtype])
    scaled = (codebook().double() * scale).to(dtype).double() / scale
    plain = codebook().to(dtype).double()
    exact = codebook().double()
    w = torch.randn(512, 4096)
    absmax = w.view(512, 64, 64).abs().amax(-1, keepdim=True)
    codes = torch.bucketize(w.view(512, 64, 64) / absmax, (codebook()[:-1] + codebook()[1:]) / 2)
    noise = torch.randn(4096, 16).double()

    def error(table: Tensor, x: Tensor) -> float:
        wanted, found = ((t[codes] * absmax).view(512, 4096) @ x for t in (exact, table))
        return ((found - wanted).norm() / wanted.norm()).item()

    for x in (noise, noise + 1, noise.relu()):
        assert error(scaled, x) < most
    assert error(plain, noise + 1) > 5 * most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
@pytest.mark.parametrize("out_features", [1, 16, 33, 1024, 4096, 14336, 151936])
@pytest.mark.parametrize("in_features", [64, 192, 4096, 14336, 28672])
def test_decode_plan(host: CDLL, device: str, rows: int, out_features: int, in_features: int) -> None:
    """Every row is in one tile and every group in one split, none empty, and what a block needs it has."""
    traits = DEVICES[device]
    plan = host.host_decode_plan(rows, out_features, in_features, traits)
    groups, tile_rows = ceil_divide(in_features, 128), 16 * plan.row_tiles
    assert plan.row_tiles in (1, 2) and plan.warps in (8, 16) and 1 <= plan.splits <= 8
    assert plan.split_groups * plan.splits >= groups > plan.split_groups * (plan.splits - 1)
    assert 1 <= plan.ctas <= ceil_divide(out_features, tile_rows)
    columns = 4 if rows <= 4 else 8
    assert 65536 + 1024 + plan.warps * columns * tile_rows * 4 <= traits.shared_bytes
    assert plan.row_tiles == 1 or rows <= 4


def test_decode_plan_fills_the_device(host: CDLL) -> None:
    small = host.host_decode_plan(1, 1024, 8192, H200)
    assert small.splits * small.ctas >= 128 and small.splits > 1
    large = host.host_decode_plan(1, 14336, 4096, H200)
    assert (large.splits, large.row_tiles) == (1, 2)


def call(rows: int, **changes: object) -> Call:
    values: dict[str, object] = {
        "rows": rows,
        "out_features": 14336,
        "in_features": 4096,
        "dtype": BF16,
        "block_size": 64,
        "nested": True,
        "backward": False,
        "has_gemm": True,
    }
    return Call(**{**values, **changes})


@pytest.mark.parametrize("device", DEVICES)
def test_rule_by_rows(host: CDLL, device: str) -> None:
    """Decode up to 8 rows, then the GEMM, then dense, and never back."""
    traits = DEVICES[device]
    chosen = [host.host_choose_kernel(call(rows), traits) for rows in (*range(1, 64), *range(64, 4097, 64))]
    assert chosen[:8] == [DECODE] * 8 and chosen[8] == GEMM and chosen[-1] == DENSE
    assert chosen == sorted(chosen)
    assert host.host_choose_kernel(call(9, has_gemm=False), traits) == DENSE


def test_rule_where_the_notes_put_it(host: CDLL) -> None:
    """The closed form gives about 700 rows on an H200; where a clock is not told, the default is near."""
    unknown = Traits(90, 132, 232448, 60 << 20, 0, 0, 0)
    for traits in (H200, unknown):
        assert host.host_choose_kernel(call(512), traits) == GEMM
        assert host.host_choose_kernel(call(1024), traits) == DENSE


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": FP32},
        {"block_size": 32},
        {"in_features": 4096 + 32},
        {"in_features": 64 * 3, "block_size": 128},
        {"in_features": 0},
        {"backward": True, "out_features": 14337},
    ],
)
def test_layouts_that_only_dense_takes(host: CDLL, changes: dict[str, object]) -> None:
    for rows in (1, 64):
        assert host.host_choose_kernel(call(rows, **changes), H200) == DENSE


Kernel = tuple[bool, int, int, bool]


def kernel_of(host: CDLL, traits: Traits, rows: int, out: int, columns: int, backward: bool) -> Kernel:
    """backward, which kind, the GEMM's tile, whether its contraction is cut."""
    wanted = call(rows, out_features=out, in_features=columns, backward=backward)
    kind = host.host_choose_kernel(wanted, traits)
    if kind == DECODE:
        return backward, kind, 0, host.host_decode_plan(rows, out, columns, traits).splits > 1
    plan = host.host_gemm_plan(wanted, traits)
    return (backward, kind, plan.tokens, plan.slices > 1) if kind == GEMM else (backward, kind, 0, False)


def reached(host: CDLL, traits: Traits, sizes: Sequence[str]) -> set[Kernel]:
    numbers = [tuple(map(int, size.split(","))) for size in sizes]
    return {kernel_of(host, traits, *each, backward) for each in numbers for backward in (False, True)}


@pytest.mark.parametrize(
    ("device", "forward", "backward"),
    [
        ("H200", (16, 32, 64, 128, 256), (16, 32, 64, 128)),
        ("A100", (16, 32, 64), (16, 32, 64)),
        ("Ada", (16, 32), (16, 32, 64)),
    ],
)
def test_the_gpu_check_reaches_every_kernel(
    host: CDLL, device: str, forward: tuple[int, ...], backward: tuple[int, ...]
) -> None:
    found = reached(host, DEVICES[device], gpu_errors.random_sizes(gpu_check.RANDOM_SIZES, 0))
    assert {tokens for back, kind, tokens, _ in found if kind == GEMM and not back} == set(forward)
    assert {tokens for back, kind, tokens, _ in found if kind == GEMM and back} == set(backward)
    assert {(back, kind) for back, kind, _, _ in found} == {(False, DECODE), *product((False, True), (GEMM, DENSE))}
    assert {(back, cut) for back, kind, _, cut in found if kind == GEMM} == set(product((False, True), repeat=2))
    assert {cut for _, kind, _, cut in found if kind == DECODE} == {False, True}


@pytest.mark.parametrize("device", DEVICES)
def test_the_sanitizer_sees_each_kind(host: CDLL, device: str) -> None:
    found = reached(host, DEVICES[device], gpu_check.SANITIZED_SIZES)
    assert {(back, kind) for back, kind, _, _ in found} >= {(False, DECODE), (False, GEMM), (True, GEMM)}


def test_rule_for_dx_has_no_decode(host: CDLL) -> None:
    assert host.host_choose_kernel(call(1, backward=True), H200) == GEMM


@pytest.mark.parametrize(
    ("rows", "strides", "wanted"),
    [
        (3, (64, 1), 64),
        (3, (72, 1), 72),
        (3, (68, 1), 0),  # not 16 bytes apart
        (3, (1, 3), 0),
        (3, (0, 1), 0),  # expanded
        (1, (67, 1), 64),  # a row of a matrix of odd rows: contiguous for torch, whatever its stride
        (1, (0, 1), 64),
        (1, (1, 3), 0),
        (0, (1, 1), 64),
    ],
)
def test_rows_that_are_read_where_they_lie(host: CDLL, rows: int, strides: tuple[int, int], wanted: int) -> None:
    assert host.host_row_stride(rows, 64, *strides) == wanted
