"""nf4_dequantize against the formula, the reference, and bitsandbytes where that is right."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, nf4_dequantize, nf4_quantize
from peftkern._native import ops
from peftkern.ops._linear import native_weight
from peftkern.ops.nf4_dequantize import absmax_reference, nf4_dequantize_reference
from peftkern.ops.nf4_quantize import BLOCK_SIZES, codebook, dynamic_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 1), (7, 33), (64, 96), (33, 65), (5, 4304), (2, 8192), (1, 4129))


def random_weight(shape: tuple[int, int], block_size: int, nested: bool) -> NF4Weight:
    """Any bytes: codes and scales that no quantiser need have made."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // block_size)
    codes = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    if not nested:
        return NF4Weight(codes, torch.randn(blocks), None, None, None, torch.Size(shape), torch.bfloat16, block_size)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    parts = (codes, absmax, torch.rand(-(-blocks // 256)), dynamic_map().clone(), torch.randn(()))
    return NF4Weight(*parts, torch.Size(shape), torch.bfloat16, block_size)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa: str, dtype: torch.dtype, block_size: int, nested: bool, seed: int) -> None:
    for shape in SHAPES:
        q = random_weight(shape, block_size, nested)
        assert_equal(nf4_dequantize(q, dtype), nf4_dequantize_reference(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_by_the_formula(isa: str, dtype: torch.dtype) -> None:
    """Element 2i is the high nibble of byte i, element e has scale e // block_size."""
    absmax = torch.tensor([1.0, -3.0, 0.1, 7e4, 1e-6, 1e-40, 0.0, float("inf")])
    q = NF4Weight(
        torch.arange(256, dtype=torch.uint8).view(-1, 1), absmax, None, None, None, torch.Size((16, 32)), dtype, 64
    )
    codes = [nibble for byte in range(256) for nibble in (byte >> 4, byte & 15)]
    values = [codebook()[code] * absmax[e // 64] for e, code in enumerate(codes)]
    assert_equal(nf4_dequantize(q), torch.stack(values).to(dtype).view(16, 32))


def test_nested_product_and_sum_are_rounded_one_by_one(isa: str, seed: int) -> None:
    q = random_weight((2000, 32), 32, nested=True)
    assert q.nested_absmax is not None and q.nested_quant_map is not None and q.offset is not None
    scale = q.nested_absmax.repeat_interleave(256)[:2000]
    product = q.nested_quant_map[q.absmax.long()].double() * scale.double()
    fused = (product + q.offset.double()).float()
    separate = product.float() + q.offset
    assert (fused != separate).any()
    ones = replace(q, codes=torch.full_like(q.codes, 0xFF))
    assert_equal(nf4_dequantize(ones, torch.float32), separate.view(-1, 1).expand(-1, 32))


@pytest.mark.parametrize("block_size", BLOCK_SIZES[:-2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_is_bitsandbytes(isa: str, nested: bool, dtype: torch.dtype, block_size: int, seed: int) -> None:
    """Only where in_features is a multiple of the block: bitsandbytes' AVX-512 kernel is wrong elsewhere. From 2048 on
    it has no kernel and compiles torch code for many seconds."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as bnb

    weight = torch.randn(12, 4096).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=nested)
    expected = bnb.dequantize_4bit(packed, state, quant_type="nf4")
    assert_equal(nf4_quantize(weight, block_size, nested).dequantize(), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_round_trip(isa: str, dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(50, 130, dtype=torch.float64).to(dtype)
    q = nf4_quantize(weight, double_quant=False)
    restored = q.dequantize()
    assert restored.dtype == dtype and restored.shape == weight.shape
    half_gap = (codebook()[1:] - codebook()[:-1]).amax() / 2
    bound = half_gap * q.absmax.repeat_interleave(64)[: weight.numel()].view(weight.shape) * 1.02
    assert ((restored - weight).abs() <= bound).all()


def test_threads_change_nothing(isa: str, set_threads: Any, seed: int) -> None:
    q = random_weight((1500, 1001), 32, nested=True)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(nf4_dequantize(q))
    for result in results[1:]:
        assert_equal(result, results[0])


def test_strided_parts(isa: str, seed: int) -> None:
    q = random_weight((6, 64 * 256), 64, nested=True)
    spread = {
        name: torch.stack((part, part), dim=-1)[..., 0]
        for name, part in (
            ("codes", q.codes),
            ("absmax", q.absmax),
            ("nested_absmax", q.nested_absmax),
            ("nested_quant_map", q.nested_quant_map),
        )
        if part is not None
    }
    assert not spread["codes"].is_contiguous()
    assert_equal(nf4_dequantize(replace(q, **spread)), nf4_dequantize(q))


def test_float64_is_the_reference(seed: int) -> None:
    q = random_weight((7, 33), 32, nested=True)
    expected = codebook().double()[torch.stack((q.codes >> 4, q.codes & 15), 1).flatten()[:231].long()]
    expected = expected * absmax_reference(q).double().repeat_interleave(32)[:231]
    assert_equal(nf4_dequantize(q, torch.float64), expected.view(7, 33))
    with pytest.raises(RuntimeError, match="nf4_dequantize: backend 'cpu' takes fp32, bf16 or fp16"):
        nf4_dequantize(q, torch.float64, backend="cpu")


def test_reference_by_name(isa: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The backend argument decides: the reference runs although PEFTKERN_ISA would stop the native op."""
    q = random_weight((7, 33), 32, nested=True)
    expected = nf4_dequantize(q)
    monkeypatch.setenv("PEFTKERN_ISA", "sse9")
    with pytest.raises(RuntimeError, match="PEFTKERN_ISA must be"):
        nf4_dequantize(q)
    assert_equal(nf4_dequantize(q, backend="reference"), expected)


class Linear(torch.nn.Module):
    def __init__(self, q: NF4Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = ("codes", "absmax", "nested_absmax", "nested_quant_map", "offset")
        for name, part in zip(self.names, q.tensors):
            self.register_buffer(name, part)
        self.shape, self.block_size, self.dtype = q.shape, q.block_size, dtype

    def forward(self, x: Tensor) -> Tensor:
        parts = (getattr(self, name) for name in self.names)
        q = NF4Weight(*parts, self.shape, self.dtype, self.block_size)
        return x @ q.dequantize().t().to(x.dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_export(dtype: torch.dtype, nested: bool, seed: int) -> None:
    module, x = Linear(random_weight((16, 48), 32, nested), dtype), torch.randn(3, 48)
    for strict in (False, True):
        program = torch.export.export(module, (x,), strict=strict)
        assert_equal(program.module()(x), module(x))


def test_compile_without_graph_breaks(seed: int) -> None:
    module, x = Linear(random_weight((16, 48), 32, True), torch.bfloat16), torch.randn(3, 48, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert_equal(compiled, module(x))
    compiled.sum().backward()
    assert x.grad is not None


def test_meta_weight() -> None:
    q = nf4_quantize(torch.randn(33, 65)).to("meta")
    out = q.dequantize()
    assert out.device.type == "meta" and out.shape == (33, 65) and out.dtype == torch.float32


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(100, 1)}, TypeError, "q.codes must be torch.uint8, got torch.float32"),
        ({"codes": torch.zeros(99, 1, dtype=torch.uint8)}, ValueError, r"q.codes must have 160 .* got shape \[99, 1\]"),
        ({"absmax": torch.zeros(10)}, TypeError, "q.absmax must be torch.uint8, got torch.float32"),
        ({"absmax": torch.zeros(9, dtype=torch.uint8)}, ValueError, "q.absmax must have 10 elements"),
        (
            {"absmax": torch.zeros(10, dtype=torch.uint8, device="meta")},
            RuntimeError,
            "q.absmax must be on .* got meta",
        ),
        ({"nested_absmax": torch.zeros(2)}, ValueError, "q.nested_absmax must have 1 elements"),
        ({"nested_absmax": torch.zeros(1).half()}, TypeError, "q.nested_absmax must be torch.float32"),
        ({"nested_quant_map": torch.zeros(16)}, ValueError, "q.nested_quant_map must have 256 elements"),
        ({"nested_quant_map": None}, ValueError, "must be given together"),
        ({"offset": None}, ValueError, "must be given together"),
        ({"offset": 0.5}, TypeError, "q.offset must be a Tensor, got float"),
        ({"nested_absmax": None}, ValueError, "must be given together"),
        ({"block_size": 48}, ValueError, "block_size must be one of"),
        ({"shape": torch.Size((320,))}, ValueError, r"q.shape must be \[out, in\], got \[320\]"),
        ({"shape": torch.Size((10, 33))}, ValueError, "q.codes must have 165 elements"),
    ],
)
def test_inconsistent_parts_raise(change: dict[str, Any], error: type, message: str, backend: str | None) -> None:
    q = nf4_quantize(torch.ones(10, 32), 32)
    with pytest.raises(error, match=f"^nf4_dequantize: .*{message}"):
        nf4_dequantize(replace(q, **change), backend=backend)


def test_bad_arguments_raise() -> None:
    q = nf4_quantize(torch.ones(10, 32), 32)
    with pytest.raises(TypeError, match="nf4_dequantize: q must be an NF4Weight, got Tensor"):
        nf4_dequantize(torch.ones(10, 32))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nf4_dequantize: dtype must be .* got torch.int8"):
        nf4_dequantize(q, torch.int8)


def test_native_op_checks_its_arguments() -> None:
    q = nf4_quantize(torch.ones(10, 32), 32)
    w, wf = native_weight(q)
    for part, value, message in (
        (0, q.codes[1:], "codes must be Byte with 160 elements, got Byte with 159"),
        (1, q.absmax.float(), "absmax must be Byte with 10 elements, got Float with 10"),
        (2, torch.ones(2), "nested_absmax must be Float with 1 elements"),
        (4, torch.ones(2), "offset must be Float with 1 elements"),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_dequantize: {message}"):
            ops.nf4_dequantize([*w[:part], value, *w[part + 1 :]], wf, torch.float32)
    for field, number, message in (
        (0, 2, "wf has an unknown format, 2"),
        (0, 0, "a dense weight must be 1 tensor, got 5"),
        (1, 33, "block_size must be a power of two from 32 to 4096, got 33"),
        (2, -10, r"weight must have a shape that is not negative, got \[-10, 32\]"),
        (3, 33, "codes must be Byte with 165 elements"),
        (4, 1, "absmax is missing"),
        (4, 4, "nested_absmax, nested_quant_map and offset must be given together"),
        (4, 2, "w must have 2 tensors, as wf says, got 5"),
        (4, 6, "w must have 6 tensors for weight 0, got 5"),
        (4, -1, "w must have -1 tensors for weight 0, got 5"),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_dequantize: {message}"):
            ops.nf4_dequantize(w, [*wf[:field], number, *wf[field + 1 :]], torch.float32)
    for arguments, message in (
        ((w, wf[:4], torch.float32), "wf must have 5 entries, got 4"),
        ((w, wf, torch.float64), "dtype must be float32, bfloat16 or float16, got Double"),
        (([torch.ones(10, 32)], [0, 0, 10, 32, 1], torch.float32), "weight must be NF4, got a dense one"),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_dequantize: {message}"):
            ops.nf4_dequantize(*arguments)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, nested: bool, seed: int) -> None:
    q = random_weight((3, 33), 32, nested)
    torch.library.opcheck(ops.nf4_dequantize, (*native_weight(q), dtype))
