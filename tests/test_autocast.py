"""Under the caller's autocast references stay oracles, and float64 stays float64, as in torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import random_nf4, relative_error
from prefix_cases import SMALL, inputs_of
from torch import Tensor

import peftkern
from peftkern.ops._projections import Projection
from peftkern.ops.bottleneck_adapter import bottleneck_adapter_reference
from peftkern.ops.cross_entropy import cross_entropy_reference
from peftkern.ops.dora_linear import dora_linear_reference, dora_norm
from peftkern.ops.ia3_linear import ia3_linear_reference
from peftkern.ops.lora_linear import lora_linear_reference
from peftkern.ops.lora_mlp import lora_mlp_reference
from peftkern.ops.lora_qkv import lora_qkv_reference
from peftkern.ops.multi_lora_linear import multi_lora_linear_reference
from peftkern.ops.nf4_linear import nf4_linear_reference
from peftkern.ops.prefix_attention import prefix_attention_reference

OUT, IN, RANK = 40, 72, 5
randn = torch.randn


def factors() -> tuple[Tensor, Tensor]:
    return randn(RANK, IN), randn(OUT, RANK)


def square() -> Projection:
    return Projection(randn(IN, IN), randn(RANK, IN), randn(IN, RANK), 0.5, randn(IN))


def prefix_tensors() -> list[Tensor]:
    return [value for value in inputs_of(SMALL).values() if isinstance(value, Tensor)]


Case = tuple[Callable[..., Any], tuple[Any, ...]]
# Each reference with arguments that torch's autocast would round.
CASES: dict[str, Callable[[], Case]] = {
    "nf4_linear": lambda: (nf4_linear_reference, (randn(9, IN), random_nf4((OUT, IN)), randn(OUT))),
    "lora_linear": lambda: (lora_linear_reference, (randn(9, IN), randn(OUT, IN), *factors(), 0.5, randn(OUT))),
    "lora_qkv": lambda: (lora_qkv_reference, (randn(9, IN), [square(), square()], 0.0, None)),
    "lora_mlp": lambda: (lora_mlp_reference, (randn(9, IN), [square() for _ in range(3)], "silu", 0.0, None)),
    "multi_lora_linear": lambda: (
        multi_lora_linear_reference,
        (randn(9, IN), randn(OUT, IN), *([f] for f in factors()), [0.5], torch.arange(9) % 2 - 1),
    ),
    "dora_linear": lambda: (dora_linear_reference, (randn(9, IN), randn(OUT, IN), *factors(), randn(OUT))),
    "ia3_linear": lambda: (ia3_linear_reference, (randn(9, IN), randn(OUT, IN), randn(OUT))),
    "bottleneck_adapter": lambda: (
        bottleneck_adapter_reference,
        (randn(9, IN), randn(RANK, IN), randn(RANK), randn(IN, RANK), randn(IN)),
    ),
    "prefix_attention": lambda: (prefix_attention_reference, tuple(prefix_tensors())),
    "cross_entropy": lambda: (cross_entropy_reference, (randn(9, 20), torch.arange(9))),
    "dora_norm": lambda: (
        lambda weight, a, b: dora_norm(weight, a, b, dtype=weight.dtype, backend="reference"),
        (randn(OUT, IN), *factors()),
    ),
}


def widened(value: Any) -> Any:
    if isinstance(value, peftkern.NF4Weight):
        return value.dequantize(torch.float64)
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Projection):
        return Projection(*map(widened, value))
    return [widened(entry) for entry in value] if isinstance(value, list) else value


def flat(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else torch.cat([part.flatten() for part in result])


@pytest.mark.parametrize("name", CASES)
def test_references_are_not_rounded(name: str, seed: int) -> None:
    function, arguments = CASES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat(function(*arguments))
        exact = flat(function(*map(widened, arguments)))
    assert actual.dtype == torch.float32 and exact.dtype == torch.float64
    assert relative_error(actual, exact) < 2e-6


def test_float64_is_left_alone(seed: int) -> None:
    x, weight, (a, b) = randn(9, IN).double(), randn(OUT, IN).double(), (f.double() for f in factors())
    nf4, keys = random_nf4((OUT, IN)), randn(1, 2, 5, 8).double()
    calls: dict[str, Callable[[], Any]] = {
        "lora_linear": lambda: peftkern.lora_linear(x, weight, a, b, 0.5),
        "nf4_linear": lambda: peftkern.nf4_linear(x, nf4),
        "dora_linear": lambda: peftkern.dora_linear(x, weight, a, b, a.new_ones(OUT)),
        "ia3_linear": lambda: peftkern.ia3_linear(x, weight, x.new_ones(OUT)),
        "lora_qkv": lambda: peftkern.lora_qkv(x, [weight], [a], [b], [0.5])[0],
        "multi_lora_linear": lambda: peftkern.multi_lora_linear(x, weight, [a], [b], [0.5], torch.arange(9) % 2 - 1),
        "bottleneck_adapter": lambda: peftkern.bottleneck_adapter(x, a, x.new_ones(RANK), a.t(), x.new_ones(IN)),
        "prefix_attention": lambda: peftkern.prefix_attention(keys, keys, keys, keys[0], keys[0]),
        "NF4Linear": lambda: peftkern.nn.NF4Linear.from_linear(layer)(x),
        "LoRALinear": lambda: peftkern.nn.LoRALinear(layer, dtype=torch.float64)(x),
        "DoRALinear": lambda: peftkern.nn.DoRALinear(layer, dtype=torch.float64)(x),
    }
    layer = torch.nn.Linear(IN, OUT, dtype=torch.float64)
    for name, call in calls.items():
        expected = call() if not name[0].isupper() else None
        with torch.autocast("cpu", torch.bfloat16):
            actual = call()
        assert actual.dtype == torch.float64, name
        assert expected is None or torch.equal(actual, expected), name
