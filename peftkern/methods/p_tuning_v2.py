"""P-tuning v2 (arXiv 2110.07602) on whole models: a prefix for every layer, and the output layer of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern._modules import activate, places, put
from peftkern.adapter_file import TENSORS_NAME
from peftkern.methods.prefix_tuning import EMBEDDINGS, PEFT_TYPE, PrefixMethod, check_values
from peftkern.nn._adapters import AdapterModule
from peftkern.nn.head import TrainedHead
from peftkern.nn.prefix import PrefixSettings

# Names of the output layers of transformers' classifiers.
_HEADS = ("classifier", "score", "qa_outputs")
_KEY = "base_model."


class PTuningV2(PrefixMethod):
    """A prefix as prefix tuning's, drawn from N(0, 1), without reparametrisation by default, and with the model's
    `classifier`, `score` or `qa_outputs`, if it has one, trained as well; PEFT's files."""

    name = "p_tuning_v2"

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        length: int = 20,
        init: str = "normal",
        hidden: int | None = None,
        dropout: float = 0.0,
        train_head: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dropout` is on the prefix; `train_head=False` leaves the output layer alone."""
        if type(train_head) is not bool:
            raise TypeError(f"{self.name}: train_head must be a bool, got {train_head!r}")
        heads = _heads(self.name, model) if train_head else {}
        self._install(model, adapter_name, PrefixSettings(length, init, hidden, dropout), None, dtype)
        self._put_heads(model, heads, adapter_name)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == PEFT_TYPE and bool(config.get("modules_to_save"))

    def modules(self, model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterModule]:
        return super().modules(model, adapter_name) | dict[str, AdapterModule](self._trained(model, adapter_name))

    def _put_heads(self, model: nn.Module, heads: Mapping[str, nn.Module], adapter_name: str) -> None:
        found = places(model)
        for module in heads.values():
            if isinstance(module, TrainedHead):
                module.add_adapter(adapter_name)
            else:
                put(model, found[module], TrainedHead(module, adapter_name))
        activate(model, adapter_name)

    def _trained(self, model: nn.Module, adapter_name: str | None) -> dict[str, TrainedHead]:
        return {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, TrainedHead) and (adapter_name is None or adapter_name in module.settings)
        }

    def _more_config(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        return {"modules_to_save": sorted(self._trained(model, adapter_name)) or None}

    def _more_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        return {
            f"{_KEY}{path}.{name}": tensor
            for path, head in self._trained(model, adapter_name).items()
            for name, tensor in head.own(adapter_name).state_dict().items()
        }

    def _check_more(self, op: str, model: nn.Module, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        where = directory / TENSORS_NAME
        wanted = {
            f"{_KEY}{path}.{name}": tensor
            for path, module in _heads(op, model).items()
            for name, tensor in _plain(module).state_dict().items()
        }
        for name in sorted(wanted.keys() ^ (tensors.keys() - {EMBEDDINGS})):
            raise ValueError(f'{op}: {where} {"has no" if name in wanted else "must not have"} "{name}"')
        for name, tensor in wanted.items():
            check_values(where, name, tensors[name], list(tensor.shape))

    def _copy_more(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        self._put_heads(model, _heads("load", model), adapter_name)
        for path, head in self._trained(model, adapter_name).items():
            start = f"{_KEY}{path}."
            state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            head.own(adapter_name).load_state_dict(state)


def _heads(op: str, model: nn.Module) -> dict[str, nn.Module]:
    """Path -> output layer of a classifier, plain or trained already."""
    heads = {name: module for name, module in model.named_children() if name in _HEADS}
    for name, module in heads.items():
        if isinstance(module, AdapterModule) and not isinstance(module, TrainedHead):
            raise ValueError(f'{op}: "{name}" has adapters of another method, it is a {type(module).__name__}')
    return heads


def _plain(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, TrainedHead) else module
