"""Merging of HF PEFT's adapters into NF4Linear bases, through PEFT's own methods.

PEFT merges by adding to the tensor called `weight`, which in an NF4Linear holds codes. `enable_merge` gives the layers
a subclass of their class that lends PEFT a dense weight and stores what comes back in 4 bits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners import ia3, lora
from torch import Tensor, nn

from peftkern.nf4 import NF4Weight
from peftkern.nn.nf4_linear import NF4Linear, _quantize


class MergesNF4:
    """To derive from before a layer class of PEFT: `merge` and `unmerge` where the base is an NF4Linear.

    The merged weight is formed in fp32 and quantised once, as the base's was. `unmerge` brings back what was there
    before the first merge, bit for bit; it is kept in memory for that, 4 bits an element.
    """

    base_layer: Any
    get_base_layer: Callable[[], nn.Module]
    merged: bool
    merged_adapters: list[str]
    _unmerged: tuple[NF4Weight, Tensor | None] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's.

        Raises:
            ValueError: the merged weight has NaN or infinity. The base is as before, and nothing more is merged.
        """
        base = self.get_base_layer()
        if not isinstance(base, NF4Linear):
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            return
        before = (base.nf4, None if base.bias is None else base.bias.detach().clone())
        already = len(self.merged_adapters)
        # Whatever stops the merge, Ctrl-C too, must not leave half of it.
        with ExitStack() as undo:
            undo.callback(self._go_back, base, before, already)
            with self._dense_base(base) as dense:
                super().merge(safe_merge, adapter_names)  # type: ignore[misc]
            if len(self.merged_adapters) > already:
                _store(base, _quantize(dense.weight, base.block_size, base.double_quant), None)
            undo.pop_all()
        if not already:
            self._unmerged = before

    def _go_back(self, base: NF4Linear, before: tuple[NF4Weight, Tensor | None], merged: int) -> None:
        """To the first `merged` adapters merged, and the base as it was then."""
        del self.merged_adapters[merged:]
        _store(base, *before)

    def unmerge(self) -> None:
        """PEFT's, but exact."""
        base = self.get_base_layer()
        if not isinstance(base, NF4Linear) or self._unmerged is None:
            super().unmerge()  # type: ignore[misc]
            return
        with self._dense_base(base):
            super().unmerge()  # type: ignore[misc]
        (q, bias), self._unmerged = self._unmerged, None
        _store(base, q.to(base.weight.device), bias)

    @contextmanager
    def _dense_base(self, base: NF4Linear) -> Iterator[nn.Linear]:
        """A dense layer in the base's place: its weight in fp32, its own bias."""
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(base.dequantize(torch.float32), requires_grad=False)
        dense.bias = base.bias
        holder: Any = self
        while holder.base_layer is not base:
            holder = holder.base_layer
        holder.base_layer = dense
        try:
            yield dense
        finally:
            holder.base_layer = base


def _store(base: NF4Linear, q: NF4Weight, bias: Tensor | None) -> None:
    base._assign(replace(q, dtype=base.weight_dtype))
    if bias is not None and base.bias is not None:
        base.bias.data = bias.to(base.bias.device)


class NF4LoRALinear(MergesNF4, lora.Linear):  # type: ignore[misc]
    """`peft.tuners.lora.Linear` that merges into an NF4Linear: LoRA and its variants."""


class NF4IA3Linear(MergesNF4, ia3.Linear):  # type: ignore[misc]
    """`peft.tuners.ia3.Linear` that merges into an NF4Linear."""


MERGING: dict[type, type] = {lora.Linear: NF4LoRALinear, ia3.Linear: NF4IA3Linear}
"""PEFT's class -> the one that merges."""


def enable_merge(model: nn.Module) -> nn.Module:
    """Lets PEFT merge into the NF4Linear bases of a model: `merge_adapter`, `unmerge_adapter`, `merge_and_unload`.

    In place: the LoRA and (IA)^3 layers on such a base become a subclass of their class. Nothing else of them changes.
    Layers added later need another call.

    Args:
        model: with PEFT's layers, from get_peft_model, PeftModel.from_pretrained or add_adapter.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"enable_merge: model must be an nn.Module, got {type(model).__name__}")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, (*MERGING, MergesNF4))]
    layers = [layer for layer in layers if isinstance(layer.get_base_layer(), NF4Linear)]
    if not layers:
        raise ValueError("enable_merge: the model has no LoRA or (IA)^3 layer of PEFT on an NF4Linear")
    for layer in layers:
        layer.__class__ = MERGING.get(type(layer), type(layer))
    return model
