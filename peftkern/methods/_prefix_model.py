"""Prefixes inside transformers models: attention that looks for one, positions that make room for it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern._modules import adapter_modules
from peftkern.nn.prefix import Prefix
from peftkern.ops.prefix_attention import prefix_attention

CHILD = "prefix"
_NAME = "peftkern_prefix_"
_ATTRIBUTE = "_peftkern_prefix"
# model_type -> where the attention of a layer is in the base model
_ATTENTION = {
    "llama": "layers.{}.self_attn",
    "mistral": "layers.{}.self_attn",
    "qwen2": "layers.{}.self_attn",
    "gemma": "layers.{}.self_attn",
    "gpt2": "h.{}.attn",
    "bert": "encoder.layer.{}.attention.self",
}
# These look positions up in a table of max_position_embeddings rows.
_ABSOLUTE_POSITIONS = ("gpt2", "bert")


class Sizes(NamedTuple):
    """What a prefix must fit."""

    num_layers: int
    kv_heads: int
    head_dim: int


class _Place(NamedTuple):
    """What an attention module finds its keys and values by. No submodule: the prefix is one already."""

    prefix: Prefix
    layer: int


def check_prefix_model(op: str, model: Any) -> Sizes:
    """The sizes of a model that can have a prefix.

    Raises:
        TypeError: it is no transformers model.
        ValueError: its architecture or attention is not supported.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"{op}: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if config.model_type not in _ATTENTION:
        known = ", ".join(_ATTENTION)
        raise ValueError(f"{op}: model_type must be one of {known}, got {config.model_type!r}")
    attention = config._attn_implementation
    if attention.removeprefix(_NAME) not in ("sdpa", "eager"):
        raise ValueError(f"{op}: the model's attention must be 'sdpa' or 'eager', got {attention!r}")
    if getattr(config, "reorder_and_upcast_attn", False) and attention == "eager":
        raise ValueError(f"{op}: reorder_and_upcast_attn must be off with attention 'eager'")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"{op}: the model's {heads} heads must be a multiple of its {kv_heads} key-value heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(config.num_hidden_layers, kv_heads, head_dim)


def check_length(op: str, model: Any, length: int) -> None:
    """Raises ValueError unless a prefix of `length` leaves positions for tokens."""
    most = model.config.max_position_embeddings
    if length >= most:
        raise ValueError(f"{op}: length must be below the model's {most} positions, got {length}")


def prefix_of(model: nn.Module) -> Prefix | None:
    """The prefixes that a model has."""
    child = getattr(model, CHILD, None)
    return child if isinstance(child, Prefix) else None


def put_prefix(model: Any, prefix: Prefix) -> None:
    """Makes `prefix` a child of the model, its attention look for it and its positions begin behind it."""
    model.add_module(CHILD, prefix.train(model.training))
    base = model.base_model
    path = _ATTENTION[model.config.model_type]
    for layer in range(prefix.num_layers):
        setattr(base.get_submodule(path.format(layer)), _ATTRIBUTE, _Place(prefix, layer))
    base.register_forward_pre_hook(_ShiftPositions(prefix, base), with_kwargs=True)
    use_prefix_attention(model)


def use_prefix_attention(model: Any) -> None:
    """Has the model call `prefix_attention` where there is a prefix, and the attention that it had elsewhere."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    original = model.config._attn_implementation
    if original.startswith(_NAME):
        return
    AttentionInterface.register(_NAME + original, partial(_attend, original))
    AttentionMaskInterface.register(_NAME + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.set_attn_implementation(_NAME + original)


def _original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: [batch, heads, queries, head_dim] to [batch, queries, heads, head_dim]."""
    place = getattr(module, _ATTRIBUTE, None)
    pair = None if place is None else place.prefix(place.layer)
    if pair is None:
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        plain = _original(original, module)
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    queries = query.shape[2]
    # As sdpa_attention_forward; the eager one knows no causality but its mask's.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and queries > 1 and attention_mask is None and original != "eager"
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
    prefix_key, prefix_value = (
        part if part.dtype in (torch.float32, query.dtype) else part.to(query.dtype) for part in pair
    )
    arguments = (query, key, value, prefix_key, prefix_value, attention_mask, causal, scaling, True)
    out = _attend_with_dropout(*arguments, dropout) if dropout > 0 else prefix_attention(*arguments)
    return out.transpose(1, 2).contiguous(), None


def _attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    p: float,
) -> Tensor:
    """With dropout on the attention's weights, which fused attention has none of: by concatenation."""
    length = prefix_key.shape[-2]
    shape = (query.shape[0], *prefix_key.shape[-3:])
    key = torch.cat([prefix_key.to(key.dtype).expand(shape), key], dim=2)
    value = torch.cat([prefix_value.to(value.dtype).expand(shape), value], dim=2)
    if is_causal:
        tokens = query.shape[2]
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (length, 0), value=attention_mask.dtype == torch.bool)
    return F.scaled_dot_product_attention(query, key, value, attention_mask, p, scale=scale, enable_gqa=enable_gqa)


class _ShiftPositions:
    """A forward hook of the base model: tokens come behind the prefix, as when HF PEFT puts it into the cache."""

    def __init__(self, prefix: Prefix, base: nn.Module) -> None:
        self.prefix = prefix
        self.parameters = list(inspect.signature(type(base).forward).parameters)[1:]
        config = cast(Any, base.config)
        self.most = config.max_position_embeddings if config.model_type in _ABSOLUTE_POSITIONS else None

    def __call__(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        length = self.prefix.length
        if length == 0:
            return None
        given = {**dict(zip(self.parameters, args)), **kwargs}
        positions = given.get("position_ids")
        if positions is None:
            ids, embeds, cache = (given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
            tokens = embeds if ids is None else ids
            if tokens is None:
                return None
            past = 0 if cache is None else cache.get_seq_length()
            end = past + tokens.shape[1]
            if self.most is not None and length + end > self.most:
                raise ValueError(
                    f"{type(base).__name__}: the prefix of {length} and {end} tokens must not exceed the model's "
                    f"{self.most} positions"
                )
            positions = torch.arange(past, end, device=tokens.device).unsqueeze(0)
        given["position_ids"] = positions + length
        return (), given


def text_embeddings(op: str, model: Any, sizes: Sizes, ids: Tensor) -> Tensor:
    """The keys and values that the model alone has for a text, in HF PEFT's layout: to begin training with."""
    if ids.dim() != 1 or ids.numel() == 0 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: text_ids must be token ids [length], got {ids.dtype} {list(ids.shape)}")
    vocabulary = model.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"{op}: text_ids must be below the vocabulary's {vocabulary}, got {ids.tolist()}")
    if model.config.model_type == "bert":
        raise ValueError(f"{op}: text_ids needs a causal model, got model_type 'bert'")
    base = model.base_model
    device = next(base.parameters()).device
    active = {module: module.enabled for module in adapter_modules(model).values()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for module in active:
            module.disable_adapters()
        with torch.no_grad():
            cache = base(input_ids=ids.to(device).unsqueeze(0), use_cache=True).past_key_values
    finally:
        for module, enabled in active.items():
            if enabled:
                module.enable_adapters()
        for each, mode in training.items():
            each.training = mode
    pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)
