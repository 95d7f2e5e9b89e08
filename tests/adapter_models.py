"""Tiny transformers models for methods that work on sublayers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

LLAMA_LIKE = ("llama", "mistral", "qwen2", "gemma")
KINDS = (*LLAMA_LIKE, "gemma2", "gpt2", "bert", "roberta")
WIDTH, LAYERS, VOCABULARY = 32, 2, 50


def make_model(kind: str, layers: int = LAYERS, **options: Any) -> nn.Module:
    """A model without a head, in fp32, with random weights of unit-sized outputs."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        shape = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": layers, "n_head": 4, "n_positions": 64}
    config = transformers.AutoConfig.for_model(kind, **shape, attn_implementation="eager", **options)
    return transformers.AutoModel.from_config(config).eval()


def run(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The last hidden state."""
    return model(input_ids).last_hidden_state


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))
