"""transformers' attention on `prefix_attention`, without a prefix: what `accelerate` gives models that have torch's.

transformers knows it as the attention "peftkern". Only the modules that look an attention up see that name, where their
model's config says "sdpa": the config itself, and with it masks and what is saved, stays as it is. A call that the op
does not compute as torch would runs "sdpa".
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftkern import backends
from peftkern.integrations._calls import FAST, calls_of, transform_obstacle
from peftkern.ops.prefix_attention import prefix_attention

NAME = "peftkern"
_STOCK = "sdpa"
_OP = "prefix_attention"
# One thread of ours does the work of 2 to 6 of torch's, which shares it out more finely.
_THREADS_PER_HEAD = 2
# With fewer products (batch * heads * queries * keys * head_dim) torch is faster, which takes 16-bit numbers apart; and
# in fp32 with fewer queries for the same keys. Measured on Zen 4.
_LEAST_PRODUCTS = {torch.float32: 1 << 22, torch.bfloat16: 1 << 15, torch.float16: 1 << 15}
_LEAST_ROWS_FP32 = 4
_TOO_SMALL = "so small that torch's is faster"


class _Config:
    """A model's config, except that torch's attention has another name; and the counts of a module's calls."""

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config

    @property
    def _attn_implementation(self) -> str | None:
        name: str | None = self.config._attn_implementation
        return NAME if name == _STOCK else name

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)


def use(model: nn.Module) -> None:
    """Has the modules of a model that look their attention up find ours in the place of torch's."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            continue  # whose config is saved
        config = module.__dict__.get("config")
        kind: Any = getattr(module, "block_class", type(module))  # a fused block's own
        if config is not None and not is_ours(module) and _looks_up(kind):
            module.__dict__["config"] = _Config(config)


def restore(model: nn.Module) -> None:
    """Undoes `use`."""
    for _, module in attentions(model):
        module.__dict__["config"] = module.__dict__["config"].config


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that `use` has changed, by path."""
    for path, module in model.named_modules():
        if is_ours(module):
            yield path, module


def is_ours(module: nn.Module) -> bool:
    """Whether `use` has changed it."""
    return isinstance(module.__dict__.get("config"), _Config)


def counts_of(module: Any) -> Counter[str]:
    """How often its attention ran, by what it met: FAST or the obstacle."""
    return calls_of(module.config)


def explain(module: nn.Module) -> tuple[str, str, str]:
    """What runs the attention of such a module: (op, implementation, reason)."""
    counts = dict(counts_of(module))
    ran = f"ran {counts.pop(FAST, 0)} times, torch's own {sum(counts.values())} times"
    name = module.__dict__["config"]._attn_implementation
    if name != NAME:
        return "attention", "torch", f"the model's attention is {name}; {ran}"
    probe = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    choice = backends.choose(_OP, probe.new_empty(0))
    implementation = "torch" if choice.implementation == "reference" and not choice.asked else choice.implementation
    return _OP, implementation, f"{choice.reason}; {ran}"


@cache
def _looks_up(kind: Any) -> bool:
    """Whether modules of a class ask transformers for their attention, whatever its name."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source and f'"{_STOCK}"' not in source


def _obstacle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, further: dict[str, Any]
) -> str:
    """Why torch's attention runs a call; empty if ours does."""
    if dropout:
        return "dropout of attention weights"
    if any(further.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        return "arguments that only torch's attention has"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "query, key and value differ in dtype"
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or value.shape != key.shape or heads % key.shape[1]:
        return "query, key and value do not fit together"
    if mask is not None and (mask.dim() != 4 or mask.requires_grad or mask.shape[3] != key.shape[2]):
        return "a mask that the op does not take"
    if not torch.compiler.is_compiling():  # a compiled graph has no sizes or threads of its own
        if _is_small(query, key):
            backends.check_environment(_OP)
            return _TOO_SMALL
        if torch.get_num_threads() > _THREADS_PER_HEAD * batch * key.shape[1]:
            return "fewer heads of keys than half the threads"
    choice = backends.choose(_OP, query)
    if choice.implementation == "torch" or (choice.implementation == "reference" and not choice.asked):
        return choice.reason  # without a prefix ours would be torch's own
    return transform_obstacle(query)


def _is_small(query: Tensor, key: Tensor) -> bool:
    least = _LEAST_PRODUCTS.get(query.dtype, 0)
    if query.dtype == torch.float32:
        if torch.is_autocast_enabled("cpu"):
            least = 0
        elif query.shape[2] * query.shape[1] < _LEAST_ROWS_FP32 * key.shape[1]:
            return True
    return query.numel() * key.shape[2] < least


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """transformers' attention "peftkern", of the form that its AttentionInterface wants."""
    obstacle = _obstacle(query, key, value, attention_mask, dropout, further)
    if not torch.compiler.is_compiling():
        counts_of(module)[obstacle or FAST] += 1
    if obstacle:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **further
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # The one query of a decoding step sees all keys.
    is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    prefix = key.new_empty(key.shape[1], 0, key.shape[3])
    y = prefix_attention(query, key, value, prefix, prefix, attention_mask, is_causal, scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_forward)
