"""What every module with named adapters shares."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn


def check_name(op: str, name: Any) -> None:
    """Raises ValueError unless an adapter can have this name."""
    # hasattr: torch's containers refuse the names of their own methods.
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{op}: adapter_name must be a name without '.' that nn.ModuleDict takes, got {name!r}")


class AdapterModule(nn.Module):
    """Named adapters on one module. One is active, and trainable, at a time; all can be disabled without being lost.

    Subclasses keep what an adapter has in mappings by its name, list these in `_tables`, and give its parameters.

    Attributes:
        settings: adapter name -> its hyper-parameters.
    """

    settings: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.settings = {}
        self._active: str | None = None
        self._enabled = True

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def op(self) -> str:
        """The op that computes with an adapter; the module's file has its name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def method_name(self) -> str:
        """What `report` calls it, as "LoRA r=8"."""
        rank = getattr(self.settings.get(self._active or ""), "rank", None)
        return type(self).__name__.removesuffix("Linear") + ("" if rank is None else f" r={rank}")

    def stored_tensors(self) -> Iterable[Tensor]:
        """Those that it holds beside its parameters and buffers."""
        return ()

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """What an adapter trains."""
        raise NotImplementedError

    def set_adapter(self, adapter_name: str | None) -> None:
        """Makes one adapter active and trainable and freezes the others; None leaves the base alone.

        Raises:
            ValueError: no such adapter.
        """
        if adapter_name is not None:
            self._check_exists("set_adapter", adapter_name)
        self._active = adapter_name
        for name in self.settings:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(name == adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the active one, none is active afterwards.

        Raises:
            ValueError: no such adapter.
        """
        self._check_exists("delete_adapter", adapter_name)
        if adapter_name == self._active:
            self.set_adapter(None)
        for table in self._tables():
            del table[adapter_name]

    def enable_adapters(self) -> None:
        """Undoes `disable_adapters`."""
        self._enabled = True

    def disable_adapters(self) -> None:
        """Computes what the base alone does, bit for bit. Nothing is deleted or frozen."""
        self._enabled = False

    def _tables(self) -> tuple[MutableMapping[str, Any] | nn.ModuleDict | nn.ParameterDict, ...]:
        """Every mapping by adapter name, `settings` among them."""
        return (self.settings,)

    def _check_exists(self, method: str, adapter_name: str) -> None:
        if adapter_name not in self.settings:
            known = ", ".join(map(repr, self.settings)) or "none"
            raise ValueError(f"{type(self).__name__}.{method}: no adapter {adapter_name!r}; there is {known}")

    def _check_new(self, adapter_name: str) -> None:
        check_name(type(self).__name__, adapter_name)
        if adapter_name in self.settings:
            raise ValueError(f"{type(self).__name__}.add_adapter: adapter {adapter_name!r} exists already")
