"""nf4_quantize against bitsandbytes' bytes, against the reference, and against values worked out by hand."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, nf4_linear, nf4_quantize
from peftkern._native import ops
from peftkern.nn import NF4Linear
from peftkern.ops.nf4_quantize import BLOCK_SIZES, codebook, dynamic_map, nested_reference, nf4_quantize_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


def assert_same(actual: NF4Weight, expected: NF4Weight) -> None:
    for got, wanted in zip(actual.tensors, expected.tensors):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert (actual.shape, actual.dtype, actual.block_size) == (expected.shape, expected.dtype, expected.block_size)


def unpack(q: NF4Weight) -> Tensor:
    """One code per element; the last one of an odd size included."""
    flat = q.codes.flatten()
    return torch.stack((flat >> 4, flat & 15), dim=1).flatten()


def sizes(block_size: int) -> list[tuple[int, int]]:
    """Whole blocks, one short block, blocks across rows, odd sizes, a rest of every kind modulo a step of 32."""
    rests = [(1, 4 * block_size + rest) for rest in (1, 2, 15, 16, 17, 31)]
    return [(2, block_size), (1, 1), (3, 1), (7, 33), (64, 96), (33, block_size + 1), *rests]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_bytes_are_bitsandbytes(isa: str, dtype: torch.dtype, block_size: int, bnb: ModuleType, seed: int) -> None:
    for shape in sizes(block_size):
        weight = torch.randn(shape).to(dtype)
        q = nf4_quantize(weight, block_size, double_quant=False)
        codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        torch.testing.assert_close(q.codes, codes, rtol=0, atol=0)
        torch.testing.assert_close(q.absmax, state.absmax, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 5000, 32767, 32768])
def test_nested_bytes_are_bitsandbytes(isa: str, blocks: int, bnb: ModuleType, seed: int) -> None:
    weight = torch.randn(blocks, 32) * torch.rand(blocks, 1)
    q = nf4_quantize(weight, 32)
    codes, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(q.offset, state.offset, rtol=0, atol=0)
    expected = (codes, state.absmax, state.state2.absmax, state.state2.code)
    for got, wanted in zip(q.tensors, expected):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_nested_bytes_given_bitsandbytes_offset(isa: str, bnb: ModuleType, seed: int) -> None:
    weight = torch.randn(70000, 32) * torch.rand(70000, 1)
    _, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4", compress_statistics=True)
    absmax = nf4_quantize(weight, 32, double_quant=False).absmax
    quantized, nested_absmax = ops.nf4_quantize_absmax(absmax, dynamic_map(), state.offset)
    torch.testing.assert_close(quantized, state.absmax, rtol=0, atol=0)
    torch.testing.assert_close(nested_absmax, state.state2.absmax, rtol=0, atol=0)


def test_nested_bytes_of_a_sweep(isa: str, bnb: ModuleType) -> None:
    """Every neighbourhood of the 65536-point grid and of the map's midpoints, at scale 1."""
    values = torch.linspace(-1, 1, 1_000_000)[:999_936].view(-1, 256).clone()
    values[:, 0] = 1
    quantized, nested_absmax = ops.nf4_quantize_absmax(values.flatten(), dynamic_map(), torch.zeros(()))
    expected, state = bnb.quantize_blockwise(values.flatten(), blocksize=256)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=0)
    torch.testing.assert_close(nested_absmax, state.absmax, rtol=0, atol=0)


def test_any_quant_map(isa: str, seed: int) -> None:
    quant_map = (torch.rand(256) * 2 - 1).sort().values
    absmax, offset = torch.rand(1000), torch.tensor(0.4)
    for got, wanted in zip(
        ops.nf4_quantize_absmax(absmax, quant_map, offset), nested_reference(absmax, quant_map, offset)
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_dynamic_map_is_bitsandbytes(bnb: ModuleType) -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("scale", [3.4e38, 1e-36, 1.1e-38, 9e-39, 1e-40, 1e-45, 0.0])
@pytest.mark.parametrize("columns", [64, 40])
def test_extreme_scales_are_bitsandbytes(isa: str, scale: float, columns: int, bnb: ModuleType, seed: int) -> None:
    weight = torch.rand(2, columns) * scale
    weight[0, 0] = -scale
    q = nf4_quantize(weight, 32, double_quant=False)
    codes, state = bnb.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    torch.testing.assert_close(q.codes, codes, rtol=0, atol=0)
    torch.testing.assert_close(q.absmax, state.absmax, rtol=0, atol=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_matches_reference(isa: str, dtype: torch.dtype, double_quant: bool, seed: int) -> None:
    for block_size in (32, 64, 4096):
        for shape in (*sizes(block_size), (300, 257)):
            weight = torch.randn(shape, dtype=torch.float64).to(dtype)
            expected = nf4_quantize_reference(weight, block_size, double_quant)
            assert_same(nf4_quantize(weight, block_size, double_quant), expected)


def test_codes_are_nearest(isa: str, seed: int) -> None:
    weight = torch.randn(40, 128)
    scaled = weight.view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True)
    nearest = (scaled.double().flatten().unsqueeze(1) - codebook().double()).abs().argmin(1)
    assert torch.equal(unpack(nf4_quantize(weight)).long(), nearest)


@pytest.mark.parametrize("rest", [0, 8])
def test_midpoints_go_to_the_lower_code(isa: str, rest: int) -> None:
    midpoints = (codebook()[:-1] + codebook()[1:]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    for values, shift in ((midpoints, 0), (above, 1), (below, 0)):
        weight = torch.zeros(1, 32 + rest)
        # Both blocks, the whole one and the one cut short, have absmax 1.
        weight[0, -16:-1], weight[0, -1], weight[0, 0] = values, 1.0, 1.0
        codes = unpack(nf4_quantize(weight, 32, double_quant=False))[-16:]
        assert codes.tolist() == [*range(shift, 15 + shift), 15]


@pytest.mark.parametrize("cut_short", [False, True])
def test_whole_blocks_multiply_and_short_blocks_divide(isa: str, cut_short: bool, seed: int) -> None:
    """Values around every midpoint of blocks of any absmax, where w * (1 / absmax) and w / absmax round apart."""
    midpoints = (codebook()[:-1] + codebook()[1:]) / 2
    absmax = torch.rand(500, 1) + 0.5
    around = torch.cat((midpoints * absmax, torch.nextafter(midpoints * absmax, torch.zeros(1))), dim=1)
    blocks = torch.cat((absmax, around[:, :30], torch.zeros(500, 1)), dim=1)
    product, quotient = (torch.bucketize(v, midpoints) for v in (blocks * (1 / absmax), blocks / absmax))
    assert (product != quotient).any()
    if cut_short:
        codes = torch.stack([unpack(nf4_quantize(block.view(1, -1), 64, double_quant=False)) for block in blocks])
    else:
        codes = unpack(nf4_quantize(blocks, 32, double_quant=False)).view(blocks.shape)
    assert torch.equal(codes.long(), quotient if cut_short else product)


def test_zeros_of_either_sign(isa: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = -0.0
    weight[2, ::2], weight[2, 1] = -0.0, 5.0
    q = nf4_quantize(weight, double_quant=False)
    assert q.absmax.tolist() == [0.0, 0.0, 5.0]
    assert (q.codes[:64] == 0x77).all() and q.codes[64] == 0x7F and (q.codes[65:] == 0x77).all()
    assert torch.equal(q.dequantize(), weight)


def test_all_equal_scales_nest(isa: str) -> None:
    """Every absmax is the mean: the nested scale is 0 and each byte 0."""
    q = nf4_quantize(torch.ones(8, 64))
    assert q.nested_absmax is not None and q.nested_absmax.tolist() == [0.0]
    assert q.absmax.tolist() == [0] * 8 and torch.equal(q.dequantize(), torch.ones(8, 64))


def test_odd_size_ends_with_the_zero_code(isa: str) -> None:
    q = nf4_quantize(torch.full((1, 33), -2.0), 32, double_quant=False)
    assert q.codes.shape == (17, 1) and q.codes[:16].eq(0).all() and q.codes[16] == 0x07


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_weight_raises(isa: str, dtype: torch.dtype, bad: float) -> None:
    for position in (0, 31, 32 * 3 - 1, 32 * 3, 32 * 3 + 6):
        weight = torch.ones(1, 32 * 3 + 7, dtype=dtype)
        weight[0, position] = bad
        for backend in (None, "reference"):
            with pytest.raises(ValueError, match="nf4_quantize: weight must be finite"):
                nf4_quantize(weight, 32, backend=backend)


def test_float64_beyond_fp32_raises() -> None:
    with pytest.raises(ValueError, match="weight must be finite in fp32"):
        nf4_quantize(torch.full((2, 32), 1e300, dtype=torch.float64), 32)


def test_strided_weights(isa: str, seed: int) -> None:
    base = torch.randn(96, 200)
    for weight in (base.t(), base[::2, 3:67], base[:, ::3], base.flip(1).t()):
        assert_same(nf4_quantize(weight), nf4_quantize(weight.contiguous()))


def test_threads_change_nothing(isa: str, set_threads: Any, seed: int) -> None:
    weight = torch.randn(1500, 1001)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(nf4_quantize(weight, 32))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("blocks", [1000, 32769, 100000])
def test_offset_is_the_mean(blocks: int, seed: int) -> None:
    absmax = torch.rand(blocks, 1)
    offset = nf4_quantize(absmax.expand(-1, 32), 32).offset
    assert offset is not None and offset.shape == ()
    torch.testing.assert_close(offset.double(), absmax.double().mean(), rtol=2e-7, atol=0)


def test_results_share_no_storage_and_need_no_gradient() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    first, second = nf4_quantize(weight), nf4_quantize(weight)
    pointers = [t.data_ptr() for q in (first, second) for t in q.tensors if t is not None]
    assert len(set([*pointers, dynamic_map().data_ptr()])) == 11
    assert not any(t.requires_grad for t in first.tensors if t is not None)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("weight", "block_size", "error", "message"),
    [
        ([[1.0]], 64, TypeError, "weight must be a Tensor, got list"),
        (torch.ones(2, 64, dtype=torch.int8), 64, TypeError, "weight must be torch.float32 or .* got torch.int8"),
        (torch.ones(64), 64, ValueError, r"weight must have shape \[out, in\], not empty, got \[64\]"),
        (torch.ones(2, 2, 64), 64, ValueError, r"got \[2, 2, 64\]"),
        (torch.ones(0, 64), 64, ValueError, r"got \[0, 64\]"),
        (torch.ones(2, 64), 48, ValueError, "block_size must be one of 32, .*, got 48"),
        (torch.ones(2, 64), 16, ValueError, "got 16"),
        (torch.ones(2, 64), 8192, ValueError, "got 8192"),
        (torch.ones(2, 64), None, ValueError, "got None"),
    ],
)
def test_bad_arguments_raise(weight: Any, block_size: Any, error: type, message: str, backend: str | None) -> None:
    with pytest.raises(error, match=f"^nf4_quantize: .*{message}"):
        nf4_quantize(weight, block_size, backend=backend)


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match="nf4_quantize: backend must be one of"):
        nf4_quantize(torch.ones(2, 64), backend="fast")


def test_unknown_instruction_set_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also shows that the ops read PEFTKERN_ISA, by which the other tests choose the level."""
    monkeypatch.setenv("PEFTKERN_ISA", "sse9")
    with pytest.raises(RuntimeError, match="PEFTKERN_ISA must be"):
        nf4_quantize(torch.ones(2, 64))
    with pytest.raises(RuntimeError, match="PEFTKERN_ISA must be"):
        ops.nf4_quantize_absmax(torch.ones(4), dynamic_map(), torch.ones(()))


def test_native_ops_check_their_arguments() -> None:
    weight, scales, offset = torch.ones(2, 64), torch.ones(4), torch.ones(())
    with pytest.raises(RuntimeError, match="nf4_quantize: weight must be float32, bfloat16 or float16, got Double"):
        ops.nf4_quantize(weight.double(), 64)
    with pytest.raises(RuntimeError, match="nf4_quantize: block_size must be a power of two"):
        ops.nf4_quantize(weight, 96)
    with pytest.raises(RuntimeError, match="nf4_quantize_absmax: absmax must be Float"):
        ops.nf4_quantize_absmax(scales.double(), dynamic_map(), offset)
    with pytest.raises(RuntimeError, match="nf4_quantize_absmax: quant_map must be Float with 256 elements"):
        ops.nf4_quantize_absmax(scales, dynamic_map()[:16], offset)
    with pytest.raises(RuntimeError, match="nf4_quantize_absmax: offset must be Float with 1 elements"):
        ops.nf4_quantize_absmax(scales, dynamic_map(), torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, seed: int) -> None:
    for shape in ((2, 64), (3, 33)):
        torch.library.opcheck(ops.nf4_quantize, (torch.randn(shape).to(dtype), 32))
    torch.library.opcheck(ops.nf4_quantize_absmax, (torch.rand(300), dynamic_map(), torch.tensor(0.5)))


def test_under_another_default_device(seed: int) -> None:
    """Its tables are not the caller's: in a process that has made none yet too."""
    weight = torch.randn(5, 64)
    expected = nf4_quantize(weight)
    dynamic_map.cache_clear()
    for quantize in (nf4_quantize, nf4_quantize_reference):
        with torch.device("meta"):
            assert_same(quantize(weight), expected)
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 5))
    with torch.device("meta"):
        assert layer.to_empty(device="cpu").weight.device.type == "cpu"
        assert not nf4_linear(weight, expected).is_meta and not expected.dequantize().is_meta
