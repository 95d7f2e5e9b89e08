"""TrainedHead: a model's output layer with a trained copy for each adapter."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from peftkern.nn._adapters import AdapterModule


class TrainedHead(AdapterModule):
    """Named copies of a frozen module, such as the classifier that P-tuning v2 trains beside its prefix.

    The active adapter's copy computes; without one, or with adapters disabled, the base layer, bit for bit.

    Args:
        base: the module; it becomes `base_layer` and loses its gradients.
        adapter_name: of the first copy, which is active.
    """

    def __init__(self, base: nn.Module, adapter_name: str = "default") -> None:
        super().__init__()
        self.base_layer = base
        self.training = base.training
        self.copies = nn.ModuleDict()
        self.add_adapter(adapter_name)
        self.set_adapter(adapter_name)
        base.requires_grad_(False)

    @property
    def op(self) -> str:
        return "linear"

    @property
    def method_name(self) -> str:
        return "head"

    def add_adapter(self, adapter_name: str) -> None:
        """Adds a copy of the base layer, frozen until `set_adapter` makes it the active one.

        Raises:
            ValueError: a name that cannot be or is taken.
        """
        self._check_new(adapter_name)
        self.copies[adapter_name] = copy.deepcopy(self.base_layer).requires_grad_(False)
        self.settings[adapter_name] = None

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """Those of the copy."""
        return tuple(self.own(adapter_name).parameters())

    def own(self, adapter_name: str) -> nn.Module:
        """An adapter's copy."""
        self._check_exists("own", adapter_name)
        return self.copies[adapter_name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = self._active if self._enabled else None
        return (self.base_layer if active is None else self.copies[active])(*args, **kwargs)

    def _tables(self) -> tuple[Any, ...]:
        return (self.copies, self.settings)
