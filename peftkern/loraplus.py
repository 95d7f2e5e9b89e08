"""LoRA+ (arXiv 2402.12354): parameter groups with a larger learning rate for B than for A."""

import math
from typing import Any

from torch import nn

# Where PEFT keeps the factors of an embedding's adapter.
_EMBEDDING = "lora_embedding_"


def loraplus_groups(
    model: nn.Module,
    learning_rate: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_learning_rate: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, as PEFT's `create_loraplus_optimizer` (LoRA+, arXiv 2402.12354, section 4).

    At `learning_rate`: all that the others leave, A among it. At `ratio` times it: B, and everything of one dimension,
    as DoRA's magnitudes and BitFit's biases are; of these the biases and what is inside an nn.LayerNorm have no weight
    decay. Groups that would be empty are left out. With ratio=1 and no weight decay it is one learning rate for all.

    Args:
        model: with trainable parameters; ours or PEFT's.
        learning_rate: of A.
        ratio: of B's to A's learning rate, about 16; the paper has it from 1 up. A larger one goes with a smaller
            learning_rate.
        weight_decay: of every group but the one for biases and norms.
        embedding_learning_rate: of PEFT's adapters on embeddings.

    Returns:
        Dicts with "params", "lr" and "weight_decay".

    Raises:
        ValueError: nothing is trainable, or a number that cannot be.
    """
    rates = {"learning_rate": learning_rate, "ratio": ratio, "embedding_learning_rate": embedding_learning_rate}
    for name, value in rates.items():
        if not 0 < value < math.inf:
            raise ValueError(f"loraplus_groups: {name} must be positive and finite, got {value}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"loraplus_groups: weight_decay must be finite and not negative, got {weight_decay}")
    normed = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    base: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    fast_no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _EMBEDDING in name:
            embedding.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            decays = "bias" not in name and id(parameter) not in normed
            (fast if decays else fast_no_decay).append(parameter)
        else:
            base.append(parameter)
    groups = [
        {"params": base, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": embedding, "lr": embedding_learning_rate, "weight_decay": weight_decay},
        {"params": fast, "lr": learning_rate * ratio, "weight_decay": weight_decay},
        {"params": fast_no_decay, "lr": learning_rate * ratio, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("loraplus_groups: the model has no trainable parameter")
    return groups
