"""Tiny transformers models for the prompt methods, the same weights for a seed, and inputs for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers: Any = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, POSITIONS = 60, 32, 64
# Two implementations of one fp32 model: sums in another order.
SAME = {"rtol": 1e-4, "atol": 1e-5}

# Far enough from zero for a prompt to matter.
_LIVELY = {"initializer_range": 0.2}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, **_LIVELY}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_DECODER = {
    **_SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    **_TOKENS,
}
_BERT = {**_SMALL, "intermediate_size": 48, "max_position_embeddings": POSITIONS}


def build(name: str) -> Any:
    """A model in eval mode: "llama", "gemma", "gpt2", "bert-tokens", "bert-samples", "bert-spans", "t5" or "bart"."""
    torch.manual_seed(0)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)),
        "gemma": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_DECODER, head_dim=8)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=POSITIONS, **_TOKENS, **_LIVELY
            )
        ),
        "bert-tokens": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**_BERT, num_labels=3)),
        "bert-samples": lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**_BERT, num_labels=3)
        ),
        "bert-spans": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**_BERT)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=None,
            )
        ),
        "bart": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=POSITIONS,
                scale_embedding=True,
                init_std=0.2,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                **_TOKENS,
            )
        ),
    }
    return made[name]().eval()


def batch_of(tokens: int = 7, padding: str = "") -> dict[str, Tensor]:
    """input_ids and attention_mask of three samples, the last two shorter, padded on the "left" or "right"."""
    ids = torch.randint(3, VOCABULARY, (3, tokens))
    mask = torch.ones_like(ids)
    if padding:
        for sample, short in ((1, 2), (2, 4)):
            mask[sample, slice(short) if padding == "left" else slice(tokens - short, tokens)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, new_tokens: int = 6, **inputs: Any) -> Tensor:
    """Greedy, unless told otherwise."""
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
