"""Tiny transformers models that can have a prefix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

IDS = torch.arange(14).view(2, 7) % 11
# The first row is padded on the left.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GQA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GQA, "num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
}
CLASSIFIERS = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SIZES | _QUIET),
    "llama": ("LlamaConfig", "LlamaForSequenceClassification", {**_GQA, "pad_token_id": 0}),
}


def build(kind: tuple[str, str, dict[str, Any]], attention: str = "sdpa", **options: Any) -> Any:
    """The same weights every time."""
    torch.manual_seed(1)
    config = getattr(transformers, kind[0])(**{**kind[2], **options}, attn_implementation=attention)
    return getattr(transformers, kind[1])(config).eval()


def causal(name: str = "llama", attention: str = "sdpa", **options: Any) -> Any:
    return build(CAUSAL[name], attention, **options)


def classifier(name: str = "bert", attention: str = "sdpa", **options: Any) -> Any:
    return build(CLASSIFIERS[name], attention, **options)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, **options).logits


def peft_prefix(model: Any, task: str = "CAUSAL_LM", length: int = 3, **options: Any) -> Any:
    """HF PEFT's prefix tuning of a model, in eval mode."""
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=length, **options)
    return peft.get_peft_model(model, config).eval()
