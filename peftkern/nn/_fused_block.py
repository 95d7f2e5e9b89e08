"""What LoRAAttention and LoRAMLP share: blocks that run the projections of one input in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from peftkern.nn._merge import weight_dtype
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.ops._projections import Projection

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Block = TypeVar("Block", bound="FusedBlock")

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[FusedBlock]] = {}


class FusedBlock(nn.Module):
    """A block that `from_block` changed in place: its class became a subclass of this one and of its own class.

    The block stays the same object with the same submodules, parameters, hooks and state-dict names, and an instance of
    its former class. Adapters are added, switched, merged and saved as before.
    """

    block_class: ClassVar[type[nn.Module]]
    op: ClassVar[str]
    projections: tuple[str, ...]

    def fused_layers(self) -> list[nn.Module]:
        """The projections that run in `op` now; empty if the block's own forward runs each."""
        layers = [getattr(self, name) for name in self.projections]
        base = layers[0].base_layer if isinstance(layers[0], LoRALinear) else layers[0]
        if not isinstance(base, nn.Linear):
            return []
        return [] if fusable(layers, torch.empty(0, dtype=weight_dtype(base))) is None else layers

    def undo(self) -> nn.Module:
        """Gives the block its former class back.

        Returns:
            The same block.
        """
        self.__class__ = self.block_class  # type: ignore[assignment]
        del self.projections
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy, which cannot find the class by its name."""
        return _rebuilt, (type(self).__mro__[1], self.block_class), self.__dict__


def exchanged(fused: type[Block], block: nn.Module, projections: Sequence[str]) -> Block:
    """`block` with its class exchanged.

    Raises:
        TypeError: a projection that is not a module, or a block that has been exchanged already.
    """
    what = f"{fused.__name__}.from_block"
    if isinstance(block, FusedBlock):
        raise TypeError(f"{what}: block is a {type(block).__name__} already")
    for name in projections:
        layer = getattr(block, name, None)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{what}: block.{name} must be a module, got {type(layer).__name__}")
    block.__class__ = _class_of(fused, type(block))
    result: Any = block
    result.projections = tuple(projections)
    return result


def _class_of(fused: type[FusedBlock], block_class: type[nn.Module]) -> type[FusedBlock]:
    """The one subclass of both."""
    if (fused, block_class) not in _classes:
        namespace = {"block_class": block_class, "__module__": fused.__module__, "__doc__": fused.__doc__}
        _classes[fused, block_class] = type(f"LoRA{block_class.__name__}", (fused, block_class), namespace)
    return _classes[fused, block_class]


def _rebuilt(fused: type[FusedBlock], block_class: type[nn.Module]) -> FusedBlock:
    cls = _class_of(fused, block_class)
    return cls.__new__(cls)


class Fusable(NamedTuple):
    """What the projections of a block amount to at this call."""

    projections: list[Projection]
    dropout_p: float


def fusable(layers: Sequence[nn.Module], x: Tensor) -> Fusable | None:
    """The layers as projections of x; None if one has something of its own to do, or if none has an adapter."""
    parts = [_projection_of(layer, x) for layer in layers]
    dropouts = {
        layer.settings[layer.active_adapter].dropout if layer.training else 0.0
        for layer, part in zip(layers, parts)
        if part is not None and part.lora_a is not None and isinstance(layer, LoRALinear) and layer.active_adapter
    }
    projections = [part for part in parts if part is not None]
    if len(projections) < len(parts) or len(dropouts) != 1 or torch_module._has_any_global_hook():
        return None
    return Fusable(projections, dropouts.pop())


def _projection_of(layer: nn.Module, x: Tensor) -> Projection | None:
    """None where calling the layer may do more than the product, or something else."""
    if any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in vars(layer):
        return None
    base: nn.Module = layer
    lora_a = lora_b = None
    scaling: float | Tensor = 0.0
    if type(layer) is LoRALinear:
        if layer.batch is not None:
            return None
        base = layer.effective_layer or layer.base_layer
        if layer.effective_layer is None:
            name = cast(str, layer.active_adapter)
            (lora_a, lora_b), scaling = layer.factors(name), layer.scaling[name]
    if type(base) is NF4Linear:
        takes = base.compute_dtype in (None, x.dtype)
        return Projection(base.nf4, lora_a, lora_b, scaling, base.bias) if takes else None
    if type(base) is not nn.Linear:
        return None
    if base is layer and x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # torch raises
    return Projection(base.weight, lora_a, lora_b, scaling, base.bias)
