"""LoRALinear: a frozen linear layer with low-rank adapters (LoRA, arXiv 2106.09685), over `ops.lora_linear`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from peftkern.nn._low_rank_linear import LoRASettings, LowRankLinear
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.multi_lora_linear import multi_lora_linear


class LoRALinear(LowRankLinear):
    """`y = x W^T + bias + scaling * (dropout(x) A^T) B^T` with W and bias frozen (LoRA, arXiv 2106.09685, equation 3).

    State-dict names are HF PEFT's: `base_layer.*`, `lora_A.<name>.weight` [rank, in] and `lora_B.<name>.weight`
    [out, rank]. A starts as nn.Linear's weight does, B at zero. One adapter is active, and trainable, at a time;
    without one, or with adapters disabled, the layer computes what the base layer does, bit for bit.

    The base layer's forward and backward hooks become this layer's (their handles still remove them); hooks registered
    on `base_layer` later do not run, since its forward is part of the fused one.

    Merging keeps the base layer as it is and computes with a merged copy beside it. Therefore `state_dict()` never
    holds merged weights, `unmerge()` is exact, and adapters can be disabled while merged. Gradients of a merged layer
    reach x, not the adapter. `set_adapter`, deleting the merged adapter and `load_state_dict` unmerge.

    Args:
        base: exactly an nn.Linear or NF4Linear; it becomes `base_layer` and loses its gradients.
        rank, alpha, dropout, use_rslora: of the first adapter, see `LoRASettings`.
        adapter_name: of the first adapter, which is active.
        dtype: of A and B, fp32 or what x will have.

    Attributes:
        settings: adapter name -> LoRASettings.
        scaling: adapter name -> float or 0-d tensor; starts as the settings say, read at every call.
        batch: the adapter of each sample of x [samples, ..., in], None for the base; by default the active adapter is
            that of all. `peftkern.adapters_for_batch` sets it.

    Raises:
        TypeError, ValueError: a base, setting, name or dtype that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x, A and B.
    """

    batch: tuple[str | None, ...] | None = None

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        self.add_adapter(adapter_name, rank, alpha, dropout, use_rslora, dtype)
        self._take_over(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds an adapter on the base layer's device, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        self._add(adapter_name, LoRASettings(rank, alpha, dropout, use_rslora), dtype)
        self._reset(adapter_name)

    @property
    def op(self) -> str:
        return super().op if self.batch is None else "multi_lora_linear"

    def _adapts(self) -> bool:
        if self.batch is None:
            return self._active is not None
        return any(name in self.settings for name in self.batch)

    def _adapted(self, x: Tensor) -> Tensor:
        if self.batch is not None:
            return self._mixed(x, self.batch)
        name = cast(str, self._active)
        a, b = self.factors(name)
        dropout = self.settings[name].dropout
        return lora_linear(x, self.base_weight, a, b, self.scaling[name], self.base_layer.bias, dropout, self.training)

    def _mixed(self, x: Tensor, batch: tuple[str | None, ...]) -> Tensor:
        """The base and each sample's own adapter."""
        if x.dim() < 2 or x.shape[0] != len(batch):
            raise ValueError(f"LoRALinear: x must have shape [{len(batch)}, ..., in], as batch, got {list(x.shape)}")
        names = [name for name in dict.fromkeys(batch) if name is not None and name in self.settings]
        dropouts = {self.settings[name].dropout for name in names} if self.training else {0.0}
        if len(dropouts) > 1:
            raise ValueError(f"LoRALinear: a batch in training needs adapters of one dropout, got {sorted(dropouts)}")
        indices = torch.tensor([names.index(name) if name in names else -1 for name in batch], device=x.device)
        lora_as, lora_bs = zip(*(self.factors(name) for name in names))
        scalings = [self.scaling[name] for name in names]
        rest = (indices, self.base_layer.bias, dropouts.pop(), self.training)
        return multi_lora_linear(x, self.base_weight, lora_as, lora_bs, scalings, *rest)

    def _merged_parts(self, adapter_name: str, weight: Tensor) -> tuple[Tensor, nn.Parameter | None]:
        """W + scaling B A."""
        return weight.add_(self._delta(adapter_name, weight.dtype)), self.base_layer.bias
