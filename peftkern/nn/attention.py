"""LoRAAttention: an attention block whose q, k and v run as one op, over `ops.lora_qkv`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
        running = _running_calls()
        running.append(_Call(self))
        try:
            return self.block_class.forward(self, *args, **kwargs)
        finally:
            running.pop()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name in self.__dict__.get("projections", ()):
            running = _running_calls()
            if running and running[-1].block is self:
                return _SharedProjection(running[-1], name, found)
        return found


_threads = threading.local()
_compiled: list[_Call] = []


def _running_calls() -> list[_Call]:
    """Of this thread, the innermost last. While a block's forward runs, its projections are shared ones."""
    if torch.compiler.is_compiling():  # one thread; torch.compile knows no other's
        return _compiled
    if not hasattr(_threads, "running"):
        _threads.running = []
    running: list[_Call] = _threads.running
    return running


class _Call:
    """One call of a block: the first projection of x computes those of all."""

    def __init__(self, block: LoRAAttention) -> None:
        self.block = block
        self.x: Tensor | None = None
        self.ys: dict[str, Tensor] = {}

    def project(self, name: str, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.x is None:
            self.x, self.ys = x, _shared(self.block, x)
        return self.ys.pop(name) if x is self.x and name in self.ys else layer(x)


class _SharedProjection:
    """A projection as the block's forward sees it: the layer, except that calling it shares the call."""

    def __init__(self, call: _Call, name: str, layer: Any) -> None:
        self._shared_call, self._shared_name, self._shared_layer = call, name, layer

    def __call__(self, x: Tensor) -> Tensor:
        return self._shared_call.project(self._shared_name, self._shared_layer, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared_layer, name)


def _shared(block: LoRAAttention, x: Tensor) -> dict[str, Tensor]:
    """What each projection makes of x; nothing if they cannot run together."""
    # Past __getattr__, which would give the shared ones.
    modules = block._modules
    layers: list[Any] = [modules[name] if name in modules else getattr(block, name) for name in block.projections]
    fused = fusable(layers, x)
    if fused is None:
        return {}
    ran_fused(layers)
    weights, lora_as, lora_bs, scalings, biases = zip(*fused.projections)
    ys = lora_qkv(x, weights, lora_as, lora_bs, scalings, biases, fused.dropout_p, training=True)
    return dict(zip(block.projections, ys))
