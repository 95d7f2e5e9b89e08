"""What modules with trained prompts share: which prompt a batch gets, and the model's embedding as the op takes it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._adapters import AdapterModule
from peftkern.ops._linear import FLOATING
from peftkern.ops.prompt_embedding import PromptedInputs, prompt_embedding

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the known names; tells the near ones."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"prompt: {name} must be one of {', '.join(known)}, got {value!r}{hint}")


def check_count(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a positive int."""
    if type(value) is not int:
        raise TypeError(f"prompt: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"prompt: {name} must be positive, got {value}")


class PromptModule(AdapterModule):
    """Named prompts of one model: what PromptEmbedding and PromptEncoder share. It keeps no embedding of tokens.

    Args:
        embedding: the model's, which gives features, device and dtype; it is not kept.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.features = _weight_of(type(self).__name__, embedding).shape[1]

    @property
    def op(self) -> str:
        """The op that computes with an adapter."""
        return "prompt_embedding"

    def prompt(self, adapter_name: str) -> Tensor:
        """The prompt [rows, features] of an adapter, as a function of what it trains."""
        raise NotImplementedError

    @property
    def prompting(self) -> bool:
        """Whether there is a prompt in force."""
        return self._enabled and self._active is not None

    @property
    def prefix_length(self) -> int:
        """Places that the active prompt takes before the input."""
        return self.settings[cast(str, self._active)].num_virtual_tokens if self.prompting else 0

    def forward(
        self,
        input_ids: Tensor | None,
        embedding: nn.Module,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_ids: Tensor | Sequence[str] | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> PromptedInputs:
        prompt, ids = self._chosen(prompt_ids)
        tokens, weight = _table(input_ids, embedding, inputs_embeds)
        return prompt_embedding(tokens, weight, prompt, ids, attention_mask, labels, position_ids)

    def _chosen(self, prompt_ids: Tensor | Sequence[str] | None) -> tuple[Tensor, Tensor | None]:
        """`prompt` and `prompt_ids` of the op."""
        what = type(self).__name__
        if prompt_ids is None:
            if self._active is None:
                raise RuntimeError(f"{what}: no adapter is active; see set_adapter")
            return self.prompt(self._active), None
        names = list(self.settings)
        if not isinstance(prompt_ids, Tensor):
            for name in prompt_ids:
                self._check_exists("prompt_ids", name)
            device = next(iter(self.adapter_parameters(names[0]))).device
            prompt_ids = torch.tensor([names.index(name) for name in prompt_ids], dtype=torch.int64, device=device)
        lengths = {name: settings.num_virtual_tokens for name, settings in self.settings.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{what}: prompt_ids needs prompts of one length, got {lengths}")
        return torch.stack([self.prompt(name) for name in names]), prompt_ids

    def _check_addition(self, adapter_name: Any, embedding: Any, dtype: Any) -> Tensor:
        """The embedding's weight, if an adapter of this name and dtype may be added."""
        what = type(self).__name__
        weight = _weight_of(what, embedding)
        self._check_new(adapter_name)
        if weight.shape[1] != self.features:
            raise ValueError(f"{what}: embedding must have {self.features} features, got {weight.shape[1]}")
        if dtype not in (torch.float32, weight.dtype):
            raise TypeError(f"{what}: dtype must be torch.float32 or the embedding's {weight.dtype}, got {dtype}")
        return weight

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: {settings}" for name, settings in self.settings.items())
        return f"features={self.features}, adapters=({adapters}), active={self._active}" + (
            "" if self._enabled else ", disabled"
        )


def _weight_of(what: str, embedding: Any) -> Tensor:
    """The embedding's weight [vocabulary, features]."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Module) or not isinstance(weight, Tensor):
        raise TypeError(f"{what}: embedding must be an embedding module, got {type(embedding).__name__}")
    if weight.dtype not in FLOATING:
        raise TypeError(f"{what}: embedding.weight must be {' or '.join(map(str, FLOATING))}, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{what}: embedding.weight must have shape [vocabulary, features], got {list(weight.shape)}")
    return weight


def _table(input_ids: Tensor | None, embedding: nn.Module, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids [batch, tokens] and the table they look up: the embedding's weight where its forward does just that, else
    what its forward gave."""
    if inputs_embeds is None:
        input_ids = cast(Tensor, input_ids)
        if looks_up(embedding):
            return input_ids, cast(nn.Embedding, embedding).weight
        inputs_embeds = cast(Tensor, embedding(input_ids))
    batch, tokens, features = inputs_embeds.shape
    places = torch.arange(batch * tokens, device=inputs_embeds.device)
    return places.view(batch, tokens), inputs_embeds.reshape(batch * tokens, features)


def looks_up(embedding: nn.Module) -> bool:
    """Whether the module's forward is weight[ids] and its backward the plain sum: no scale, no norm, no hook."""
    return (
        type(embedding) is nn.Embedding
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
        and not (embedding.padding_idx is not None and embedding.weight.requires_grad)
        and not any(getattr(embedding, name) for name in _HOOKS)
    )
