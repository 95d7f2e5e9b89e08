"""peft.tuners.ia3's linear layers with a forward of one op; the class names are PEFT's, so that a repr stays."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.import_utils import is_bnb_4bit_available
from peft.tuners import ia3
from torch import Tensor, nn

from peftkern import backends
from peftkern.integrations._peft_base import (
    DENSE,
    Accelerated,
    Base,
    base_obstacle,
    call_obstacle,
    hidden_obstacle,
    idle,
    read_base,
    trains,
)
from peftkern.integrations.peft_merge import MergesNF4
from peftkern.ops._linear import FLOATING, autocast
from peftkern.ops.ia3_linear import ia3_linear_by


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    present = layer._modules["ia3_l"]._parameters
    return [name for name in layer.active_adapters if name in present]


def drops(layer: Any) -> bool:
    """(IA)^3 has no dropout."""
    return False


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
    if type(layer.base_layer) in DENSE and trains(layer.base_layer.weight):
        return "the base weight requires grad"
    table = layer._modules["ia3_l"]
    scales = [table._parameters[name] for name in names]
    for scale in scales:
        if scale.dtype not in FLOATING:
            return f"the scale is {scale.dtype}"
    return hidden_obstacle("ia3_l", table, scales, x)


def fast(layer: Any, x: Tensor) -> Tensor:
    """What PEFT's forward computes, by one op."""
    base, names = read_base(layer.base_layer, x), active(layer)
    if idle(layer, names):
        return base.alone(x)
    scales = layer._modules["ia3_l"]._parameters
    first, *others = names
    scale = scales[first].view(-1)
    for name in others:
        scale = scale.float() * scales[name].view(-1)
    return base.run(x, partial(_ia3, scale, base, layer.is_feedforward))


def _ia3(scale: Tensor, base: Base, scale_input: bool, x: Tensor) -> Tensor:
    x, bias = autocast(x, base.bias)
    implementation = backends.choose("ia3_linear", x).implementation
    return ia3_linear_by(implementation, x, base.weight, scale, bias, scale_input)


class Linear(Accelerated, MergesNF4, ia3.Linear):
    """ia3.Linear, its scale on the output or on the input."""

    _obstacle, _fast, _op = obstacle, fast, op
    _usual_op, _drops, lora_variant = "ia3_linear", drops, None


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {ia3.Linear: Linear}

if is_bnb_4bit_available():

    class Linear4bit(Accelerated, ia3.Linear4bit):
        """ia3.Linear4bit, which returns fp32 for whatever x comes in."""

        _obstacle, _fast, _op = obstacle, fast, op
        _usual_op, _drops, lora_variant = "ia3_linear", drops, None

        def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._stock(x, *args, **kwargs).to(x.dtype)

    ACCELERATED[ia3.Linear4bit] = Linear4bit
