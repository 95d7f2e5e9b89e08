"""A tiny Llama, and what tests of whole models do with it."""

import pytest
import torch
from torch import Tensor, nn

import peftkern

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).view(2, 6)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def base_for(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What "the base" means: for QLoRA the quantised model."""
    return peftkern.quantize(llama(dtype)) if name == "qlora" else llama(dtype)


def move(model: nn.Module, size: float = 0.1) -> nn.Module:
    """As a few optimizer steps might."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return model


def tuned(name: str, adapter_name: str = "default") -> nn.Module:
    return move(peftkern.tune(base_for(name), name, adapter_name))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
