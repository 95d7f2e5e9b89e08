"""P-tuning v1 (Liu et al., arXiv 2103.10385) on whole models: a prompt that an encoder computes, anywhere in the
input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern._modules import activate
from peftkern.adapter_file import CONFIG_NAME, TENSORS_NAME, read_tensors, to_json, to_safetensors, write_files
from peftkern.methods._prompts import EMBEDDINGS_KEY, PromptMethod, check_values
from peftkern.nn.prompt import PromptEncoder, PromptEncoderSettings

# PEFT's two files hold what the encoder computes; this one holds the encoder, so that training can go on.
ENCODER_NAME = "prompt_encoder.safetensors"
# PEFT has prefixes alone: it must not read a template's prompt as one.
TEMPLATE_TYPE = "P_TUNING_TEMPLATE"
# Another machine's sums, rounded elsewhere: of fp32 values of about 1, with room.
SAME_PROMPT = 1e-3


class PTuning(PromptMethod):
    """An encoded prompt before the input of a transformers model, or where its pseudo tokens are; PEFT's files, and the
    encoder beside them."""

    name = "p_tuning"
    module = PromptEncoder
    peft_type = "P_TUNING"

    def install(
        self,
        model: nn.Module,
        adapter_name: str,
        num_virtual_tokens: int = 20,
        encoder: str = "lstm",
        hidden_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        pseudo_token_id: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        settings = PromptEncoderSettings(num_virtual_tokens, encoder, hidden_size, num_layers, dropout, pseudo_token_id)
        embedding = self.embedding(self.name, model, num_virtual_tokens)
        self.put(model, adapter_name, embedding, **asdict(settings), dtype=dtype)

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        prompts = cast(PromptEncoder, self.holder(model, adapter_name))
        check_values(adapter_name, prompts.adapter_parameters(adapter_name))
        settings: PromptEncoderSettings = prompts.settings[adapter_name]
        encoder = prompts.encoders[adapter_name]
        config = self.config(model, settings.num_virtual_tokens, prompts.features, base_model_name_or_path)
        if settings.pseudo_token_id is not None:
            config |= {"peft_type": TEMPLATE_TYPE, "pseudo_token_id": settings.pseudo_token_id}
        config |= {
            "encoder_reparameterization_type": "LSTM" if settings.encoder == "lstm" else "MLP",
            "encoder_hidden_size": settings.hidden_size,
            "encoder_num_layers": settings.num_layers,
            "encoder_dropout": settings.dropout,
        }
        contents = {
            TENSORS_NAME: to_safetensors({EMBEDDINGS_KEY: _in_eval(encoder)}),
            CONFIG_NAME: to_json(config),
        }
        if settings.encoder != "none":
            contents[ENCODER_NAME] = to_safetensors(encoder.state_dict())
        write_files(directory, contents)
        if settings.encoder == "none":
            # What another save left is not this prompt's.
            (directory / ENCODER_NAME).unlink(missing_ok=True)

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config["peft_type"] in (self.peft_type, TEMPLATE_TYPE)

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        """PEFT's files hold no encoder: their prompt is trained as it is. Onto a model that has the adapter with the
        same settings the values are copied into its parameters."""
        config, values, embedding = self.read(model, directory)
        has_encoder = (directory / ENCODER_NAME).is_file()
        settings = _settings(config, values, has_encoder, directory / CONFIG_NAME)
        # A module by itself: it checks the encoder's tensors before the model is touched.
        read = PromptEncoder(embedding, **asdict(settings)).eval()
        encoder = cast(nn.Module, read.encoders["default"])
        if has_encoder:
            _fill(encoder, directory / ENCODER_NAME, values)
        else:
            encoder.load_state_dict({"embedding.weight": values})
        present = self.modules(model, adapter_name)
        for module in present.values():
            theirs, ours = module.settings[adapter_name], read.settings["default"]
            if theirs != ours:
                raise ValueError(
                    f"load: the model has another adapter {adapter_name!r}: {theirs} there and {ours} in {directory}"
                )
        if present:
            activate(model, adapter_name)
        else:
            self.put(model, adapter_name, embedding, **asdict(settings))
        cast(PromptEncoder, self.holder(model, adapter_name)).encoders[adapter_name].load_state_dict(
            encoder.state_dict()
        )


@torch.no_grad()
def _in_eval(encoder: nn.Module) -> Tensor:
    """What it computes without dropout."""
    training = encoder.training
    encoder.eval()
    try:
        return encoder()
    finally:
        encoder.train(training)


def _settings(config: dict[str, Any], values: Tensor, has_encoder: bool, where: Path) -> PromptEncoderSettings:
    """Those of a config, checked."""
    kind = str(config.get("encoder_reparameterization_type", "MLP"))
    if kind not in ("LSTM", "MLP"):
        raise ValueError(f"load: {where}: encoder_reparameterization_type must be 'LSTM' or 'MLP', got {kind!r}")
    try:
        return PromptEncoderSettings(
            num_virtual_tokens=values.shape[0],
            encoder=kind.lower() if has_encoder else "none",
            hidden_size=config.get("encoder_hidden_size"),
            num_layers=config.get("encoder_num_layers", 2),
            dropout=config.get("encoder_dropout", 0.0),
            pseudo_token_id=config.get("pseudo_token_id"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: {where}: {error}") from error


def _fill(encoder: nn.Module, path: Path, values: Tensor) -> None:
    """Reads an encoder; it must give the prompt of the other file."""
    tensors = read_tensors(path)
    wanted = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if got != wanted:
        name = next(name for name in (*wanted, *got) if wanted.get(name) != got.get(name))
        raise ValueError(f'load: {path}: "{name}" must be {wanted.get(name)}, got {got.get(name)}')
    encoder.load_state_dict(tensors)
    error = (_in_eval(encoder).float() - values.float()).abs().max().item()
    if not error <= SAME_PROMPT * max(1.0, values.abs().max().item()):
        raise ValueError(f"load: {path} does not give the prompt of {TENSORS_NAME}: it is {error:.1e} away")
