"""A linear layer with a changed weight: what merging an adapter makes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftkern.nn.nf4_linear import NF4Linear

Target = Literal["dense", "nf4"]


@dataclass(frozen=True)
class MergeReport:
    """What storing a merged weight cost; `exact` = W + delta in fp32 (float64 for float64), delta = the change
    that the adapter makes to W, norms are Frobenius'.

    Attributes:
        adapter_name: of the adapter merged.
        to: "dense" or "nf4".
        dtype: of the merged weight, for NF4 of the dense weight that its codes stand for.
        relative_error: ||stored - exact|| / ||exact||.
        delta_error: ||stored - exact|| / ||delta||. Near 1 or above, rounding has drowned the adapter.
    """

    adapter_name: str
    to: Target
    dtype: torch.dtype
    relative_error: float
    delta_error: float


def weight_dtype(base: nn.Linear) -> torch.dtype:
    """Of the dense weight, or of the one that the NF4 codes stand for."""
    return base.weight_dtype if isinstance(base, NF4Linear) else base.weight.dtype


def compute_dtype(base: nn.Linear) -> torch.dtype:
    """What a merge computes in."""
    return torch.float64 if weight_dtype(base) == torch.float64 else torch.float32


def merged_linear(
    base: nn.Linear, weight: Tensor, exact: Tensor, bias: nn.Parameter | None, adapter_name: str, to: Target
) -> tuple[nn.Linear, MergeReport]:
    """A frozen layer like `base` with another weight, rounded once, and another bias.

    Args:
        base: an nn.Linear or NF4Linear, unchanged.
        weight: its weight [out, in] in `compute_dtype(base)`.
        exact: the merged weight in the same dtype.
        bias: of the merged layer.
        adapter_name: for the report and messages.
        to: "nf4" needs an NF4Linear.

    Raises:
        ValueError: the merged weight has NaN or infinity.
    """
    dtype, compute = weight_dtype(base), compute_dtype(base)
    delta_norm = torch.linalg.vector_norm(exact - weight)
    stored = exact.to(dtype)
    # After rounding: fp16 may overflow.
    if not torch.isfinite(stored).all():
        raise ValueError(f"merge: the weight with adapter {adapter_name!r} added has NaN or infinity in {dtype}")
    layer: nn.Linear
    if isinstance(base, NF4Linear) and to == "nf4":
        layer = quantized = _nf4_layer(base, exact, bias)
        stored = quantized.dequantize(compute)
    else:
        layer = _dense_layer(base, stored, bias)
    error = torch.linalg.vector_norm(stored.to(compute) - exact)
    relative_error = _ratio(error, torch.linalg.vector_norm(exact))
    return layer, MergeReport(adapter_name, to, dtype, relative_error, _ratio(error, delta_norm))


def _ratio(error: Tensor, norm: Tensor) -> float:
    """error / norm; 0 for 0 / 0."""
    return (error / norm).item() if error else 0.0


def _dense_layer(base: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """`base` with another weight, dense."""
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def _nf4_layer(base: NF4Linear, weight: Tensor, bias: nn.Parameter | None) -> NF4Linear:
    """`base` with another weight, quantised as the base's was."""
    layer = NF4Linear(
        base.in_features,
        base.out_features,
        bias=False,
        device="meta",
        dtype=base.weight_dtype,
        block_size=base.block_size,
        double_quant=base.double_quant,
        compute_dtype=base.compute_dtype,
    ).to_empty(device=base.weight.device)
    layer.load_state_dict({"weight": weight})
    layer.register_parameter("bias", bias)
    return layer
