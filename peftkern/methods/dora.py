"""DoRA (arXiv 2402.09353) on whole models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.methods._linear import ALL_LINEAR
from peftkern.methods.lora import LoRA
from peftkern.nn._low_rank_linear import check_adapter
from peftkern.nn.dora_linear import DoRALinear, DoRASettings
from peftkern.ops.dora_linear import DropoutMode


class DoRA(LoRA):
    """Low-rank adapters with magnitudes on linear layers, dense or NF4; PEFT's files."""

    name = "dora"
    module = DoRALinear

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        target_modules: str | Iterable[str] = ALL_LINEAR,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        dropout_mode: DropoutMode = "peft",
        detach_norm: bool = True,
    ) -> None:
        settings = DoRASettings(rank, alpha, dropout, use_rslora, dropout_mode, detach_norm)
        check_adapter(self.name, adapter_name, dtype)
        plan = {path: settings for path in self.select(self.name, model, target_modules, adapter_name)}
        self.put(model, plan, adapter_name, dtype=dtype)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == "LORA" and bool(config.get("use_dora"))
