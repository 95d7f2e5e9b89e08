"""Batches whose samples have adapters of their own: ours in one op, one adapter for all, and HF PEFT's loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.bench import contenders as c
from peftkern.bench.measure import Run
from peftkern.nn import LoRALinear
from peftkern.ops.multi_lora_linear import multi_lora_linear

SAMPLES = 8
ADAPTERS = 4


def samples(rows: int) -> int:
    """Into how many samples the rows are cut."""
    return math.gcd(SAMPLES, rows)


class MixedLoRA(nn.Module):
    """Our op on the adapters of a LoRALinear, which the samples take in turn."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = LoRALinear(layer, rank=c.RANK, alpha=2 * c.RANK, adapter_name="0")
        for i in range(1, ADAPTERS):
            self.layer.add_adapter(str(i), rank=c.RANK, alpha=2 * c.RANK)
        for i in range(ADAPTERS):
            nn.init.normal_(self.layer.factors(str(i))[1], std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        lora_as, lora_bs = zip(*(self.layer.factors(str(i)) for i in range(ADAPTERS)))
        indices = torch.arange(len(x)).remainder(ADAPTERS)
        scalings = list(self.layer.scaling.values())
        return multi_lora_linear(x, self.layer.base_weight, lora_as, lora_bs, scalings, indices)


class PeftMixed(nn.Module):
    """HF PEFT's layer with as many adapters, in eval mode: it takes `adapter_names` in no other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        from peft import LoraConfig

        wrapped: Any = c.peft_lora(layer, 0.0)
        config = LoraConfig(r=c.RANK, lora_alpha=2 * c.RANK)
        for i in range(1, ADAPTERS):
            wrapped.update_layer(str(i), c.RANK, 2 * c.RANK, config=config)
        for lora_b in wrapped.lora_B.values():
            nn.init.normal_(lora_b.weight, std=0.01)
        self.layer = wrapped.eval()
        base = wrapped.base_layer
        if base.out_features % 32 or base.in_features % 64:
            base.train()  # bitsandbytes' eval path takes whole blocks
        self.names = list(wrapped.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, adapter_names=[self.names[i % ADAPTERS] for i in range(len(x))])


def contenders(case: str, shape: tuple[int, int], rows: int, rotated: int) -> dict[str, Run]:
    """Name -> run(i) for one case."""
    nf4 = "nf4" in case
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(samples(rows), rows // samples(rows), shape[1], generator=generator).bfloat16()
    call, rotate = c.forward(x), partial(c.rotate, rotated=rotated)
    base: Callable[[], nn.Linear] = partial(c.nf4_linear, *shape)
    if not nf4:
        base = partial(c.dense_linear, *shape, torch.bfloat16)
    runs = {
        "peftkern": rotate(lambda: MixedLoRA(base()), call),
        "peftkern lora_linear": rotate(lambda: c.lora(base(), 0.0), call),
    }
    if c.has("peft") and (c.has("bitsandbytes") or not nf4):
        peer = partial(c.bnb_linear, *shape) if nf4 else base
        runs["PEFT + bitsandbytes" if nf4 else "PEFT"] = rotate(lambda: PeftMixed(peer()), call)
    return runs
