"""LoRA (arXiv 2106.09685) on whole models, and QLoRA (arXiv 2305.14314), which is LoRA on a model quantised to NF4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from peftkern._modules import activate, outer_modules
from peftkern.adapter_file import AdapterFile, matches, read_adapter, targets_for, write_adapter
from peftkern.methods._linear import ALL_LINEAR, LinearMethod, is_linear
from peftkern.model import quantize
from peftkern.nn._low_rank_linear import LoRASettings, LowRankLinear, check_adapter
from peftkern.nn.dora_linear import DoRALinear
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear, _is_sharded


class LoRA(LinearMethod):
    """Low-rank adapters on linear layers; PEFT's files."""

    name = "lora"
    module: ClassVar[type[LowRankLinear]] = LoRALinear
    mergeable = True
    overwrites = True

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
    ) -> None:
        """See `peftkern.add_lora`."""
        settings = LoRASettings(rank, alpha, dropout, use_rslora)
        check_adapter(self.name, adapter_name, dtype)
        plan = {path: settings for path in self.select(self.name, model, target_modules, adapter_name)}
        self.put(model, plan, adapter_name, dtype=dtype)

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        """A scaling that was changed by hand is not saved."""
        layers = {path: layer for path, layer in self.modules(model, adapter_name).items() if path}
        if not layers:
            raise ValueError(f"save: the model holds no {self.module.__name__} with an adapter {adapter_name!r}")
        factors = {path: layer.adapter_parameters(adapter_name) for path, layer in layers.items()}
        for path, pair in factors.items():
            if any(factor.is_meta or _is_sharded(factor) for factor in pair):
                raise ValueError(f'save: "{path}": the adapter is on meta or sharded and has no values to save')
        settings = {path: layer.settings[adapter_name] for path, layer in layers.items()}
        targets = targets_for(layers, (path for path, _ in outer_modules(model) if path))
        write_adapter(directory, AdapterFile(dict(factors), settings, targets, base_model_name_or_path))

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == "LORA" and not config.get("use_dora")

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        """Onto a model that has the adapter with the same settings the values are copied into its parameters."""
        check_adapter("load", adapter_name, torch.float32)
        file = read_adapter(directory, use_dora=issubclass(self.module, DoRALinear))
        for path in file.factors:
            self._check_fits(model, path, file)
        _check_complete(model, file)
        existing = self.modules(model, adapter_name)
        if existing:
            theirs = {path: layer.settings[adapter_name] for path, layer in existing.items()}
            if theirs != file.settings:
                path = next(p for p in (*theirs, *file.settings) if theirs.get(p) != file.settings.get(p))
                raise ValueError(
                    f'load: the model has another adapter {adapter_name!r}: "{path}" is {theirs.get(path)} there '
                    f"and {file.settings.get(path)} in {directory}"
                )
            activate(model, adapter_name)
        else:
            self.put(model, file.settings, adapter_name)
        with torch.no_grad():
            for path, pair in file.factors.items():
                layer = cast(LowRankLinear, model.get_submodule(path))
                if layer.merged:
                    layer.unmerge()
                for own, read in zip(layer.adapter_parameters(adapter_name), pair):
                    own.copy_(read)

    def _check_fits(self, model: nn.Module, path: str, file: AdapterFile) -> None:
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f'load: the model has no "{path}"') from error
        layer = self.adaptable("load", path, module)
        if layer.weight.is_meta:
            raise ValueError(f'load: "{path}" is on the meta device; load the base model first')
        rank = file.settings[path].rank
        got = [list(factor.shape) for factor in file.factors[path]]
        wanted = [[rank, layer.in_features], [layer.out_features, rank], [layer.out_features]][: len(got)]
        if got != wanted:
            names = "lora_A and lora_B" if len(got) == 2 else "lora_A, lora_B and lora_magnitude_vector"
            raise ValueError(f'load: "{path}": {names} must have shapes {wanted}, got {got}')


def _check_complete(model: nn.Module, file: AdapterFile) -> None:
    """The file has tensors for all the linear layers that its config names."""
    if file.target_modules is None:
        return
    for path, module in outer_modules(model):
        if is_linear(module) and path not in file.factors and matches(path, file.target_modules):
            raise ValueError(f'load: the file is incomplete: its config names "{path}", its tensors do not')


class QLoRA(LoRA):
    """LoRA on a model whose linear layers are NF4: quantises them first, unless some are already. Its files are LoRA's,
    which do not say what the base was stored in: quantise the model that they are loaded onto."""

    name = "qlora"

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
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
        """See `peftkern.add_lora`, and for the last two `peftkern.nf4_quantize`."""
        settings = LoRASettings(rank, alpha, dropout, use_rslora)
        check_adapter(self.name, adapter_name, dtype)
        paths = self.select(self.name, model, target_modules, adapter_name)
        if not any(isinstance(module, NF4Linear) for module in model.modules()):
            quantize(model, block_size=block_size, double_quant=double_quant)
        self.put(model, {path: settings for path in paths}, adapter_name, dtype=dtype)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return False
