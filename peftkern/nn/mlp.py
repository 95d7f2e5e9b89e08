"""LoRAMLP: a gated MLP block that runs as one op, over `ops.lora_mlp`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from peftkern.nn._fused_block import FusedBlock, exchanged, fusable, ran_fused
from peftkern.ops.lora_mlp import lora_mlp

# torch's and transformers' classes; NewGELUActivation is GELUTanh's formula.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class LoRAMLP(FusedBlock):
    """A block `down_proj(act_fn(gate_proj(x)) * up_proj(x))` that runs in one `lora_mlp`.

    Made from a block by `from_block`, in place: the block keeps its submodules, names, hooks and everything else. Where
    a projection has hooks, a method other than LoRA, or a dropout of its own, or where the activation is not SiLU or
    GELU, the block's own forward runs.
    """

    op = "lora_mlp"

    @classmethod
    def from_block(
        cls, block: nn.Module, projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    ) -> LoRAMLP:
        """Changes a block whose forward is `down(self.act_fn(gate(x)) * up(x))`.

        Args:
            block: such as transformers' LlamaMLP; it is changed in place.
            projections: the names of gate, up and down.

        Returns:
            The same block.

        Raises:
            TypeError: a projection that is not a module, or a block that has been changed already.
        """
        return exchanged(cls, block, projections)

    def fused_layers(self) -> list[nn.Module]:
        return [] if _activation(self.act_fn) is None else super().fused_layers()

    def forward(self, x: Tensor) -> Tensor:
        activation = _activation(self.act_fn)
        layers = [getattr(self, name) for name in self.projections]
        fused = None if activation is None else fusable(layers, x)
        if activation is None or fused is None:
            return self.block_class.forward(self, x)
        ran_fused(layers)
        (gate, *_), (up, *_), (down, *_) = fused.projections
        adapters = [
            None if p.lora_a is None or p.lora_b is None else (p.lora_a, p.lora_b, p.scaling) for p in fused.projections
        ]
        biases = [p.bias for p in fused.projections]
        return lora_mlp(x, gate, up, down, adapters, activation, fused.dropout_p, training=True, biases=biases)


def _activation(function: object) -> str | None:
    """Its name for `lora_mlp`; None if that does not have it."""
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    hooked = isinstance(function, nn.Module) and (function._forward_hooks or function._forward_pre_hooks)
    return None if hooked else _ACTIVATIONS.get(type(function).__name__)
