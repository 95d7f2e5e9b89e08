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


class Projects:
    """Mixed into a linear layer of another library that a block may run in one op with others on the same x."""

    def projection(self, x: Tensor) -> AdaptedProjection | None:
        """What the layer makes of x; None if its own forward has to run."""
        raise NotImplementedError

    def probe(self) -> Tensor:
        """An input like those that the layer gets, without rows."""
        raise NotImplementedError

    def ran_fused(self) -> None:
        """Called whenever a block has run the layer."""


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
        probe = _probe_of(layers)
        return [] if probe is None or fusable(layers, probe) is None else layers

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


class AdaptedProjection(NamedTuple):
    """A projection, and the dropout of its adapter; None without one."""

    projection: Projection
    dropout_p: float | None


class Fusable(NamedTuple):
    """What the projections of a block amount to at this call."""

    projections: list[Projection]
    dropout_p: float


def fusable(layers: Sequence[nn.Module], x: Tensor) -> Fusable | None:
    """The layers as projections of x; None if one has something of its own to do, or if none has an adapter."""
    parts = [part for part in (_projection_of(layer, x) for layer in layers) if part is not None]
    dropouts = {part.dropout_p for part in parts} - {None}
    if len(parts) < len(layers) or len(dropouts) != 1 or torch_module._has_any_global_hook():
        return None
    return Fusable([part.projection for part in parts], cast(float, dropouts.pop()))


def ran_fused(layers: Sequence[nn.Module]) -> None:
    """Tells the layers that a block has run them."""
    for layer in layers:
        if isinstance(layer, Projects):
            layer.ran_fused()


def _probe_of(layers: Sequence[nn.Module]) -> Tensor | None:
    """An input like those that the layers get; None if none of them is known."""
    for layer in layers:
        if isinstance(layer, Projects):
            return layer.probe()
    base = layers[0].base_layer if isinstance(layers[0], LoRALinear) else layers[0]
    return torch.empty(0, dtype=weight_dtype(base), device="cpu") if isinstance(base, nn.Linear) else None


def _projection_of(layer: nn.Module, x: Tensor) -> AdaptedProjection | None:
    """None where calling the layer may do more than the product, or something else."""
    if any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in vars(layer):
        return None
    if isinstance(layer, Projects):
        return layer.projection(x)
    base: nn.Module = layer
    lora_a = lora_b = dropout_p = None
    scaling: float | Tensor = 0.0
    if type(layer) is LoRALinear:
        if layer.batch is not None:
            return None
        base = layer.effective_layer or layer.base_layer
        if layer.effective_layer is None:
            name = cast(str, layer.active_adapter)
            (lora_a, lora_b), scaling = layer.factors(name), layer.scaling[name]
            dropout_p = layer.settings[name].dropout if layer.training else 0.0
    if type(base) is NF4Linear:
        takes = base.compute_dtype in (None, x.dtype)
        projection = Projection(base.nf4, lora_a, lora_b, scaling, base.bias)
        return AdaptedProjection(projection, dropout_p) if takes else None
    if type(base) is not nn.Linear:
        return None
    if base is layer and x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # torch raises
    return AdaptedProjection(Projection(base.weight, lora_a, lora_b, scaling, base.bias), dropout_p)
