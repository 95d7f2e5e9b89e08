"""A Hugging Face model folder: its tokenizer and its causal LM, or one line on what is wrong with it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peftkern.cli.data import Tokens
from peftkern.cli.errors import UsageError


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_installed() -> None:
    """Raises UsageError if transformers is missing; makes it quiet otherwise."""
    if find_spec("transformers") is None:
        raise UsageError("finetune needs transformers: pip install 'peftkern[hf]'")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"--model: {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model: {folder} has no config.json")


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for a bad folder
        raise UsageError(f"--model: {folder} has no usable tokenizer ({first_line(error)})") from error


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises a dozen kinds for a bad folder
        raise UsageError(f"--model: {folder} has no usable causal LM ({first_line(error)})") from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UsageError(f"--model: {folder} has no complete causal LM, {len(missing)} weights lack: {missing[0]} ...")
    return model


def check_fits(model: Any, tokens: Tokens, sequence_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise UsageError(f"--sequence-length: the model has {positions} positions, got {sequence_length}")
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(max(tokens.train.max(), tokens.targets.max()))
    if largest >= vocabulary:
        raise UsageError(f"--model: the tokenizer gives id {largest}, the model knows {vocabulary}")
