"""Prefix tuning (arXiv 2101.00190) on whole models: trained keys and values before every layer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern._modules import activate
from peftkern.adapter_file import (
    CONFIG_NAME,
    TENSORS_NAME,
    check_pair,
    read_config,
    read_tensors,
    to_json,
    to_safetensors,
    write_files,
)
from peftkern.methods._method import Method
from peftkern.methods._prefix_model import (
    CHILD,
    Sizes,
    check_length,
    check_prefix_model,
    prefix_of,
    put_prefix,
    text_embeddings,
    use_prefix_attention,
)
from peftkern.nn._adapters import AdapterModule
from peftkern.nn.prefix import Prefix, PrefixSettings, check_prefix
from peftkern.ops._linear import FLOATING

PEFT_TYPE = "PREFIX_TUNING"
EMBEDDINGS = "prompt_embeddings"
# Beside PEFT's two files: what a reparametrised prefix goes on training with. PEFT does not store it.
ENCODER_NAME = "prefix_encoder.safetensors"
# End of a transformers class -> PEFT's name of its task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class PrefixMethod(Method):
    """What prefix tuning and P-tuning v2 share, on Llama, Mistral, Qwen2, Gemma, GPT-2 and BERT of transformers.

    The prefix is in no key-value cache, so that gradient checkpointing and generation work. Positions of tokens begin
    behind it, as in PEFT. Of a sliding window it is always in sight, which PEFT's is not once the window has passed it.
    """

    module = Prefix

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        """A reparametrisation goes into a third file, which PEFT does not read."""
        prefix = cast(Prefix, prefix_of(model))
        if any(parameter.is_meta for parameter in prefix.adapter_parameters(adapter_name)):
            raise ValueError(f"save: the prefix {adapter_name!r} is on meta and has no values to save")
        settings, encoder = prefix.settings[adapter_name], prefix.reparametrisation(adapter_name)
        config = {
            "peft_type": PEFT_TYPE,
            "task_type": _task(model),
            "base_model_name_or_path": base_model_name_or_path,
            "inference_mode": True,
            "num_virtual_tokens": settings.length,
            "token_dim": prefix.kv_heads * prefix.head_dim,
            "num_attention_heads": prefix.kv_heads,
            "num_layers": prefix.num_layers,
            "num_transformer_submodules": 1,
            "prefix_projection": encoder is not None,
            "encoder_hidden_size": settings.hidden or prefix.kv_heads * prefix.head_dim,
            "init_weights": "zero" if settings.init == "zero" else None,
            **self._more_config(model, adapter_name),
        }
        tensors = {EMBEDDINGS: prefix.prompt_embeddings(adapter_name), **self._more_tensors(model, adapter_name)}
        contents = {TENSORS_NAME: to_safetensors(tensors), CONFIG_NAME: to_json(config)}
        if encoder is not None:
            contents = {ENCODER_NAME: to_safetensors(encoder), **contents}
        write_files(directory, contents)

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        """A reparametrisation beside PEFT's files is taken up again if it gives the prefix that they hold."""
        check_pair(directory)
        config = read_config(directory / CONFIG_NAME)
        tensors = read_tensors(directory / TENSORS_NAME)
        sizes = check_prefix_model("load", model)
        settings = _settings_of(directory, config, tensors, sizes)
        check_length("load", model, settings.length)
        self._check_more("load", model, directory, tensors)
        encoder = self._encoder(directory, config, settings, sizes, tensors[EMBEDDINGS])
        if encoder is not None:
            settings = replace(settings, hidden=encoder.settings["default"].hidden)
        self._install(model, adapter_name, settings, None, torch.float32)
        prefix = cast(Prefix, prefix_of(model))
        if encoder is None:
            prefix.set_prompt_embeddings(adapter_name, tensors[EMBEDDINGS])
        else:
            prefix.encoders[adapter_name].load_state_dict(encoder.encoders["default"].state_dict())
        self._copy_more(model, adapter_name, tensors)

    def modules(self, model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterModule]:
        """The methods share a module, and know their adapters by the settings."""
        return {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, Prefix)
            and any(s.method == self.name and adapter_name in (None, n) for n, s in module.settings.items())
        }

    def _install(
        self,
        model: nn.Module,
        adapter_name: str,
        settings: PrefixSettings,
        text_ids: Sequence[int] | Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        check_prefix(self.name, adapter_name, dtype)
        sizes = check_prefix_model(self.name, model)
        check_length(self.name, model, settings.length)
        existing = prefix_of(model)
        if existing is None and hasattr(model, CHILD):
            raise ValueError(f"{self.name}: the model has a {CHILD!r} of its own")
        if existing is not None and adapter_name in existing.settings:
            raise ValueError(f"{self.name}: the model has a prefix {adapter_name!r} already")
        text = (
            None
            if text_ids is None
            else text_embeddings(self.name, model, sizes, torch.as_tensor(text_ids, device="cpu"))
        )
        model.requires_grad_(False)
        device = next(model.parameters()).device
        if existing is None:
            prefix = Prefix(*sizes, **_options(settings), adapter_name=adapter_name, dtype=dtype, device=device)
            put_prefix(model, prefix)
        else:
            prefix = existing
            prefix.add_adapter(adapter_name, **_options(settings), dtype=dtype, device=device)
            use_prefix_attention(model)
        prefix.settings[adapter_name] = replace(settings, method=self.name)
        if text is not None:
            prefix.set_prompt_embeddings(adapter_name, text)
        activate(model, adapter_name)

    def _encoder(
        self,
        directory: Path,
        config: Mapping[str, Any],
        settings: PrefixSettings,
        sizes: Sizes,
        embeddings: Tensor,
    ) -> Prefix | None:
        """The reparametrised prefix that the third file holds, if there is one that belongs to the two others."""
        path = directory / ENCODER_NAME
        if not config.get("prefix_projection") or not path.is_file():
            return None
        prefix = Prefix(*sizes, **_options(replace(settings, hidden=_width(path, config))))
        state = read_tensors(path)
        wanted = prefix.encoders["default"].state_dict()
        for name in sorted(wanted.keys() ^ state.keys()):
            raise ValueError(f'load: {path} {"has no" if name in wanted else "must not have"} "{name}"')
        for name, tensor in state.items():
            check_values(path, name, tensor, list(wanted[name].shape))
        prefix.encoders["default"].load_state_dict(state)
        found = prefix.prompt_embeddings("default")
        if not torch.allclose(found, embeddings.to(found.dtype), rtol=1e-4, atol=1e-5):
            raise ValueError(f"load: {path} does not give the prefix of {TENSORS_NAME} beside it")
        return prefix

    # What P-tuning v2 has more.

    def _more_config(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        return {}

    def _more_tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        return {}

    def _check_more(self, op: str, model: nn.Module, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            if name != EMBEDDINGS:
                raise ValueError(f'{op}: {directory / TENSORS_NAME} must not have "{name}"')

    def _copy_more(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        pass


class PrefixTuning(PrefixMethod):
    """A prefix for every layer, zero at first or a text's; PEFT's files."""

    name = "prefix_tuning"

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        length: int | None = None,
        init: str = "zero",
        hidden: int | None = None,
        dropout: float = 0.0,
        text_ids: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`length` is 20 by default, or that of `text_ids`: token ids of a text whose keys and values in this model the
        prefix begins with. `hidden` is the width of the reparametrisation, which is saved so that training resumes."""
        self._install(model, adapter_name, self._settings(length, init, hidden, dropout, text_ids), text_ids, dtype)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] == PEFT_TYPE and not config.get("modules_to_save")

    def _settings(
        self,
        length: int | None,
        init: str,
        hidden: int | None,
        dropout: float,
        text_ids: Sequence[int] | Tensor | None,
    ) -> PrefixSettings:
        if text_ids is None:
            return PrefixSettings(20 if length is None else length, init, hidden, dropout)
        if hidden is not None:
            raise ValueError(f"{self.name}: hidden must be None with text_ids, which are keys and values")
        if length not in (None, len(text_ids)):
            raise ValueError(f"{self.name}: length must be that of text_ids, {len(text_ids)}, got {length}")
        return PrefixSettings(len(text_ids), init, None, dropout)


def _options(settings: PrefixSettings) -> dict[str, Any]:
    """Of Prefix and of its add_adapter."""
    return {name: getattr(settings, name) for name in ("length", "init", "hidden", "dropout")}


def _task(model: nn.Module) -> str | None:
    """PEFT's name of what a model is for."""
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), "FEATURE_EXTRACTION")


def _width(path: Path, config: Mapping[str, Any]) -> int:
    width = config.get("encoder_hidden_size")
    if type(width) is not int or width < 1:
        raise ValueError(f"load: {path}: encoder_hidden_size must be a positive int, got {width!r}")
    return width


def check_values(path: Path, name: str, tensor: Tensor, shape: list[int]) -> None:
    """Raises ValueError unless a tensor of a file is finite and of this shape."""
    if tensor.dtype not in FLOATING or list(tensor.shape) != shape or not torch.isfinite(tensor).all():
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f'load: {path}: "{name}" must be finite, floating point and {shape}, got {got}')


def _settings_of(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sizes: Sizes
) -> PrefixSettings:
    """The settings of a prefix in PEFT's files, which are checked against each other and the model's sizes."""
    where = directory / CONFIG_NAME
    if config["peft_type"] != PEFT_TYPE:
        raise ValueError(f"load: {where}: peft_type must be {PEFT_TYPE!r}, got {config['peft_type']!r}")
    if config.get("num_transformer_submodules") not in (None, 1):
        got = config["num_transformer_submodules"]
        raise ValueError(f"load: {where}: num_transformer_submodules must be 1, got {got!r}")
    width = sizes.kv_heads * sizes.head_dim
    for key, value in (
        ("num_layers", sizes.num_layers),
        ("num_attention_heads", sizes.kv_heads),
        ("token_dim", width),
    ):
        if config.get(key) not in (None, value):
            raise ValueError(f"load: {where}: {key} must be the model's {value}, got {config[key]!r}")
    if EMBEDDINGS not in tensors:
        raise ValueError(f'load: {directory / TENSORS_NAME} has no "{EMBEDDINGS}"')
    try:
        settings = PrefixSettings(
            config.get("num_virtual_tokens"),  # type: ignore[arg-type]
            "zero" if config.get("init_weights") == "zero" else "normal",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {where}: num_virtual_tokens: {error}") from error
    shape = [settings.length, sizes.num_layers * 2 * width]
    check_values(directory / TENSORS_NAME, EMBEDDINGS, tensors[EMBEDDINGS], shape)
    return settings
