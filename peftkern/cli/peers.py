"""The same fine-tuning through the libraries that people use today: HF PEFT, on bitsandbytes for QLoRA."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.cli.errors import UsageError

_NEEDED = {"lora": ("peft", "rich"), "qlora": ("peft", "rich", "bitsandbytes", "accelerate")}
NAMES = {"qlora": "HF PEFT + bitsandbytes", "lora": "HF PEFT"}


def check_installed(method: str) -> None:
    """Raises UsageError naming what `--compare` lacks."""
    if method not in _NEEDED:
        raise UsageError(f"--compare: the peers have {' and '.join(_NEEDED)}, got {method}")
    missing = [package for package in _NEEDED[method] if find_spec(package) is None]
    if missing:
        raise UsageError(f"--compare needs {', '.join(missing)}: pip install 'peftkern[hf,bench]'")


def load(method: str, model: Path, adapter: Path, dtype: torch.dtype) -> nn.Module:
    """The base model from its folder (NF4 with double quantisation for QLoRA), with a trainable adapter from another.

    Do not call it in eval mode before training: bitsandbytes 0.50 then repacks its weights and loses gradients.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options |= {"quantization_config": quantization, "device_map": "cpu"}
    with warnings.catch_warnings():
        # transformers 5.23 calls what it has itself deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(model, **options)
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
