"""Bottleneck adapters on disk as AdapterHub's `adapters` 1.3 keeps them: `adapter_config.json` beside
`pytorch_adapter.bin` or `adapter.safetensors`."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.adapter_file import CONFIG_NAME, read_config, read_tensors, to_json, write_files
from peftkern.methods._sublayers import Place
from peftkern.nn.adapter import LEARNED, BottleneckAdapter, BottleneckSettings
from peftkern.ops._linear import FLOATING

BIN_NAME = "pytorch_adapter.bin"
SAFETENSORS_NAME = "adapter.safetensors"
# Which library's format: without a version it takes "gelu" for what it now calls "gelu_new".
VERSION = "adapters.1.3.0"

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "swish", "tanh": "tanh"}
_THEIRS = {
    **{theirs: ours for ours, theirs in _ACTIVATIONS.items()},
    "silu": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Options that change what is computed, with the values that BottleneckAdapter has.
_FIXED: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "phm_layer": False,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
}
# What the rest of its configuration is where it does not matter.
_UNUSED: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "residual_before_ln": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}

_KEY = re.compile(r"(?P<container>.+\.adapters)\.(?P<name>[^.]+)\.(?P<rest>adapter_.+|scaling)")

State = dict[str, Tensor]


@dataclass(frozen=True)
class File:
    """What the two files hold, on the paths of the model that they were read for.

    Attributes:
        plan: sublayer -> its adapter's settings.
        adapters: sublayer -> its adapter's state dict.
        norms: parameter's path -> the trained value.
    """

    plan: dict[Place, BottleneckSettings]
    adapters: dict[Place, State]
    norms: State


def is_bottleneck(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of a bottleneck adapter in AdapterHub's format."""
    inner = config.get("config")
    return isinstance(inner, dict) and inner.get("architecture") is None and "non_linearity" in inner


def write(
    directory: Path,
    model: nn.Module,
    plan: Mapping[Place, BottleneckSettings],
    adapters: Mapping[Place, State],
    norms: State,
    last_layer: int,
    adapter_name: str,
    base_model_name_or_path: str | None,
) -> None:
    """Writes `adapter_config.json` and `pytorch_adapter.bin`, whole or not at all.

    Raises:
        ValueError: the adapter's layers differ in more than which of them have it.
        OSError: they cannot be written.
    """
    settings = next(iter(plan.values()))
    kinds = {place.kind for place in plan}
    layers = {place.number for place in plan}
    if len(plan) != len(kinds) * len(layers) or len(set(plan.values())) != 1:
        raise ValueError(f"save: adapter {adapter_name!r} must be the same in all layers that have it")
    width = next(iter(adapters.values()))["adapter_up.weight"].shape[0]
    inner = {
        **_FIXED,
        **_UNUSED,
        "mh_adapter": "attention" in kinds,
        "output_adapter": "feed_forward" in kinds,
        "leave_out": [index for index in range(last_layer + 1) if index not in layers],
        "reduction_factor": _reduction(width, settings.bottleneck),
        "non_linearity": _ACTIVATIONS[settings.activation],
        "is_parallel": settings.parallel,
        "scaling": settings.scaling if settings.scaling == LEARNED else float(settings.scaling),
        "init_weights": settings.init,
    }
    base = getattr(model, "config", None)
    config = {
        "config": inner,
        "hidden_size": width,
        "model_class": type(model).__name__,
        "model_name": base_model_name_or_path or getattr(base, "name_or_path", None) or None,
        "model_type": getattr(base, "model_type", None),
        "name": adapter_name,
        "version": VERSION,
    }
    tensors = {
        f"{place.path(place.sublayer.container)}.{adapter_name}.{key}": tensor
        for place, state in adapters.items()
        for key, tensor in state.items()
    }
    content = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in {**tensors, **norms}.items()}, content)
    write_files(directory, {BIN_NAME: content.getvalue(), CONFIG_NAME: to_json(config)})
    # Another adapter's, which AdapterHub and `read` would prefer.
    (directory / SAFETENSORS_NAME).unlink(missing_ok=True)


def _reduction(width: int, bottleneck: int) -> float:
    """What AdapterHub gets `bottleneck` from as int(width // reduction)."""
    exact = width / bottleneck
    return exact if width // exact == bottleneck else math.nextafter(exact, 0)


def read(directory: Path, model: nn.Module, places: list[Place], width: int) -> File:
    """Reads both files and checks them against each other and the model.

    Args:
        directory: where they are.
        model: the one to load them onto.
        places: its sublayers.
        width: of its residual stream.

    Raises:
        FileNotFoundError: one is missing.
        TypeError, ValueError: one is corrupt, has an option that is not supported, they disagree, or they are of a
            model that is built otherwise.
        ImportError: the weights are a safetensors file and safetensors is not installed.
    """
    path = directory / CONFIG_NAME
    config = read_config(path)
    if not is_bottleneck(config):
        raise ValueError(f"load: {path} is not of a bottleneck adapter of AdapterHub")
    if config.get("hidden_size") not in (None, width):
        raise ValueError(f"load: {path}: hidden_size must be the model's {width}, got {config['hidden_size']}")
    plan = _plan(config, path, places, width)
    where = next((directory / n for n in (SAFETENSORS_NAME, BIN_NAME) if (directory / n).is_file()), None)
    if where is None:
        raise FileNotFoundError(f"load: {directory} has no {BIN_NAME} and no {SAFETENSORS_NAME}")
    tensors = read_tensors(where) if where.name == SAFETENSORS_NAME else _read_bin(where)

    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = {place.path(place.sublayer.container).removeprefix(prefix): place for place in places}
    adapters: dict[Place, State] = {place: {} for place in plan}
    norms: State = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATING or not torch.isfinite(tensor).all():
            raise ValueError(f'load: {where}: "{key}" must be finite floating-point values, got {tensor.dtype}')
        parts = _KEY.fullmatch(key)
        if parts is None:
            norms[_own_name(model, key, prefix)] = tensor
            continue
        place = own.get(parts["container"].removeprefix(prefix))
        if place not in adapters or parts["name"] != config.get("name", parts["name"]):
            raise ValueError(f'load: {where}: "{key}" has no place in {type(model).__name__} as {path} describes it')
        adapters[place][parts["rest"]] = tensor
    for place, settings in plan.items():
        wanted = {key: list(t.shape) for key, t in _empty(width, settings).items()}
        got = {key: list(t.shape) for key, t in adapters[place].items()}
        if got != wanted:
            at = place.path(place.sublayer.container)
            raise ValueError(f'load: {where}: "{at}" must have {wanted}, got {got or "nothing"}')
    return File(plan, adapters, norms)


def _own_name(model: nn.Module, key: str, prefix: str) -> str:
    """A parameter's path in the model, which may have or lack the base model's prefix."""
    modules = {path for path, _ in model.named_modules()}
    bare = key.removeprefix(prefix)
    for candidate in (bare, prefix + bare):
        if candidate.rpartition(".")[0] in modules:
            return candidate
    raise ValueError(f'load: the file has "{key}", {type(model).__name__} has no such module')


def _empty(width: int, settings: BottleneckSettings) -> State:
    """A state dict without values, for its shapes."""
    return BottleneckAdapter(width, settings, device="meta").state_dict()


def _read_bin(path: Path) -> State:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"load: {path} is corrupt or not of tensors alone: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"load: {path} must hold a state dict, got {type(tensors).__name__}")
    return tensors


def _plan(config: Mapping[str, Any], path: Path, places: list[Place], width: int) -> dict[Place, BottleneckSettings]:
    inner = config["config"]
    for key, value in _FIXED.items():
        if inner.get(key, value) not in (value, None):
            raise ValueError(f"load: {path}: {key} is not supported, got {inner[key]!r}")
    activation = str(inner["non_linearity"]).lower()
    if "version" not in config:
        activation = _BEFORE_VERSIONS.get(activation, activation)
    if activation not in _THEIRS:
        raise ValueError(f"load: {path}: non_linearity must be one of {', '.join(_THEIRS)}, got {activation!r}")
    try:
        common = BottleneckSettings(
            activation=_THEIRS[activation],
            scaling=inner.get("scaling", 1.0),
            parallel=inner.get("is_parallel", False),
            init=inner.get("init_weights", "bert"),
            init_scale=1e-2,
        )
        wanted = {"attention": inner.get("mh_adapter"), "feed_forward": inner.get("output_adapter")}
        left_out = set(inner.get("leave_out") or ())
        plan = {
            place: replace(common, bottleneck=_bottleneck(inner.get("reduction_factor"), place.number, width))
            for place in places
            if wanted[place.kind] and place.number not in left_out
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {path}: {error}") from error
    if not plan:
        raise ValueError(f"load: {path} has adapters in none of the model's {places[-1].number + 1} layers")
    return plan


def _bottleneck(reduction: Any, layer: int, width: int) -> int:
    if isinstance(reduction, Mapping):
        if (found := reduction.get(str(layer), reduction.get("default"))) is None:
            raise ValueError(f"reduction_factor has neither layer {layer} nor a default")
        reduction = found
    if isinstance(reduction, bool) or not isinstance(reduction, int | float) or not reduction > 0:
        raise ValueError(f"reduction_factor must be a positive number, got {reduction!r}")
    return max(1, int(width // reduction))
