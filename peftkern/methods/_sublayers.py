"""Where in a transformer's layers the sublayers end, for methods that work on their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from peftkern._modules import outer_modules


class Sublayer(NamedTuple):
    """One half of a layer. Paths are from the layer.

    Attributes:
        output: the last module before the residual is added.
        source: the module that is called with the residual stream.
        argument: which of its arguments that is.
        container: where AdapterHub keeps the adapters.
    """

    output: str
    source: str
    argument: int
    container: str


@dataclass(frozen=True)
class Architecture:
    """How the layers of some models are built.

    Attributes:
        models: which.
        attention, feed_forward: a layer's halves.
        norm: a norm of the residual stream, whose weight tells its width and device.
    """

    models: str
    attention: Sublayer
    feed_forward: Sublayer
    norm: str

    def matches(self, layer: nn.Module) -> bool:
        """Whether a module is such a layer."""
        halves = (self.attention, self.feed_forward)
        paths = [path for half in halves for path in (half.output, half.source)]
        return all(_has(layer, path) for path in (*paths, self.norm))


# The first that matches; AdapterHub keeps what is not BERT's beside the halves.
_BESIDE = ("attention_adapters.adapters", "output_adapters.adapters")
_O_PROJ = Sublayer("self_attn.o_proj", "input_layernorm", 0, _BESIDE[0])
ARCHITECTURES = (
    Architecture(
        "BERT, RoBERTa, ELECTRA",
        Sublayer("attention.output.dropout", "attention.output", 1, "attention.output.adapters"),
        Sublayer("output.dropout", "output", 1, "output.adapters"),
        "output.LayerNorm",
    ),
    Architecture(
        "GPT-2",
        Sublayer("attn.resid_dropout", "ln_1", 0, _BESIDE[0]),
        Sublayer("mlp.dropout", "ln_2", 0, _BESIDE[1]),
        "ln_2",
    ),
    Architecture(
        "Gemma 2, Gemma 3",
        _O_PROJ,
        Sublayer("mlp.down_proj", "pre_feedforward_layernorm", 0, _BESIDE[1]),
        "pre_feedforward_layernorm",
    ),
    Architecture(
        "Llama, Mistral, Qwen2, Qwen3, Gemma",
        _O_PROJ,
        Sublayer("mlp.down_proj", "post_attention_layernorm", 0, _BESIDE[1]),
        "post_attention_layernorm",
    ),
)


class Place(NamedTuple):
    """A sublayer in a model.

    Attributes:
        layer: path of the layer.
        number: which of the model's layers it is, from 0.
        kind: "attention" or "feed_forward".
        sublayer: paths inside the layer.
        norm: the architecture's.
    """

    layer: str
    number: int
    kind: str
    sublayer: Sublayer
    norm: str

    def path(self, inside: str) -> str:
        """From the model, of what is `inside` the layer."""
        return f"{self.layer}.{inside}" if self.layer else inside

    @property
    def output(self) -> str:
        return self.path(self.sublayer.output)


def sublayers(op: str, model: nn.Module) -> list[Place]:
    """Every sublayer of a model, attention and feed-forward of each layer.

    Raises:
        ValueError: the model has no layer of a known architecture.
    """
    found: list[Place] = []
    for path, module in outer_modules(model):
        architecture = next((a for a in ARCHITECTURES if a.matches(module)), None)
        if architecture is not None:
            number = len(found) // 2
            for kind in ("attention", "feed_forward"):
                found.append(Place(path, number, kind, getattr(architecture, kind), architecture.norm))
    if not found:
        lists: list[nn.Module] = [m for _, m in outer_modules(model) if isinstance(m, nn.ModuleList)]
        kinds = dict.fromkeys(type(child).__name__ for parent in lists or [model] for child in parent.children())
        raise ValueError(
            f"{op}: no layer of {type(model).__name__} is built like those of "
            f"{'; '.join(a.models for a in ARCHITECTURES)}; it has {', '.join(kinds) or 'no modules'}"
        )
    return found


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
