"""LoRAAttention: an attention block whose q, k and v run as one op, over `ops.lora_qkv`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from peftkern.nn._fused_block import FusedBlock, exchanged, fusable, ran_fused
from peftkern.ops.lora_qkv import lora_qkv


class LoRAAttention(FusedBlock):
    """An attention block, with its own forward, whose projections of the same x run in one `lora_qkv`.

    Made from a block by `from_block`, in place: the block keeps its submodules, names, hooks and everything else, and
    masks, caches, position embeddings and attention implementations are its own. Where a projection has hooks, a
    method other than LoRA, or a dropout of its own, the block's forward calls each projection, as without us.
    """

    op = "lora_qkv"

    @classmethod
    def from_block(cls, block: nn.Module, projections: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> LoRAAttention:
        """Changes a block whose forward calls these submodules, each once, on the same tensor.

        Args:
            block: such as transformers' LlamaAttention; it is changed in place.
            projections: the submodules' names.

        Returns:
            The same block.

        Raises:
            TypeError: a projection that is not a module, or a block that has been changed already.
        """
        return exchanged(cls, block, projections)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block_class.forward(_Sharing(self), *args, **kwargs)  # type: ignore[arg-type]


class _Sharing:
    """A block as its forward sees it during one call: the first projection of x computes those of all."""

    def __init__(self, block: LoRAAttention) -> None:
        self.block = block
        self.x: Tensor | None = None
        self.ys: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        block = self.block
        if name in block.projections:
            return partial(self.project, name)
        return getattr(block, name)

    def project(self, name: str, x: Tensor) -> Tensor:
        if self.x is None:
            self.x, self.ys = x, _shared(self.block, x)
        if x is self.x and name in self.ys:
            return self.ys.pop(name)
        layer: Callable[[Tensor], Tensor] = getattr(self.block, name)
        return layer(x)


def _shared(block: LoRAAttention, x: Tensor) -> dict[str, Tensor]:
    """What each projection makes of x; nothing if they cannot run together."""
    layers = [getattr(block, name) for name in block.projections]
    fused = fusable(layers, x)
    if fused is None:
        return {}
    ran_fused(layers)
    weights, lora_as, lora_bs, scalings, biases = zip(*fused.projections)
    ys = lora_qkv(x, weights, lora_as, lora_bs, scalings, biases, fused.dropout_p, training=True)
    return dict(zip(block.projections, ys))
