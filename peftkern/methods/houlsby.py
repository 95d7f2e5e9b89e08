"""Houlsby adapters (arXiv 1902.00751) on whole models: a bottleneck behind every attention and feed-forward block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern._modules import activate, outer_modules, places, put
from peftkern.methods import _adapterhub as adapterhub
from peftkern.methods._method import Method
from peftkern.methods._sublayers import Place, sublayers
from peftkern.nn._adapters import AdapterModule, check_name
from peftkern.nn.adapter import AdaptedNorm, AdaptedSublayer, BottleneckSettings, check_dtype
from peftkern.nn.nf4_linear import _is_sharded

# A sublayer and the settings-to-be of its adapter.
Plan = dict[Place, BottleneckSettings]


class Houlsby(Method):
    """Bottleneck adapters behind the sublayers of BERT-, GPT-2- and Llama-class models, before the residual is added.

    The base may be of any kind, NF4 among them. Adapters cannot be merged. Files are AdapterHub's.

    Defaults are those of the paper's code (m = 64, GELU, weights from a truncated normal distribution of 1e-3), where
    AdapterHub's "double_seq_bn" has width / 16, Swish and N(0, 0.02). The paper also trains the norms and the task's
    head: `train_norms` does the former; of the head, set `requires_grad` yourself. AdapterHub trains neither.
    """

    name = "houlsby"
    module = AdaptedSublayer

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        bottleneck: int = 64,
        activation: str = "gelu",
        scaling: float | str = 1.0,
        parallel: bool = False,
        init: str = "houlsby",
        init_scale: float = 1e-3,
        after_attention: bool = True,
        after_feed_forward: bool = True,
        leave_out: Iterable[int] = (),
        train_norms: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`leave_out` are numbers of layers without adapters; for the others see `BottleneckSettings`."""
        settings = BottleneckSettings(bottleneck, activation, scaling, parallel, init, init_scale)
        check_dtype(self.name, dtype)
        wanted = {"attention": after_attention, "feed_forward": after_feed_forward}
        found, left_out = sublayers(self.name, model), set(leave_out)
        last = found[-1].number
        if stray := [index for index in left_out if type(index) is not int or not 0 <= index <= last]:
            raise ValueError(f"{self.name}: leave_out must be numbers of layers from 0 to {last}, got {stray[0]!r}")
        plan = {place: settings for place in found if wanted[place.kind] and place.number not in left_out}
        if not plan:
            raise ValueError(
                f"{self.name}: after_attention, after_feed_forward and leave_out must leave a sublayer, got "
                f"{after_attention}, {after_feed_forward} and {sorted(left_out)}"
            )
        norms = _norms(model) if train_norms else []
        self._check(self.name, model, plan, adapter_name)
        self._put(model, plan, norms, adapter_name, dtype)

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        """AdapterHub's `adapter_config.json` and `pytorch_adapter.bin`. The latter has trained norms under their names
        in the model, where AdapterHub puts them when it loads."""
        found = cast("dict[str, AdaptedSublayer]", self.modules(model, adapter_name))
        plan, adapters = {}, {}
        for place in sublayers("save", model):
            layer = found.pop(place.output, None)
            if layer is not None:
                plan[place] = layer.settings[adapter_name]
                adapters[place] = layer.adapters[adapter_name].state_dict()
        if found or not plan:
            raise ValueError(
                f'save: adapter {adapter_name!r} is not at a sublayer of the model: "{min(found, default="")}"'
            )
        norms = {
            f"{path}.{name}": tensor
            for path, module in _adapted_norms(model, adapter_name).items()
            for name, tensor in module.adapters[adapter_name].state_dict().items()
        }
        for tensor in (*norms.values(), *(tensor for state in adapters.values() for tensor in state.values())):
            if tensor.is_meta or _is_sharded(tensor):
                raise ValueError(f"save: adapter {adapter_name!r} is on meta or sharded and has no values to save")
        last = max(place.number for place in sublayers("save", model))
        adapterhub.write(directory, model, plan, adapters, norms, last, adapter_name, base_model_name_or_path)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return adapterhub.is_bottleneck(config)

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        """Also what AdapterHub wrote: bottlenecks that it adds to the sublayer's output before the residual ("houlsby",
        "double_seq_bn") or in parallel ("par_bn"), on all or some layers."""
        check_name("load", adapter_name)
        found = sublayers("load", model)
        width = _width(model, found[0])
        file = adapterhub.read(directory, model, found, width)
        self._check("load", model, file.plan, adapter_name)
        norms = sorted({key.rpartition(".")[0] for key in file.norms})
        _check_norms(model, norms, file.norms)
        self._put(model, file.plan, norms, adapter_name, torch.float32)
        for place, state in file.adapters.items():
            layer = cast(AdaptedSublayer, model.get_submodule(place.output))
            layer.adapters[adapter_name].load_state_dict(state)
        with torch.no_grad():
            for key, tensor in file.norms.items():
                path, _, name = key.rpartition(".")
                twin = cast(AdaptedNorm, model.get_submodule(path)).adapters[adapter_name]
                twin.get_parameter(name).copy_(tensor)

    def _check(self, op: str, model: nn.Module, plan: Plan, adapter_name: str) -> None:
        for place in plan:
            module = model.get_submodule(place.output)
            if isinstance(module, AdapterModule) and type(module) is not self.module:
                kind = type(module).__name__
                raise ValueError(f'{op}: "{place.output}" has adapters of another method, it is a {kind}')
            if isinstance(module, AdaptedSublayer) and adapter_name in module.settings:
                raise ValueError(f'{op}: "{place.output}" has an adapter {adapter_name!r} already')

    def _put(self, model: nn.Module, plan: Plan, norms: list[str], adapter_name: str, dtype: torch.dtype) -> None:
        """Adds the adapter, active and alone trainable. Everything was checked."""
        model.requires_grad_(False)
        found = places(model)
        for place, settings in plan.items():
            layer = model.get_submodule(place.output)
            weight = _norm_weight(model, place)
            if isinstance(layer, AdaptedSublayer):
                layer.add_adapter(adapter_name, settings, dtype, weight.device)
            else:
                base = layer
                layer = AdaptedSublayer(base, weight.numel(), settings, adapter_name, dtype, weight.device)
                put(model, found[base], layer)
            if settings.parallel:
                source = model.get_submodule(place.path(place.sublayer.source))
                layer.take_input_of(source, place.sublayer.argument)
        for path in norms:
            norm = model.get_submodule(path)
            if isinstance(norm, AdaptedNorm):
                norm.add_adapter(adapter_name)
            else:
                put(model, found[norm], AdaptedNorm(norm, adapter_name))
        activate(model, adapter_name)


def _norm_weight(model: nn.Module, place: Place) -> Tensor:
    norm = model.get_submodule(place.path(place.norm))
    return cast(Tensor, (norm.base_layer if isinstance(norm, AdaptedNorm) else norm).weight)


def _width(model: nn.Module, place: Place) -> int:
    return _norm_weight(model, place).numel()


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, LlamaRMSNorm and what else normalises with parameters of its own."""
    return type(module).__name__.endswith("Norm") and bool(module._parameters) and not module._modules


def _norms(model: nn.Module) -> list[str]:
    return [path for path, module in outer_modules(model) if isinstance(module, AdaptedNorm) or _is_norm(module)]


def _adapted_norms(model: nn.Module, adapter_name: str) -> dict[str, AdaptedNorm]:
    modules = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedNorm)}
    return {path: module for path, module in modules.items() if adapter_name in module.settings}


def _check_norms(model: nn.Module, norms: list[str], tensors: Mapping[str, Tensor]) -> None:
    """The model has these norms, and the tensors are all of their parameters."""
    known = set(_norms(model))
    for path in norms:
        if path not in known:
            raise ValueError(f'load: the file has a norm "{path}", the model has none there')
        module = model.get_submodule(path)
        base = module.base_layer if isinstance(module, AdaptedNorm) else module
        wanted = {f"{path}.{name}": list(p.shape) for name, p in cast(nn.Module, base).named_parameters()}
        got = {key: list(t.shape) for key, t in tensors.items() if key.rpartition(".")[0] == path}
        if got != wanted:
            raise ValueError(f'load: "{path}" must have {wanted}, got {got}')
