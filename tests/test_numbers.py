"""Numbers need not be Python's: numpy's and fractions as scaling, scale, alpha and probabilities."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.nn.adapter import BottleneckSettings
from peftkern.nn.dora_linear import DoRASettings
from peftkern.nn.prefix import PrefixSettings
from peftkern.ops.dora_linear import dora_norm

KINDS = pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.float16, np.int64, Fraction], ids=lambda k: k.__name__
)
X, WEIGHT, A, B = (torch.linspace(-1, 1, i * j).view(i, j) for i, j in ((3, 8), (8, 8), (2, 8), (8, 2)))
ONES, INDICES = torch.ones(8), torch.tensor([0, -1, 0])
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def dropped(number: Any) -> dict[str, Any]:
    return {"dropout_p": number - 1, "training": True}


CALLS: dict[str, Callable[..., Any]] = {
    "lora_linear": lambda n, b: peftkern.lora_linear(X, WEIGHT, A, B, n, **dropped(n), backend=b),
    "dora_linear": lambda n, b: peftkern.dora_linear(X, WEIGHT, A, B, ONES, n, **dropped(n), backend=b),
    "dora_norm": lambda n, b: dora_norm(WEIGHT, A, B, n, backend=b),
    "multi_lora_linear": lambda n, b: peftkern.multi_lora_linear(
        X, WEIGHT, [A], [B], [n], INDICES, **dropped(n), backend=b
    ),
    "lora_qkv": lambda n, b: peftkern.lora_qkv(X, [WEIGHT], [A], [B], [n], **dropped(n), backend=b)[0],
    "lora_mlp": lambda n, b: peftkern.lora_mlp(X, WEIGHT, WEIGHT, WEIGHT, [(A, B, n)] * 3, **dropped(n), backend=b),
    "bottleneck_adapter": lambda n, b: peftkern.bottleneck_adapter(X, A, ONES[:2], B, ONES, scaling=n, backend=b),
    "prefix_attention": lambda n, b: peftkern.prefix_attention(
        X.view(1, 3, 1, 8), X.view(1, 3, 1, 8), X.view(1, 3, 1, 8), X.view(3, 1, 8), X.view(3, 1, 8), scale=n, backend=b
    ),
}


@BACKENDS
@KINDS
@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str, kind: Any, backend: str) -> None:
    value = kind(2 if kind is np.int64 else 1.5)
    results = []
    for given in (value, float(value)):
        torch.manual_seed(0)
        results.append(CALLS[name](given, backend))
    assert torch.equal(*results)


@pytest.mark.parametrize("value", ["1.5", 1.5j, None, [1.5], np.array([1.5])])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="lora_linear: scaling must be a number or a 0-d tensor, got"):
        peftkern.lora_linear(X, WEIGHT, A, B, value)
    with pytest.raises(TypeError, match="lora_linear: dropout_p must be a number from 0 to 1, got"):
        peftkern.lora_linear(X, WEIGHT, A, B, dropout_p=value)
    with pytest.raises(TypeError, match="LoRA: alpha must be a number, got"):
        peftkern.nn.LoRALinear(nn.Linear(8, 8), alpha=value)


@KINDS
def test_settings(kind: Any) -> None:
    for settings, names in (
        (DoRASettings(alpha=kind(1), dropout=kind(1)), ("alpha", "dropout")),
        (BottleneckSettings(scaling=kind(1), init_scale=kind(1)), ("scaling", "init_scale")),
        (PrefixSettings(dropout=kind(1)), ("dropout",)),
    ):
        assert all(type(getattr(settings, name)) in (int, float) for name in names)


def test_compile_without_graph_breaks(seed: int) -> None:
    layer = peftkern.nn.LoRALinear(nn.Linear(8, 8), alpha=np.float32(3), dropout=np.float32(0.5))
    layer.scaling["default"] = np.float32(1.5)  # type: ignore[assignment]
    nn.init.normal_(layer.factors("default")[1])
    layer.eval()

    def run(x: Tensor) -> Tensor:
        return layer(x) + peftkern.lora_linear(x, WEIGHT, A, B, np.float32(1.5))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), run(X))
