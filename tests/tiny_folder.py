"""A Hugging Face folder of a tiny Llama with the embedded model's tokenizer, and a text for it."""

import shutil
from pathlib import Path

import torch

from peftkern.cli import finetune

PANGRAMS = ("the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "sphinx of quartz")


def write_model(folder: Path) -> Path:
    """2 layers, width 32; a token is a byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finetune.EMBEDDED_MODEL / name, folder)
    return folder


def write_text(file: Path) -> Path:
    file.write_text("".join(f"{PANGRAMS[i % 3]} {i}\n" for i in range(60)))
    return file
