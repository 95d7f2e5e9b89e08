"""transformers' loss of causal language models on `cross_entropy`: what `accelerate` gives models that have theirs.

Their own copies the logits to fp32 first, and torch makes two more tensors of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from peftkern import backends
from peftkern.integrations._calls import transform_obstacle
from peftkern.ops.cross_entropy import OP, cross_entropy

_OWN = "_loss_function"  # where transformers keeps a loss that was set
# With fewer logits torch is faster. Measured on Zen 4.
_LEAST_LOGITS = 1 << 17


def use(model: nn.Module) -> None:
    """Has the models within a model whose loss is transformers' compute it by ours."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _OWN not in module.__dict__ and _is_causal(module):
            module.__dict__[_OWN] = causal_lm_loss


def restore(model: nn.Module) -> None:
    """Undoes `use`."""
    for _, module in losses(model):
        del module.__dict__[_OWN]


def losses(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The models that `use` has changed, by path."""
    for path, module in model.named_modules():
        if is_ours(module):
            yield path, module


def is_ours(module: nn.Module) -> bool:
    """Whether `use` has changed it."""
    return module.__dict__.get(_OWN) is causal_lm_loss


def explain(module: nn.Module) -> tuple[str, str, str]:
    """What runs the loss of such a model: (op, implementation, reason)."""
    probe = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    choice = backends.choose(OP, probe.new_empty(0))
    return OP, choice.implementation, f"{choice.reason}; transformers' own below {_LEAST_LOGITS} logits"


def _is_causal(module: Any) -> bool:
    # The property warns where a config names no loss, for models that have none.
    return getattr(module, "loss_type", None) == "ForCausalLM" and module.loss_function is ForCausalLMLoss


def _obstacle(logits: Tensor) -> str:
    """Why transformers' own loss runs; empty if ours does."""
    if not torch.compiler.is_compiling() and logits.numel() < _LEAST_LOGITS:
        backends.check_environment(OP)
        return "so small that torch's is faster"
    choice = backends.choose(OP, logits)
    return transform_obstacle(logits) if choice.implementation != "reference" or choice.asked else choice.reason


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **further: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, to the same arguments."""
    if _obstacle(logits):
        stock: Callable[..., Tensor] = ForCausalLMLoss
        return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **further)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index, reduction)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
