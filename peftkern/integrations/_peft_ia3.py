"""peft.tuners.ia3's linear layers with a forward of one op; the class names are PEFT's, so that a repr stays."""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_4bit_available
from peft.tuners import ia3
from torch import Tensor, nn

from peftkern.integrations._peft_base import (
    Accelerated,
    base_obstacle,
    call_obstacle,
    hidden_obstacle,
    idle,
    read_base,
    trains,
)
from peftkern.integrations.peft_merge import MergesNF4
from peftkern.ops._linear import FLOATING
from peftkern.ops.ia3_linear import ia3_linear


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.ia3_l]


def op(layer: Any, adapter_names: object = None) -> str:
    """The op that the layer's state asks for; PEFT has no mixed batches of (IA)^3."""
    return "nf4_linear" if idle(layer, active(layer)) else "ia3_linear"


def obstacle(layer: Any, x: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why this call is for PEFT's own forward."""
    names = active(layer)
    found = call_obstacle(layer, names, x, args, kwargs)
    if found:
        return found
    if idle(layer, names):
        return base_obstacle(layer.base_layer, x, "nf4_linear")
    found = base_obstacle(layer.base_layer, x, "ia3_linear")
    if found:
        return found
    if type(layer.base_layer) is nn.Linear and trains(layer.base_layer.weight):
        return "the base weight requires grad"
    scales = [layer.ia3_l[name] for name in names]
    if any(scale.dtype not in FLOATING for scale in scales):
        return f"the scale is {scales[0].dtype}"
    return hidden_obstacle("ia3_l", layer.ia3_l, scales, x)


def fast(layer: Any, x: Tensor) -> Tensor:
    """What PEFT's forward computes, by one op."""
    base, names = read_base(layer.base_layer, x), active(layer)
    if idle(layer, names):
        return base.alone(x)
    first, *others = names
    scale = layer.ia3_l[first].flatten().float()
    for name in others:
        scale = scale * layer.ia3_l[name].flatten()
    return base.run(x, lambda x: ia3_linear(x, base.weight, scale, base.bias, layer.is_feedforward))


class Linear(Accelerated, MergesNF4, ia3.Linear):
    """ia3.Linear, its scale on the output or on the input."""

    _obstacle, _fast, _op = obstacle, fast, op


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {ia3.Linear: Linear}

if is_bnb_4bit_available():

    class Linear4bit(Accelerated, ia3.Linear4bit):
        """ia3.Linear4bit, which returns fp32 for whatever x comes in."""

        _obstacle, _fast, _op = obstacle, fast, op

        def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._stock(x, *args, **kwargs).to(x.dtype)

    ACCELERATED[ia3.Linear4bit] = Linear4bit
