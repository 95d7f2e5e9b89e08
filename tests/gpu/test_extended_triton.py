"""The GEMM with the contraction extended by the rank against float64, and where it is taken."""

from typing import Any

import pytest
import torch
from linear_cases import assert_near_float64, lora_inputs, random_nf4
from torch import Tensor
from triton_cases import on

from peftkern import lora_linear
from peftkern.ops import _extended_triton
from peftkern.ops._dropout import draw_seed
from peftkern.ops._extended_triton import in_one
from peftkern.ops._triton import LEAST_DEVICE, Device, recording
from peftkern.ops.lora_linear import lora_linear_reference

# Of a product in two parts of 8 bits, and of a sum in fp32.
PRODUCT_ERROR = 2**-17 + 5e-6
# Rows, columns and depth beside a tile's, below any, and in two groups of row tiles.
SIZES = [(70, 130, 65, 16), (1, 1, 1, 1), (130, 33, 192, 40), (1100, 130, 8, 3)]
H100, SMALL = Device(32, 227 * 1024), Device(32, 64 * 1024)


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Takes it at every size; the list tells what was asked."""
    asked = []

    def always(x: Tensor, right: Tensor) -> bool:
        asked.append(x.dtype == right.dtype)
        return asked[-1]

    monkeypatch.setattr(_extended_triton, "in_one", always)
    return asked


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes(device: str, one: list[bool], dtype: torch.dtype, size: tuple[int, ...], seed: int) -> None:
    """Forward and dx, whose weight is the other way round; with a strided bias."""
    rows, out_features, in_features, rank = size
    weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(rows, in_features).to(dtype)
    inputs = {**lora_inputs(weight, x, rank), "bias": torch.randn(out_features, 2)[:, 0]}
    check(device, inputs)
    assert one and all(one)


def check(device: str, inputs: dict[str, Any]) -> None:
    grad_y = torch.randn(inputs["x"].shape[0], inputs["weight"].shape[0]).to(inputs["x"].dtype)
    run = on(device, lora_linear)
    assert_near_float64(run, lora_linear_reference, inputs, grad_y, None, product_error=PRODUCT_ERROR)


def test_decoded_weight(device: str, one: list[bool], seed: int) -> None:
    """Too many rows to decode it in the product."""
    check(device, lora_inputs(random_nf4((33, 128)), torch.randn(70, 128).half()))
    assert one and all(one)


def test_mask_of_dx(device: str, one: list[bool], seed: int) -> None:
    """On the low-rank part alone."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return on(device, lora_linear, dropout_p=0.3, training=True)(**inputs)

    inputs = lora_inputs(torch.randn(33, 130).half(), torch.randn(70, 130).half(), 3)
    torch.manual_seed(seed + 1)
    expected = {**inputs, "dropout_p": 0.3, "seed": draw_seed(device).cpu()}
    grad_y = torch.randn(70, 33).half()
    assert_near_float64(dropping, lora_linear_reference, inputs, grad_y, expected, product_error=PRODUCT_ERROR)


@pytest.mark.parametrize(("rows", "weight"), [(70, "dense"), (5, "nf4")])
def test_rounds_once(device: str, one: list[bool], rows: int, weight: str, seed: int) -> None:
    """The sum in fp32 leaves few elements beside the nearest; a second rounding leaves a quarter of them."""
    x = torch.randn(rows, 64).half()
    inputs = lora_inputs(random_nf4((130, 64)) if weight == "nf4" else torch.randn(130, 64).half(), x)
    widened = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if weight == "nf4":
        widened["weight"] = inputs["weight"].dequantize(torch.float16).double()
    exact = lora_linear_reference(**widened)
    actual = on(device, lora_linear)(**inputs)
    assert (actual == exact.half()).double().mean() > 0.97


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "dtypes", "chip", "taken"),
    [
        (8192, 2048, 2048, (torch.bfloat16, torch.bfloat16), H100, True),
        (8192, 2048, 2048, (torch.float16, torch.float16), H100, True),
        (8192, 4096, 4096, (torch.bfloat16, torch.bfloat16), H100, False),
        (512, 2048, 2048, (torch.bfloat16, torch.bfloat16), H100, False),
        (8192, 2048, 2048, (torch.float32, torch.float32), H100, False),
        (8192, 2048, 2048, (torch.bfloat16, torch.float32), H100, False),
        (8192, 2048, 2048, (torch.bfloat16, torch.bfloat16), SMALL, False),
        (8192, 2048, 2048, (torch.bfloat16, torch.bfloat16), Device(64, 160 * 1024), False),
        (8192, 2048, 2048, (torch.bfloat16, torch.bfloat16), LEAST_DEVICE, False),
    ],
)
def test_where_it_is_taken(
    rows: int, columns: int, depth: int, dtypes: tuple[torch.dtype, torch.dtype], chip: Device, taken: bool
) -> None:
    x = torch.empty(rows, depth, dtype=dtypes[0], device="meta")
    with recording(chip):
        assert in_one(x, torch.empty(depth, columns, dtype=dtypes[1], device="meta")) == taken
