"""(IA)^3 (arXiv 2205.05638) on whole models: scales on keys, values and the feed-forward block's inner activations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern._modules import outer_modules
from peftkern.adapter_file import (
    CONFIG_NAME,
    TENSORS_NAME,
    Targets,
    check_pair,
    matches,
    read_config,
    read_tensors,
    targets_for,
    write_pair,
)
from peftkern.methods._linear import LinearMethod, select
from peftkern.nn._low_rank_linear import check_adapter
from peftkern.nn.ia3_linear import IA3Linear, IA3Settings
from peftkern.ops._linear import FLOATING

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.ia3_l")
_LLAMA = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
_BERT_OUTPUT = r".*\.layer\.\d+\.output\.dense"
_BERT = (rf".*\.attention\.self\.(key|value)|{_BERT_OUTPUT}", _BERT_OUTPUT)
# model_type -> (targets, those of them whose input is scaled): keys and values after projection, and the activations
# between the feed-forward block's layers. HF PEFT's table has queries instead of keys for several of these, and its
# BERT pattern takes attention.output.dense as well.
DEFAULT_TARGETS: dict[str, tuple[Targets, Targets]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("phi", "opt"), (["k_proj", "v_proj", "fc2"], ["fc2"])),
    "gptj": (["k_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neo": (["k_proj", "v_proj", "mlp.c_proj"], ["mlp.c_proj"]),
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
    **dict.fromkeys(("t5", "mt5"), (["k", "v", "wo"], ["wo"])),
}


@dataclass(frozen=True)
class _File:
    scales: dict[str, Tensor]
    settings: dict[str, IA3Settings]


class IA3(LinearMethod):
    """(IA)^3; PEFT's files."""

    name = "ia3"
    module = IA3Linear
    mergeable = True

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        target_modules: str | Iterable[str] | None = None,
        feedforward_modules: str | Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_adapter(self.name, adapter_name, dtype)
        if target_modules is None:
            if feedforward_modules is not None:
                raise ValueError("ia3: feedforward_modules must come with target_modules")
            target_modules, feedforward_modules = _default_targets(model)
        paths = self.select(self.name, model, target_modules, adapter_name)
        inputs = set() if not feedforward_modules else set(select(self.name, model, feedforward_modules))
        if stray := inputs - set(paths):
            raise ValueError(f'ia3: feedforward_modules must be among target_modules, "{min(stray)}" is not')
        self.put(model, {path: IA3Settings(path in inputs) for path in paths}, adapter_name, dtype=dtype)

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        layers = cast("dict[str, IA3Linear]", self.modules(model, adapter_name))
        for path, layer in layers.items():
            if not path or layer.scale(adapter_name).is_meta:
                raise ValueError(f'save: "{path}": the adapter is the whole model or on meta')
        modules = [path for path, _ in outer_modules(model) if path]
        inputs = [path for path, layer in layers.items() if layer.settings[adapter_name].is_feedforward]
        config = {
            "peft_type": "IA3",
            "task_type": None,
            "base_model_name_or_path": base_model_name_or_path,
            "inference_mode": True,
            "target_modules": targets_for(layers, modules),
            "feedforward_modules": targets_for(inputs, modules) if inputs else [],
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
            "modules_to_save": None,
        }
        tensors = {f"base_model.model.{path}.ia3_l": layer.scale(adapter_name) for path, layer in layers.items()}
        write_pair(directory, config, tensors)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == "IA3"

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        file = _read(directory)
        for path, scale in file.scales.items():
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f'load: the model has no "{path}"') from error
            layer = self.adaptable("load", path, module)
            wanted = [1, layer.in_features] if file.settings[path].is_feedforward else [layer.out_features, 1]
            if list(scale.shape) != wanted:
                raise ValueError(f'load: "{path}": ia3_l must have shape {wanted}, got {list(scale.shape)}')
        self.put(model, file.settings, adapter_name)
        with torch.no_grad():
            for path, scale in file.scales.items():
                cast(IA3Linear, model.get_submodule(path)).scale(adapter_name).copy_(scale)


def _default_targets(model: nn.Module) -> tuple[Targets, Targets]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        known = ", ".join(DEFAULT_TARGETS)
        raise ValueError(f"ia3: target_modules must be given for model_type {kind!r}; there are defaults for {known}")
    return DEFAULT_TARGETS[kind]


def _read(directory: Path) -> _File:
    check_pair(directory)
    config, where = read_config(directory / CONFIG_NAME), directory / TENSORS_NAME
    for key in ("modules_to_save", "fan_in_fan_out"):
        if config.get(key):
            raise ValueError(f"load: {directory / CONFIG_NAME}: {key} is not supported, got {config[key]!r}")
    inputs = config.get("feedforward_modules") or []
    if not isinstance(inputs, str) and not (isinstance(inputs, list) and all(isinstance(i, str) for i in inputs)):
        raise ValueError(
            f"load: {directory / CONFIG_NAME}: feedforward_modules must be a str or a list, got {inputs!r}"
        )
    scales: dict[str, Tensor] = {}
    for key, tensor in read_tensors(where).items():
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise ValueError(f'load: {where}: "{key}" is not a linear layer\'s ia3_l')
        if tensor.dtype not in FLOATING or tensor.dim() != 2 or not torch.isfinite(tensor).all():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f'load: {where}: "{key}" must be a finite floating-point matrix, got {got}')
        scales[parts["path"]] = tensor
    if not scales:
        raise ValueError(f"load: {where} has no tensors")
    return _File(scales, {path: IA3Settings(matches(path, inputs)) for path in scales})
