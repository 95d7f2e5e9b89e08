"""peft.tuners.lora's linear layers with a forward of one op; the class names are PEFT's, so that a repr stays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern import backends
from peftkern.integrations._peft_base import (
    DENSE,
    Accelerated,
    Base,
    base_obstacle,
    call_obstacle,
    hidden_obstacle,
    idle,
    is_small,
    op_dtype,
    read_base,
    tensor_of,
    trains,
)
from peftkern.integrations.peft_merge import MergesNF4
from peftkern.nn._fused_block import AdaptedProjection
from peftkern.ops._linear import autocast, computing_dtype
from peftkern.ops._projections import Projection
from peftkern.ops.dora_linear import dora_linear
from peftkern.ops.lora_linear import lora_linear_by
from peftkern.ops.multi_lora_linear import multi_lora_linear

BASE_NAME = "__base__"
"""PEFT's word for samples without an adapter."""


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def drops(layer: Any) -> bool:
    """Whether an active adapter drops elements of x."""
    return layer.training and any(type(each) is nn.Dropout for each in layer._modules["lora_dropout"]._modules.values())


def op(layer: Any, adapter_names: Sequence[str] | None = None) -> str:
    """The op that the layer's state asks for, and the names of a mixed batch."""
    names = active(layer) if adapter_names is None else in_batch(layer, adapter_names)
    if idle(layer, names):
        return "nf4_linear"
    return _op_of(layer, names) if adapter_names is None else "multi_lora_linear"


def _op_of(layer: Any, names: list[str]) -> str:
    variants = layer.lora_variant
    dora = variants and any(type(variants.get(name)) is DoraLinearVariant for name in names)
    return "dora_linear" if dora else "lora_linear"


class Parts(NamedTuple):
    """What a layer has of one adapter."""

    a: Any
    b: Any
    dropout: Any
    scaling: float | Tensor

    @property
    def dropout_p(self) -> float:
        """The probability in force."""
        return self.dropout.p if self.dropout.training and type(self.dropout) is nn.Dropout else 0.0


def parts_of(layer: Any, name: str) -> Parts:
    """Of an adapter that the layer has; past ModuleDict's own access, which is a third of a small layer's time."""
    tables = layer._modules
    a, b, dropout = (tables[table]._modules[name] for table in ("lora_A", "lora_B", "lora_dropout"))
    return Parts(a, b, dropout, layer.scaling[name])


def in_batch(layer: Any, adapter_names: Sequence[str]) -> list[str]:
    """Which of a mixed batch's adapters this layer has; the base alone computes the others' samples, as in PEFT."""
    return [name for name in dict.fromkeys(adapter_names) if name in layer.lora_A and name != BASE_NAME]


def obstacle(layer: Any, x: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why this call is for PEFT's own forward."""
    adapter_names: Any = kwargs.get("adapter_names")
    mixed = adapter_names is not None
    if mixed:
        found = _batch_obstacle(layer, x, adapter_names)
        if found:
            return found
    names = in_batch(layer, adapter_names) if mixed else active(layer)
    others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
    found = call_obstacle(layer, names, x, args, others)
    if found:
        return found
    if idle(layer, names):
        return base_obstacle(layer.base_layer, x, "nf4_linear")
    chosen = "multi_lora_linear" if mixed else _op_of(layer, names)
    found = base_obstacle(layer.base_layer, x, chosen)
    if found:
        return found
    dtype = op_dtype(layer.base_layer, x)
    for name in names:
        found = _adapter_obstacle(layer, name, x, dtype)
        if found:
            return found
    if mixed:
        return _mixed_obstacle(layer, names)
    return "several adapters, one of them DoRA" if len(names) > 1 and chosen == "dora_linear" else ""


def _batch_obstacle(layer: Any, x: Any, adapter_names: Any) -> str:
    """What is wrong with a mixed batch; PEFT raises its own errors for the first three."""
    if not isinstance(adapter_names, list | tuple) or not isinstance(x, Tensor) or len(x) != len(adapter_names):
        return "adapter_names does not fit x"
    if layer.merged:
        return "adapter_names with merged adapters"
    if any(layer.use_dora.get(name, False) for name in adapter_names if name != BASE_NAME):
        return "a mixed batch with DoRA"
    return "a mixed batch of vectors" if x.dim() < 2 else ""


def _mixed_obstacle(layer: Any, names: list[str]) -> str:
    """What of the adapters of a mixed batch, each of which an op could compute, none computes together."""
    if any(layer.lora_B[name].bias is not None for name in names):
        return "a mixed batch with lora_bias"
    if len({parts_of(layer, name).dropout_p for name in names}) > 1:
        return "a mixed batch of several dropout rates"
    return ""


def _adapter_obstacle(layer: Any, name: str, x: Tensor, dtype: torch.dtype) -> str:
    a, b, dropout, scaling = parts_of(layer, name)
    if type(a) is not nn.Linear or type(b) is not nn.Linear or tensor_of(a, "bias") is not None:
        return f"lora_A is {type(a).__name__}, lora_B {type(b).__name__}"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"the dropout is {type(dropout).__name__}"
    a_weight, b_weight, b_bias = tensor_of(a, "weight"), tensor_of(b, "weight"), tensor_of(b, "bias")
    a_dtype = a_weight.dtype
    if a_dtype != b_weight.dtype or a_dtype not in (torch.float32, dtype):
        return f"the adapter is {a_dtype} and {b_weight.dtype}, x {dtype}"
    if a_dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return "the cast of x to the adapter's dtype is disabled"
    if isinstance(scaling, Tensor) and (scaling.dim() != 0 or scaling.device != x.device):
        return "scaling is not a number or a 0-d tensor on x's device"
    found = (
        hidden_obstacle("lora_A", a, (a_weight,), x)
        or hidden_obstacle("lora_B", b, (b_weight, b_bias), x)
        or hidden_obstacle("lora_dropout", dropout, (), x)
    )
    variant = layer.lora_variant.get(name)
    if found or variant is None:
        return found
    if type(variant) is not DoraLinearVariant:
        return f"a LoRA variant, {type(variant).__name__}"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer:
        return f"the magnitude is {type(magnitude).__name__}"
    if b_bias is not None:
        return "DoRA with lora_bias"
    base = layer.base_layer
    if type(base) in DENSE and trains(base.weight):
        return "DoRA on a weight that requires grad"
    if magnitude.fan_in_fan_out != (type(base) is Conv1D):
        return f"DoRA with fan_in_fan_out={magnitude.fan_in_fan_out} on {type(base).__name__}"
    return hidden_obstacle("lora_magnitude_vector", magnitude, [magnitude.weight], x)


def projection(layer: Any, x: Tensor) -> AdaptedProjection | None:
    """What the layer makes of x, as one of a block's; None where `lora_linear` would not run it alone."""
    if x.dim() and x.shape[-1] != layer.in_features:  # an MLP's down projection gets something else, of x's dtype
        x = x.new_empty(0, layer.in_features)
    names = active(layer)
    if len(names) != 1 or idle(layer, names) or _op_of(layer, names) != "lora_linear" or obstacle(layer, x, (), {}):
        return None
    base, adapter = read_base(layer.base_layer, x), parts_of(layer, names[0])
    if base.keeps_dtype and not base.dtype == computing_dtype(x) == x.dtype:
        return None
    if x.numel() and is_small(layer, x):
        return None
    a, b = tensor_of(adapter.a, "weight"), tensor_of(adapter.b, "weight")
    shared = Projection(base.weight, a, b, adapter.scaling, _bias([adapter], base))
    return AdaptedProjection(shared, adapter.dropout_p)


def fast(layer: Any, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
    """What PEFT's forward computes, by one op."""
    base = read_base(layer.base_layer, x)
    names = active(layer) if adapter_names is None else in_batch(layer, adapter_names)
    if idle(layer, names):
        return base.alone(x)
    if adapter_names is not None:
        return base.run(x, lambda x: _mixed(layer, names, adapter_names, base, x))
    adapters = [parts_of(layer, name) for name in names]
    if _op_of(layer, names) == "dora_linear":
        return base.run(x, partial(_dora, layer, names[0], adapters[0], base))
    return base.run(x, partial(_lora, adapters, base))


def _lora(adapters: list[Parts], base: Base, x: Tensor) -> Tensor:
    """The adapters without dropout in one op; every other one has a mask of its own, the first takes a place in it."""
    at_once, others = adapters, []
    if len(adapters) > 1:
        at_once = [adapter for adapter in adapters if adapter.dropout_p == 0] or adapters[:1]
        others = [adapter for adapter in adapters if adapter.dropout_p > 0 and adapter is not at_once[0]]
    p, scaling = at_once[0].dropout_p, at_once[0].scaling
    if len(at_once) == 1:
        a, b = tensor_of(at_once[0].a, "weight"), tensor_of(at_once[0].b, "weight")
    else:  # one adapter of all their ranks, made anew at every call: nothing stale can be kept
        a = torch.cat([adapter.a.weight.float() for adapter in at_once])
        b = torch.cat([adapter.b.weight.float() * adapter.scaling for adapter in at_once], 1)
        scaling = 1.0
    x, bias = autocast(x, _bias(at_once, base))
    implementation = backends.choose("lora_linear", x, None, base.weight, p).implementation
    y = lora_linear_by(implementation, x, base.weight, a, b, scaling, bias, p)
    for adapter in others:
        y = y + _delta(adapter, x)
    return y.to(x.dtype)


def _delta(adapter: Parts, x: Tensor) -> Tensor:
    """What one adapter adds to y, as PEFT computes it."""
    with torch.autocast(x.device.type, enabled=False):
        a, b = adapter.a, adapter.b
        dropped = F.dropout(x.to(a.weight.dtype), adapter.dropout_p)
        return F.linear(F.linear(dropped, a.weight), b.weight, b.bias) * adapter.scaling


def _mixed(layer: Any, names: list[str], adapter_names: Sequence[str], base: Base, x: Tensor) -> Tensor:
    """Only the adapters in the batch: the others get no gradient, as in PEFT."""
    places = {name: i for i, name in enumerate(names)}
    indices = torch.tensor([places.get(name, -1) for name in adapter_names], device="cpu")
    lora_as, lora_bs = ([table[name].weight for name in names] for table in (layer.lora_A, layer.lora_B))
    p = parts_of(layer, names[0]).dropout_p
    scalings = [layer.scaling[name] for name in names]
    return multi_lora_linear(x, base.weight, lora_as, lora_bs, scalings, indices, base.bias, p, p > 0)


def _dora(layer: Any, name: str, adapter: Parts, base: Base, x: Tensor) -> Tensor:
    a, b, m = adapter.a.weight, adapter.b.weight, layer.lora_magnitude_vector[name].weight
    p = adapter.dropout_p if layer.training else 0.0
    return dora_linear(x, base.weight, a, b, m.float(), adapter.scaling, base.bias, p, p > 0)


def _bias(adapters: list[Parts], base: Base) -> Tensor | None:
    """The base layer's bias and the scaled ones of lora_B, in fp32 as soon as there are several."""
    bias = base.bias
    for adapter in adapters:
        own = tensor_of(adapter.b, "bias")
        if own is not None:
            scaled = own.float() * adapter.scaling
            bias = scaled if bias is None else bias.float() + scaled
    return bias


class Linear(Accelerated, MergesNF4, lora.Linear):
    """lora.Linear: LoRA, rsLoRA, lora_bias, several adapters, DoRA."""

    _obstacle, _fast, _op = obstacle, fast, op
    _usual_op, _drops, projection = "lora_linear", drops, projection


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: Linear}

if is_bnb_4bit_available():

    class Linear4bit(Accelerated, lora.Linear4bit):
        """lora.Linear4bit, whose merge forgets to scale the bias of lora_B."""

        _obstacle, _fast, _op = obstacle, fast, op
        _usual_op, _drops, projection = "lora_linear", drops, projection
        lora_bias: dict[str, bool]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """PEFT's, with `lora_bias` scaled as its forward scales it."""
            names = check_adapters_to_merge(self, adapter_names)
            biased = [name for name in names if self.lora_bias.get(name) and name in self.lora_A]
            bias = self.get_base_layer().bias
            if biased and bias is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
            for name in biased if safe_merge else ():
                if not torch.isfinite(bias + self._scaled_bias(name)).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            already = len(self.merged_adapters)
            flags, self.lora_bias = self.lora_bias, dict.fromkeys(self.lora_bias, False)
            try:
                super().merge(safe_merge, names)
            finally:
                self.lora_bias = flags
                for name in self.merged_adapters[already:]:
                    if name in biased:
                        bias.data += self._scaled_bias(name)

        def unmerge(self) -> None:
            """PEFT's, with `lora_bias` scaled as `merge` scales it."""
            biased = [name for name in self.merged_adapters if self.lora_bias.get(name) and name in self.lora_A]
            flags, self.lora_bias = self.lora_bias, dict.fromkeys(self.lora_bias, False)
            try:
                super().unmerge()
            finally:
                self.lora_bias = flags
                for name in biased:
                    if name not in self.merged_adapters:
                        self.get_base_layer().bias.data -= self._scaled_bias(name)

        def _scaled_bias(self, name: str) -> Tensor:
            return self.lora_B[name].bias.data * self.scaling[name]

    ACCELERATED[lora.Linear4bit] = Linear4bit
