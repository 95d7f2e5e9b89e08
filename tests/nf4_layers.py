"""NF4Linear layers to test on, and equality of every byte they hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn import NF4Linear

# 2496 elements: the last block of 64 is whole, that of 256 is not, and blocks run across rows.
IN, OUT = 52, 48
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARTS = ("weight", "absmax", "nested_absmax", "nested_quant_map", "offset", "nf4_format")
FLAT_PARTS = ("weight", "absmax", "nf4_format")


def make(dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> NF4Linear:
    return NF4Linear(IN, OUT, bias=bias, dtype=dtype, **options)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_entries(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names with the same dtype, shape and bits."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape), name
        bits = [tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor for tensor in (got, value)]
        assert torch.equal(*bits), name
