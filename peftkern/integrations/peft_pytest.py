"""A pytest plugin that runs any tests of PEFT's on the fused ops: `pytest -p peftkern.integrations.peft_pytest`.

It replaces the forward of PEFT's own layer classes, so that every layer of every test is accelerated however small, and
prints at the end which share of the forwards took the fast path, in all, by feature, and why the others did not: tests
that pass without running the ops prove nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.integrations import _peft_ia3, _peft_lora
from peftkern.integrations._calls import FAST
from peftkern.integrations._peft_base import BNB_LINEARS, idle
from peftkern.nn.nf4_linear import NF4Linear

# (feature, FAST or the obstacle) -> forwards; one forward has several features.
_forwards: Counter[tuple[str, str]] = Counter()
_replaced: dict[type, Any] = {}
ALL = "all"
IDLE = "no adapter computes"
"""Adapters disabled, merged or none active: a forward of the base layer, not of LoRA; counted apart."""
_REASONS_SHOWN = 12


def pytest_configure(config: pytest.Config) -> None:
    """Puts the fast forward into PEFT's classes."""
    for family in (_peft_lora, _peft_ia3):
        for stock, accelerated in family.ACCELERATED.items():
            _replaced[stock] = stock.__dict__["forward"]
            stock.forward = _forward(stock, accelerated, family)  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Gives PEFT's classes their own forward back."""
    while _replaced:
        stock, forward = _replaced.popitem()
        stock.forward = forward  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what `shares` found."""
    terminalreporter.section("peftkern's share of the forwards of PEFT's layers")
    for feature, (fast, total) in sorted(shares().items(), key=lambda item: -item[1][1]):
        terminalreporter.write_line(f"{feature:24}{fast:>8} of {total:>6}  {fast / total:6.1%}")
    reasons = Counter({reason: n for (feature, reason), n in _forwards.items() if feature == ALL and reason != FAST})
    for reason, count in reasons.most_common(_REASONS_SHOWN):
        terminalreporter.write_line(f"{count:>8}  {reason}")


def shares() -> dict[str, tuple[int, int]]:
    """Feature -> (forwards by the op, all forwards)."""
    totals: Counter[str] = Counter()
    for (feature, _), count in _forwards.items():
        totals[feature] += count
    return {feature: (_forwards[feature, FAST], total) for feature, total in totals.items()}


def _forward(stock: type, accelerated: Any, family: Any) -> Callable[..., Tensor]:
    own = _replaced[stock]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self) is not stock:
            return own(self, x, *args, **kwargs)
        obstacle = family.obstacle(self, x, args, kwargs)
        if not torch.compiler.is_compiling():
            for feature in (IDLE,) if idle(self, family.active(self)) else (ALL, *_features(self, x, kwargs)):
                _forwards[feature, obstacle or FAST] += 1
        return own(self, x, *args, **kwargs) if obstacle else family.fast(self, x, **kwargs)

    return forward


def _features(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> list[str]:
    found = _lora_features(layer) if hasattr(layer, "lora_A") else ["(IA)^3"]
    if type(layer.base_layer) is NF4Linear or type(layer.base_layer) in BNB_LINEARS:
        found.append("4-bit")
    if type(layer.base_layer) is Conv1D:
        found.append("Conv1D")
    if x.dtype == torch.bfloat16:
        found.append("bf16")
    if kwargs.get("adapter_names") is not None:
        found.append("mixed batch")
    return found


def _lora_features(layer: Any) -> list[str]:
    names = _peft_lora.active(layer)
    variants = {type(layer.lora_variant[name]) for name in names if name in layer.lora_variant}
    found = ["DoRA" if DoraLinearVariant in variants else "other variants" if variants else "LoRA"]
    if len(names) > 1:
        found.append("several adapters")
    if any(isinstance(layer.lora_dropout[name], nn.Dropout) and layer.training for name in names):
        found.append("dropout")
    if any(layer.lora_bias.get(name) for name in names):
        found.append("lora_bias")
    if any(layer.use_rslora.get(name) for name in names):
        found.append("rsLoRA")
    return found
