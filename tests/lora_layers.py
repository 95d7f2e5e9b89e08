"""LoRALinear layers to test on."""

from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn import LoRALinear, NF4Linear

IN, OUT = 48, 40
BASES = ("dense", "nf4")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def make_base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    cls = {"dense": nn.Linear, "nf4": NF4Linear}[kind]
    return cls(IN, OUT, bias=bias, dtype=dtype)


def fill(layer: LoRALinear, name: str = "default", std: float = 0.3) -> LoRALinear:
    """An adapter that does something: B starts at zero."""
    nn.init.normal_(layer.factors(name)[1], std=std)
    return layer


def make(kind: str = "dense", dtype: torch.dtype = torch.float32, **options: Any) -> LoRALinear:
    return fill(LoRALinear(make_base(kind, dtype), **options))


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCES[dtype or actual.dtype]
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def exact_weight(layer: LoRALinear, name: str = "default") -> Tensor:
    """W + scaling B A in float64."""
    a, b = (factor.detach().double() for factor in layer.factors(name))
    base = layer.base_layer
    if isinstance(base, NF4Linear):
        weight = base.dequantize(torch.float64 if base.weight_dtype == torch.float64 else torch.float32)
    else:
        weight = base.weight
    return weight.double() + float(layer.scaling[name]) * b @ a
