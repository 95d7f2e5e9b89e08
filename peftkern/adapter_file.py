"""Adapters on disk as HF PEFT 0.21 stores them, `adapter_config.json` beside `adapter_model.safetensors`; LoRA's."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.nn._low_rank_linear import LoRASettings
from peftkern.nn.dora_linear import DoRASettings
from peftkern.ops._linear import FLOATING

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
# In the order of the layers' `adapter_parameters`; the magnitude is DoRA's.
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_KEY = re.compile(rf"base_model\.model\.(?P<path>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# PEFT options that change what the layer computes, or which tensors are trained.
_UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) also changed the base weights the adapter belongs to.
_ADAPTER_ONLY_INITS = (True, False, "gaussian", "orthogonal", "eva")

Targets = str | list[str]


@dataclass(frozen=True)
class AdapterFile:
    """What the two files hold.

    Attributes:
        factors: path of the linear layer in the base model -> (A [rank, in], B [out, rank]), for DoRA (A, B, m [out]).
        settings: path -> the layer's settings.
        target_modules: by which PEFT finds the layers, see `matches`; None if other options narrow them down.
        base_model_name_or_path: what PEFT records of the base model.
    """

    factors: dict[str, tuple[Tensor, ...]]
    settings: dict[str, LoRASettings]
    target_modules: Targets | None
    base_model_name_or_path: str | None = None


def matches(path: str, targets: Targets) -> bool:
    """PEFT's rule: a str is a regular expression for the whole path, a list holds paths or dotted ends of them."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith("." + target) for target in targets)


def targets_for(paths: Iterable[str], modules: Iterable[str]) -> Targets:
    """The shortest `target_modules` that match `paths` and no other of the model's `modules`."""
    wanted, modules = set(paths), list(modules)
    ends = sorted({path.rpartition(".")[2] for path in wanted})
    for targets in (ends, sorted(wanted)):
        if {module for module in modules if matches(module, targets)} == wanted:
            return targets
    return "|".join(map(re.escape, sorted(wanted)))


def write_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files so that each is old or new, never half: all to temporary names first, then renames.

    Raises:
        OSError: the directory cannot be made, or the disk is full; no file has changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staged = {directory / f".{name}.{os.getpid()}.partial": name for name in contents}
    try:
        for temporary, name in staged.items():
            temporary.write_bytes(contents[name])
        for temporary, name in staged.items():
            os.replace(temporary, directory / name)
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapter files need safetensors: pip install 'peftkern[hf]'") from error
    return safetensors


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file that holds copies of these tensors, from whatever device.

    Raises:
        ImportError: safetensors is not installed.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return _safetensors().torch.save(own, metadata={"format": "pt"})


def to_json(config: Mapping[str, Any]) -> bytes:
    """The content of an `adapter_config.json`."""
    return (json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_pair(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes PEFT's two files, whole or not at all.

    Raises:
        OSError: they cannot be written.
        ImportError: safetensors is not installed.
    """
    write_files(directory, {TENSORS_NAME: to_safetensors(tensors), CONFIG_NAME: to_json(config)})


def check_pair(directory: Path) -> None:
    """Raises FileNotFoundError unless `directory` has both of PEFT's files."""
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"load: {directory} has no {name}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is corrupt.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {path} is corrupt: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """An `adapter_config.json` of any method. Its "peft_type" is None if AdapterHub wrote it.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not a JSON object with a "peft_type" or AdapterHub's "config".
    """
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"load: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load: {path} must be a JSON object, got {type(config).__name__}")
    if config.setdefault("peft_type", None) is None and "config" not in config:
        raise ValueError(f"load: {path} has no 'peft_type'")
    return config


def _whole(number: float) -> float:
    """16.0 as 16: PEFT types alpha as an int."""
    return int(number) if float(number).is_integer() else number


def _common(values: Iterable[Any], what: str) -> Any:
    found = set(values)
    if len(found) > 1:
        raise ValueError(f"save: {what} must be one value for all layers, got {sorted(found)}")
    return found.pop()


def _config(file: AdapterFile) -> dict[str, Any]:
    settings = file.settings
    rank, alpha = Counter((s.rank, s.alpha) for s in settings.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": file.base_model_name_or_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": _common((s.dropout for s in settings.values()), "dropout"),
        "use_rslora": _common((s.use_rslora for s in settings.values()), "use_rslora"),
        "target_modules": file.target_modules,
        # PEFT matches these keys as ends of a path unless ^ ties them to its start.
        "rank_pattern": {f"^{re.escape(path)}": s.rank for path, s in settings.items() if s.rank != rank},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(s.alpha) for path, s in settings.items() if s.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "use_dora": isinstance(next(iter(settings.values())), DoRASettings),
    }


def write_adapter(directory: Path, file: AdapterFile) -> None:
    """Writes both files, whole or not at all.

    Raises:
        ValueError: dropout or use_rslora differ between layers, which PEFT's format has no room for.
        OSError: they cannot be written.
        ImportError: safetensors is not installed.
    """
    tensors = {
        f"base_model.model.{path}.{part}": tensor
        for path, factors in file.factors.items()
        for part, tensor in zip(_PARTS, factors)
    }
    write_pair(directory, _config(file), tensors)


def read_adapter(directory: Path, use_dora: bool = False) -> AdapterFile:
    """Reads both files and checks them against each other.

    Args:
        directory: where they are.
        use_dora: whether they must be DoRA's, or LoRA's.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is corrupt, not a LoRA adapter, uses a PEFT option that is not supported, or they disagree.
        ImportError: safetensors is not installed.
    """
    check_pair(directory)
    config = _read_lora_config(directory / CONFIG_NAME)
    if bool(config.get("use_dora")) != use_dora:
        raise ValueError(
            f"load: {directory / CONFIG_NAME}: use_dora is not supported by this method, got {config.get('use_dora')!r}"
        )
    where = str(directory / TENSORS_NAME)
    wanted = _PARTS if config.get("use_dora") else _PARTS[:2]
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(directory / TENSORS_NAME).items():
        parts = _KEY.fullmatch(key)
        if parts is None or parts["part"] not in wanted:
            raise ValueError(f'load: {where}: "{key}" is not a linear layer\'s {", ".join(wanted)}')
        is_vector = parts["part"] == _PARTS[2]
        if tensor.dtype not in FLOATING or tensor.dim() != 2 - is_vector or not torch.isfinite(tensor).all():
            got, shape = f"{tensor.dtype} {list(tensor.shape)}", "vector" if is_vector else "matrix"
            raise ValueError(f'load: {where}: "{key}" must be a finite floating-point {shape}, got {got}')
        pairs.setdefault(parts["path"], {})[parts["part"]] = tensor
    if not pairs:
        raise ValueError(f"load: {where} has no tensors")

    factors, settings = {}, {}
    for path, pair in pairs.items():
        if len(pair) != len(wanted):
            raise ValueError(
                f'load: {where}: "{path}" has {" and ".join(sorted(p.removesuffix(".weight") for p in pair))} alone'
            )
        settings[path] = _settings(config, path)
        factors[path] = tuple(pair[part] for part in wanted)
        a, b = factors[path][:2]
        if not a.shape[0] == b.shape[1] == settings[path].rank:
            got = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
            raise ValueError(f'load: {where}: "{path}" must have rank {settings[path].rank}, got {got}')
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    targets = None if narrowed or config["target_modules"] == "all-linear" else config["target_modules"]
    return AdapterFile(factors, settings, targets, config.get("base_model_name_or_path"))


def _read_lora_config(path: Path) -> dict[str, Any]:
    """The config, checked as far as it does not depend on a layer."""
    config = read_config(path)
    for key in _REQUIRED:
        if key not in config:
            raise ValueError(f"load: {path} has no {key!r}")
    if config["peft_type"] != "LORA":
        raise ValueError(f"load: {path}: peft_type must be 'LORA', got {config['peft_type']!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"load: {path}: {key} is not supported, got {config[key]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"load: {path}: bias must be 'none', got {config['bias']!r}")
    if config.get("init_lora_weights", True) not in _ADAPTER_ONLY_INITS:
        init = config["init_lora_weights"]
        raise ValueError(f"load: {path}: init_lora_weights={init!r} belongs to changed base weights")
    targets = config["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"load: {path}: target_modules must be a str or a list of them, got {targets!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"load: {path}: {key} must be an object, got {config[key]!r}")
    try:
        for pattern in (targets if isinstance(targets, str) else "", *_patterns(config)):
            re.compile(pattern)
        _settings(config, "")
        for key, field in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            for value in (config.get(key) or {}).values():
                LoRASettings(**{field: value})
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(f"load: {path}: {error}") from error
    return config


def _patterns(config: Mapping[str, Any]) -> list[str]:
    return [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that PEFT would match against `path`."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, default)


def _settings(config: Mapping[str, Any], path: str) -> LoRASettings:
    return (DoRASettings if config.get("use_dora") else LoRASettings)(
        rank=_by_pattern(config.get("rank_pattern"), path, config["r"]),
        alpha=_by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]),
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=config.get("use_rslora", False),
    )
