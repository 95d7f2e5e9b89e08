"""Batches whose samples have LoRA adapters of their own, on whole models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from peftkern._modules import adapter_modules, adapter_names, check_model
from peftkern.methods._method import did_you_mean
from peftkern.nn.lora_linear import LoRALinear

OP = "adapters_for_batch"


@contextmanager
def adapters_for_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context every sample of a batch has the LoRA adapter that is named for it, whichever is active.

    Each LoRALinear runs its base layer once for the whole batch and all adapters in one pass (`multi_lora_linear`); a
    layer that lacks a sample's adapter computes the base for it. Calls, generation and training work as with one
    adapter: what requires grad gets its gradient, which `set_adapter` has left to the active adapter alone. Under
    gradient checkpointing backward belongs into the context as well. In other threads the model has these adapters too.

    Args:
        model: with LoRA adapters; merged ones must be unmerged, and no adapter of another method active.
        names: of each sample's adapter, None for the base alone, as many as the model's inputs have samples. For beam
            search repeat each as often as there are beams.

    Raises:
        TypeError: `names` is no sequence of names.
        ValueError: no such adapter, or adapters that are not LoRA. Within the context: a batch of another size, or, in
            training, adapters of several dropout rates.
        RuntimeError: a layer is merged.
    """
    check_model(OP, model)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{OP}: names must be a sequence, one name per sample, got {type(names).__name__}")
    known = adapter_names(model)
    for name in dict.fromkeys(names):
        if name is not None and name not in known:
            listed = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"{OP}: no adapter {name!r}{did_you_mean(str(name), known)}; there is {listed}")
    layers = []
    for path, module in adapter_modules(model).items():
        if isinstance(module, LoRALinear):
            if module.merged:
                raise RuntimeError(f'{OP}: "{path}" is merged; see unmerge')
            layers.append(module)
        elif module.active_adapter is not None or any(name in module.settings for name in names):
            raise ValueError(
                f'{OP}: "{path}" is a {type(module).__name__}; only LoRA takes several adapters in a batch'
            )
    before = [layer.batch for layer in layers]
    for layer in layers:
        layer.batch = tuple(names)
    try:
        yield
    finally:
        for layer, batch in zip(layers, before):
            layer.batch = batch
