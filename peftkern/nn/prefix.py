"""Prefix: trained keys and values for every attention layer of a model (prefix tuning, arXiv 2101.00190)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.nn._adapters import AdapterModule, check_name
from peftkern.ops._linear import FLOATING, number

INITS = ("normal", "zero")


@dataclass(frozen=True)
class PrefixSettings:
    """One prefix's hyper-parameters.

    Attributes:
        length: positions, positive.
        init: "normal" draws from N(0, 1), as HF PEFT and P-tuning v2 do; "zero".
        hidden: width of the reparametrisation `MLP(e) = tanh(e W_1 + b_1) W_2 + b_2` that the keys and values come
            from; None: they are the parameters.
        dropout: probability of dropping an element of keys and values in training (P-tuning v2).
        method: which method put it into a model.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    length: int = 20
    init: str = "zero"
    hidden: int | None = None
    dropout: float = 0.0
    method: str = "prefix_tuning"

    def __post_init__(self) -> None:
        for name in ("length", "hidden"):
            value = getattr(self, name)
            if value is None and name == "hidden":
                continue
            if type(value) is not int:
                raise TypeError(f"Prefix: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"Prefix: {name} must be positive, got {value}")
        if self.init not in INITS:
            raise ValueError(f"Prefix: init must be {' or '.join(map(repr, INITS))}, got {self.init!r}")
        object.__setattr__(self, "dropout", number(self.dropout))
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"Prefix: dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"Prefix: dropout must be from 0 to 1, got {self.dropout}")


class _Direct(nn.Module):
    """Keys and values of each layer, [kv_heads, length, head_dim], as parameters."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.keys = nn.ParameterList(nn.Parameter(key, requires_grad=False) for key in keys)
        self.values = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in values)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    @torch.no_grad()
    def reset(self, init: str) -> None:
        for parameter in (*self.keys, *self.values):
            parameter.normal_() if init == "normal" else parameter.zero_()


class _Reparametrised(nn.Module):
    """Keys and values of each layer from an embedding and an MLP. Each layer computes its own part of the last product,
    so that gradient checkpointing recomputes it and no gradient is as large as all of it.

    The factors are no nn.Linear: what replaces every nn.Linear of a model must pass them by.
    """

    def __init__(self, num_layers: int, kv_heads: int, head_dim: int, length: int, hidden: int, **options: Any) -> None:
        super().__init__()
        width = kv_heads * head_dim
        self.shape = length, 2, kv_heads, head_dim

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **options), requires_grad=False)

        self.embedding = empty(length, width)
        self.hidden_weight, self.hidden_bias = empty(hidden, width), empty(hidden)
        self.weights = nn.ParameterList(empty(2 * width, hidden) for _ in range(num_layers))
        self.biases = nn.ParameterList(empty(2 * width) for _ in range(num_layers))

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.embedding.device.type, enabled=False):
            hidden = F.linear(self.embedding, self.hidden_weight, self.hidden_bias).tanh()
            both = F.linear(hidden, self.weights[layer], self.biases[layer]).view(self.shape)
        key, value = both.permute(1, 2, 0, 3)
        return key, value

    @torch.no_grad()
    def reset(self, init: str) -> None:
        """The embedding is drawn from N(0, 1), the factors as nn.Linear's; "zero" zeroes the last ones."""
        self.embedding.normal_()
        for weight, bias in ((self.hidden_weight, self.hidden_bias), *zip(self.weights, self.biases)):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)
        if init == "zero":
            for parameter in (*self.weights, *self.biases):
                parameter.zero_()


class Prefix(AdapterModule):
    """Named prefixes: for each one, keys and values of every attention layer, as `prefix_attention` takes them.

    One prefix is active, and trainable, at a time. `forward(layer)` gives its key and value, or None where there is
    none or adapters are disabled. `peftkern.tune(model, "prefix_tuning")` puts one into a transformers model.

    Args:
        num_layers, kv_heads, head_dim: of the model.
        length, init, hidden, dropout: of the first prefix, see `PrefixSettings`.
        adapter_name: of the first prefix, which is active.
        dtype: of the parameters, fp32 or what activations will have.
        device: where they are.

    Attributes:
        settings: adapter name -> PrefixSettings.

    Raises:
        TypeError, ValueError: a size, setting, name or dtype that cannot be.

    Shape:
        layer -> key and value, each [kv_heads, length, head_dim].
    """

    settings: dict[str, PrefixSettings]

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        length: int = 20,
        init: str = "zero",
        hidden: int | None = None,
        dropout: float = 0.0,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("num_layers", num_layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if type(value) is not int:
                raise TypeError(f"Prefix: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"Prefix: {name} must be positive, got {value}")
        super().__init__()
        self.num_layers, self.kv_heads, self.head_dim = num_layers, kv_heads, head_dim
        self.encoders = nn.ModuleDict()
        self.add_adapter(adapter_name, length, init, hidden, dropout, dtype, device)
        self.set_adapter(adapter_name)

    @property
    def op(self) -> str:
        return "prefix_attention"

    @property
    def method_name(self) -> str:
        return f"prefix p={self.length}" if self.length else "prefix"

    @property
    def length(self) -> int:
        """Positions of the prefix that takes part, 0 if none does."""
        return self.settings[self._active].length if self._enabled and self._active is not None else 0

    def add_adapter(
        self,
        adapter_name: str,
        length: int = 20,
        init: str = "zero",
        hidden: int | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Adds a prefix, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        check_prefix(type(self).__name__, adapter_name, dtype)
        settings = PrefixSettings(length, init, hidden, dropout)
        self._check_new(adapter_name)
        if device is None:
            device = next((parameter.device for parameter in self.parameters()), None)
        encoder: _Direct | _Reparametrised
        if hidden is None:
            shape = (self.kv_heads, length, self.head_dim)
            keys, values = (
                [torch.empty(shape, dtype=dtype, device=device) for _ in range(self.num_layers)] for _ in range(2)
            )
            encoder = _Direct(keys, values)
        else:
            sizes = (self.num_layers, self.kv_heads, self.head_dim, length, hidden)
            encoder = _Reparametrised(*sizes, dtype=dtype, device=device)
        encoder.reset(init)
        self.encoders[adapter_name] = encoder
        self.settings[adapter_name] = settings

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """Keys and values, or what they are computed from."""
        self._check_exists("adapter_parameters", adapter_name)
        return tuple(self.encoders[adapter_name].parameters())

    def forward(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if not self._enabled or self._active is None:
            return None
        key, value = self.encoders[self._active](layer)
        dropout = self.settings[self._active].dropout
        if dropout > 0 and self.training:
            key, value = F.dropout(key, dropout), F.dropout(value, dropout)
        return key, value

    @torch.no_grad()
    def prompt_embeddings(self, adapter_name: str) -> Tensor:
        """A copy of all keys and values in HF PEFT's layout, [length, num_layers * 2 * kv_heads * head_dim]: layer by
        layer, key before value."""
        self._check_exists("prompt_embeddings", adapter_name)
        encoder = self.encoders[adapter_name]
        pairs = [torch.stack(encoder(layer)) for layer in range(self.num_layers)]
        return torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1).contiguous()

    @torch.no_grad()
    def set_prompt_embeddings(self, adapter_name: str, embeddings: Tensor) -> None:
        """Copies keys and values in HF PEFT's layout.

        Raises:
            ValueError: a wrong shape or no such adapter.
            RuntimeError: the prefix is reparametrised.
        """
        self._check_exists("set_prompt_embeddings", adapter_name)
        wanted = [self.settings[adapter_name].length, self.num_layers * 2 * self.kv_heads * self.head_dim]
        if list(embeddings.shape) != wanted:
            raise ValueError(f"Prefix: prompt_embeddings must have shape {wanted}, got {list(embeddings.shape)}")
        encoder = self.encoders[adapter_name]
        if not isinstance(encoder, _Direct):
            raise RuntimeError("Prefix: a reparametrised prefix takes no prompt_embeddings; drop_reparametrisation()")
        for key, value, pair in zip(encoder.keys, encoder.values, self._keys_and_values(embeddings)):
            key.copy_(pair[0])
            value.copy_(pair[1])

    def drop_reparametrisation(self, adapter_name: str) -> None:
        """Makes the keys and values of now the parameters, and deletes the MLP that gave them.

        Raises:
            ValueError: no such adapter.
        """
        embeddings = self.prompt_embeddings(adapter_name)
        settings, old = self.settings[adapter_name], self.encoders[adapter_name]
        trained = self._active == adapter_name
        pairs = embeddings.view(settings.length, self.num_layers, 2, self.kv_heads, self.head_dim).permute(
            1, 2, 3, 0, 4
        )
        encoder = _Direct([pair[0].contiguous() for pair in pairs], [pair[1].contiguous() for pair in pairs])
        self.encoders[adapter_name] = encoder.train(old.training).requires_grad_(trained)
        self.settings[adapter_name] = replace(settings, hidden=None)

    def reparametrisation(self, adapter_name: str) -> dict[str, Tensor] | None:
        """The embedding and the MLP by name, for a file that training resumes from; None if there is none."""
        self._check_exists("reparametrisation", adapter_name)
        encoder = self.encoders[adapter_name]
        return dict(encoder.named_parameters()) if isinstance(encoder, _Reparametrised) else None

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: length={s.length}" for name, s in self.settings.items())
        state = "" if self._enabled else ", disabled"
        return (
            f"num_layers={self.num_layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"adapters=({adapters}), active={self._active}{state}"
        )

    def _keys_and_values(self, embeddings: Tensor) -> Tensor:
        """HF PEFT's layout as [num_layers, 2, kv_heads, length, head_dim]."""
        return embeddings.view(-1, self.num_layers, 2, self.kv_heads, self.head_dim).permute(1, 2, 3, 0, 4)

    def _tables(self) -> tuple[Any, ...]:
        return (self.encoders, self.settings)


def check_prefix(op: str, adapter_name: Any, dtype: Any) -> None:
    """Raises ValueError or TypeError unless a prefix can have this name and dtype."""
    check_name(op, adapter_name)
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")
