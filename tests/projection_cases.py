"""Inputs for lora_qkv and lora_mlp: each tensor by a name of its own, "lora_a1" for A of the second projection."""

from typing import Any

import torch
from linear_cases import random_nf4
from torch import Tensor

from peftkern.ops._projections import Projection

Inputs = dict[str, Any]


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    if kind in ("nf4", "flat nf4"):
        return random_nf4(shape, 64, kind == "nf4")
    return torch.randn(shape).to(getattr(torch, kind))


def projection_inputs(
    index: int,
    weight: Any,
    rank: int | None = 3,
    adapter_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
) -> Inputs:
    """Of one projection whose low-rank path is as large as the base; no adapter for rank None, as for no bias_dtype."""
    out_features, in_features = weight.shape
    inputs: Inputs = {f"weight{index}": weight}
    if rank is not None:
        inputs[f"lora_a{index}"] = torch.randn(rank, in_features).to(adapter_dtype)
        inputs[f"lora_b{index}"] = (torch.randn(out_features, rank) / max(1, rank) ** 0.5).to(adapter_dtype)
        inputs[f"scaling{index}"] = torch.tensor(0.7 + 0.2 * index)
    if bias_dtype is not None:
        inputs[f"bias{index}"] = 3 * torch.randn(out_features).to(bias_dtype)
    return inputs


def projections_of(inputs: Inputs) -> list[Projection]:
    """In the order of their numbers."""
    count = sum(name.startswith("weight") for name in inputs)
    return [
        Projection(
            inputs[f"weight{i}"],
            inputs.get(f"lora_a{i}"),
            inputs.get(f"lora_b{i}"),
            inputs.get(f"scaling{i}", 0.0),
            inputs.get(f"bias{i}"),
        )
        for i in range(count)
    ]


def together(ys: tuple[Tensor, ...]) -> Tensor:
    """Side by side: one tensor, as the helpers take it; the gradients that come back are strided."""
    return torch.cat(ys, -1)
