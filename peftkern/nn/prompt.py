"""Trained prompts before or among a model's token embeddings, over `ops.prompt_embedding`: PromptEmbedding and
PromptEncoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.nn._prompts import PromptModule, _table, check_choice, check_count
from peftkern.ops._linear import number
from peftkern.ops.prompt_embedding import IGNORED_LABEL, PromptedInputs, prompt_embedding

INITS = ("uniform", "uniform_positive", "normal", "sampled_vocab", "text")
ENCODERS = ("lstm", "mlp", "none")


@dataclass(frozen=True)
class PromptSettings:
    """One prompt's hyper-parameters.

    Attributes:
        num_virtual_tokens: rows of the prompt.
        init: what it starts from: "uniform" U(-0.5, 0.5), as the paper has it; "uniform_positive" U[0, 0.5), as the
            authors' code; "normal" N(0, 1), PEFT's RANDOM; "sampled_vocab", the embeddings of tokens drawn from the
            vocabulary; "text", those of given tokens, such as the class labels.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    num_virtual_tokens: int = 20
    init: str = "sampled_vocab"

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        check_choice("init", self.init, INITS)


@dataclass(frozen=True)
class PromptEncoderSettings:
    """One encoded prompt's hyper-parameters.

    Attributes:
        num_virtual_tokens: rows of the prompt.
        encoder: what its embeddings go through: "lstm", a bidirectional LSTM and two linear layers, as in the paper;
            "mlp", three linear layers, PEFT's default; "none", nothing.
        hidden_size: of the encoder, per direction of the LSTM; by default half the features for "lstm", which is the
            authors' code, and all of them for "mlp".
        num_layers: of the LSTM.
        dropout: between the layers of the LSTM, in training.
        pseudo_token_id: the token in input_ids whose i-th occurrence becomes the prompt's row i; without it the prompt
            stands before the input.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    num_virtual_tokens: int = 20
    encoder: str = "lstm"
    hidden_size: int | None = None
    num_layers: int = 2
    dropout: float = 0.0
    pseudo_token_id: int | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        check_choice("encoder", self.encoder, ENCODERS)
        if self.hidden_size is not None:
            check_count("hidden_size", self.hidden_size)
        check_count("num_layers", self.num_layers)
        object.__setattr__(self, "dropout", number(self.dropout))
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"prompt: dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"prompt: dropout must be from 0 to 1, got {self.dropout}")
        if self.pseudo_token_id is not None and type(self.pseudo_token_id) is not int:
            raise TypeError(f"prompt: pseudo_token_id must be an int, got {self.pseudo_token_id!r}")


class PromptEmbedding(PromptModule):
    """A trained prompt before the tokens' embeddings (prompt tuning, arXiv 2104.08691, section 2).

    `prompts.<name>` [num_virtual_tokens, features] is all that trains. One prompt is active, and trainable, at a time;
    `prompt_ids` gives each sample of a batch its own: names, or a tensor that counts them as `settings` has them.

    Args:
        embedding: the model's token embedding, for features, device, dtype and the vectors of "sampled_vocab" and
            "text"; it is not kept.
        num_virtual_tokens, init: of the first prompt, see `PromptSettings`. How a prompt starts decides much of what it
            reaches: "sampled_vocab" is far ahead of random ones in small models.
        token_ids: for "text" alone: tokens whose embeddings are the prompt's first values, repeated or cut to length.
        adapter_name: of the first prompt, which is active.
        dtype: of the prompt, fp32 or the embedding's.

    Attributes:
        settings: adapter name -> PromptSettings.

    Raises:
        TypeError, ValueError: an embedding, setting, name or dtype that cannot be.

    Shape:
        forward(input_ids [batch, tokens], embedding, attention_mask, labels, position_ids, prompt_ids) ->
        PromptedInputs, each [batch, num_virtual_tokens + tokens, ...]; see `prompt_embedding`.
    """

    def __init__(
        self,
        embedding: nn.Module,
        num_virtual_tokens: int = 20,
        init: str = "sampled_vocab",
        token_ids: Sequence[int] | Tensor | None = None,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(embedding)
        self.prompts = nn.ParameterDict()
        self.add_adapter(adapter_name, embedding, num_virtual_tokens, init, token_ids, dtype)
        self.set_adapter(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        embedding: nn.Module,
        num_virtual_tokens: int = 20,
        init: str = "sampled_vocab",
        token_ids: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds a prompt, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        settings = PromptSettings(num_virtual_tokens, init)
        weight = self._check_addition(adapter_name, embedding, dtype)
        start = torch.empty(num_virtual_tokens, self.features, dtype=dtype, device=weight.device)
        with torch.no_grad():
            _initialise(start, init, embedding, weight, token_ids)
        self.prompts[adapter_name] = nn.Parameter(start, requires_grad=False)
        self.settings[adapter_name] = settings

    def prompt(self, adapter_name: str) -> Tensor:
        """The prompt [num_virtual_tokens, features] of an adapter."""
        self._check_exists("prompt", adapter_name)
        return self.prompts[adapter_name]

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """The prompt alone."""
        return (cast(nn.Parameter, self.prompt(adapter_name)),)

    def _tables(self) -> tuple[Any, ...]:
        return (self.prompts, self.settings)


def _initialise(start: Tensor, init: str, embedding: nn.Module, weight: Tensor, token_ids: Any) -> None:
    """Fills `start` [rows, features]; checks token_ids."""
    if (init == "text") != (token_ids is not None):
        given = "none were given" if token_ids is None else f"init is {init!r}"
        raise ValueError(f"prompt: token_ids are the tokens of init='text', and {given}")
    if init == "uniform":
        start.uniform_(-0.5, 0.5)
    elif init == "uniform_positive":
        start.uniform_(0.0, 0.5)
    elif init == "normal":
        start.normal_()
    else:
        if init == "sampled_vocab":
            ids = torch.randint(weight.shape[0], (start.shape[0],), device=weight.device)
        else:
            given_ids = [int(token) for token in token_ids]
            wrong = [token for token in given_ids if not 0 <= token < weight.shape[0]]
            if wrong or not given_ids:
                got = wrong[0] if wrong else "none"
                raise ValueError(f"prompt: token_ids must be from 0 to {weight.shape[0] - 1}, got {got}")
            repeated = itertools.islice(itertools.cycle(given_ids), start.shape[0])
            ids = torch.tensor(list(repeated), device=weight.device)
        # By the module, not its weight: some embeddings scale what they look up.
        start.copy_(embedding(ids))


class _EncoderLinear(nn.Linear):
    """A type of its own, so that what swaps every nn.Linear of a model passes it by."""


class _BidirectionalLSTM(nn.Module):
    """nn.LSTM with its parameters' names, for one sequence [rows, features]; torch.compile takes no nn.LSTM whole."""

    def __init__(self, features: int, hidden: int, layers: int, dropout: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.layers, self.dropout = hidden, layers, dropout if layers > 1 else 0.0
        for name, parameter in nn.LSTM(features, hidden, layers, bidirectional=True, **options).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, rows: Tensor) -> Tensor:
        start = rows.new_zeros(2 * self.layers, 1, self.hidden)
        weights: list[Tensor] = list(self.parameters())
        options = (True, self.layers, self.dropout, self.training, True, False)
        return torch.lstm(rows.unsqueeze(1), (start, start), weights, *options)[0].squeeze(1)


class _Encoder(nn.Module):
    """Embeddings of the pseudo tokens, and what they go through. Names and sizes are those of PEFT's PromptEncoder."""

    def __init__(self, features: int, settings: PromptEncoderSettings, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kind, hidden = settings.encoder, cast(int, settings.hidden_size)
        self.embedding = nn.Embedding(settings.num_virtual_tokens, features, **options)
        if self.kind == "lstm":
            self.lstm_head = _BidirectionalLSTM(features, hidden, settings.num_layers, settings.dropout, options)
            self.mlp_head = _mlp((2 * hidden, 2 * hidden, features), options)
        elif self.kind == "mlp":
            self.mlp_head = _mlp((features, hidden, hidden, features), options)

    def forward(self) -> Tensor:
        rows = self.embedding.weight
        if self.kind == "lstm":
            return self.mlp_head(self.lstm_head(rows))
        return self.mlp_head(rows) if self.kind == "mlp" else rows


def _mlp(sizes: Sequence[int], options: dict[str, Any]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [_EncoderLinear(before, after, **options), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PromptEncoder(PromptModule):
    """A trained prompt that is computed from embeddings of its own (P-tuning, arXiv 2103.10385, section 3).

    `encoders.<name>.` holds what trains, under the names of PEFT's PromptEncoder: `embedding.weight`
    [num_virtual_tokens, features], `lstm_head.*` and `mlp_head.*`. With the defaults it is that of the authors' code.
    The prompt is computed once a call, not for each sample. It stands before the input or, with `pseudo_token_id`,
    wherever input_ids have that token, as often in every sample as the prompt has rows; nothing gets longer then, and
    labels of these places are ignored.

    Args:
        embedding: the model's token embedding, for features and device; it is not kept.
        num_virtual_tokens, encoder, hidden_size, num_layers, dropout, pseudo_token_id: of the first prompt, see
            `PromptEncoderSettings`.
        adapter_name: of the first prompt, which is active.
        dtype: of all that trains, fp32 or the embedding's.

    Attributes:
        settings: adapter name -> PromptEncoderSettings.

    Raises:
        TypeError, ValueError: an embedding, setting, name or dtype that cannot be.

    Shape:
        As PromptEmbedding's; with pseudo_token_id [batch, tokens, ...].
    """

    def __init__(
        self,
        embedding: nn.Module,
        num_virtual_tokens: int = 20,
        encoder: str = "lstm",
        hidden_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        pseudo_token_id: int | None = None,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(embedding)
        self.encoders = nn.ModuleDict()
        settings = PromptEncoderSettings(num_virtual_tokens, encoder, hidden_size, num_layers, dropout, pseudo_token_id)
        self.add_adapter(adapter_name, embedding, **asdict(settings), dtype=dtype)
        self.set_adapter(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        embedding: nn.Module,
        num_virtual_tokens: int = 20,
        encoder: str = "lstm",
        hidden_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        pseudo_token_id: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds a prompt, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a setting, name or dtype that cannot be, or a name that is taken.
        """
        settings = PromptEncoderSettings(num_virtual_tokens, encoder, hidden_size, num_layers, dropout, pseudo_token_id)
        weight = self._check_addition(adapter_name, embedding, dtype)
        if hidden_size is None:
            settings = replace(settings, hidden_size=max(1, self.features // 2) if encoder == "lstm" else self.features)
        self.encoders[adapter_name] = _Encoder(self.features, settings, weight.device, dtype).requires_grad_(False)
        self.encoders[adapter_name].train(self.training)
        self.settings[adapter_name] = settings

    def prompt(self, adapter_name: str) -> Tensor:
        """The prompt [num_virtual_tokens, features] of an adapter."""
        self._check_exists("prompt", adapter_name)
        return self.encoders[adapter_name]()

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """The encoder's, its embeddings among them."""
        self._check_exists("adapter_parameters", adapter_name)
        return tuple(self.encoders[adapter_name].parameters())

    @property
    def pseudo_token_id(self) -> int | None:
        """The active prompt's."""
        return self.settings[cast(str, self._active)].pseudo_token_id if self.prompting else None

    @property
    def prefix_length(self) -> int:
        return super().prefix_length if self.pseudo_token_id is None else 0

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
        pseudo = self.pseudo_token_id
        if prompt_ids is not None and len({each.pseudo_token_id for each in self.settings.values()}) > 1:
            raise ValueError("PromptEncoder: prompt_ids needs prompts of one pseudo_token_id")
        if pseudo is None:
            return super().forward(
                input_ids, embedding, attention_mask, labels, position_ids, prompt_ids, inputs_embeds
            )
        if input_ids is None:
            raise ValueError("PromptEncoder: the places of the prompt are in input_ids; inputs_embeds have none")
        prompt, ids = self._chosen(prompt_ids)
        tokens, places = _without_pseudo(input_ids, pseudo, prompt.shape[-2])
        tokens, weight = _table(tokens, embedding, None)
        embeds = prompt_embedding(tokens, weight, prompt, ids, prompt_places=places).inputs_embeds
        if labels is not None and labels.shape == input_ids.shape:
            labels = labels.masked_fill(input_ids == pseudo, IGNORED_LABEL)
        return PromptedInputs(embeds, attention_mask, labels, position_ids)

    def _tables(self) -> tuple[Any, ...]:
        return (self.encoders, self.settings)


def _without_pseudo(input_ids: Tensor, pseudo: int, rows: int) -> tuple[Tensor, Tensor]:
    """The other tokens [batch, tokens - rows], and where the pseudo tokens are [batch, rows]."""
    is_pseudo = input_ids == pseudo
    counts = is_pseudo.sum(1)
    if not torch.compiler.is_compiling() and not (counts == rows).all():
        sample = int((counts != rows).nonzero()[0])
        raise ValueError(
            f"PromptEncoder: every sample must have pseudo_token_id {pseudo} {rows} times, sample {sample} has it "
            f"{int(counts[sample])} times"
        )
    # Stable: the pseudo tokens' places last, both kinds in order.
    order = is_pseudo.to(torch.uint8).argsort(dim=1, stable=True)
    kept = input_ids.shape[1] - rows
    return input_ids.gather(1, order[:, :kept]), order[:, kept:]
