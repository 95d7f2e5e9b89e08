"""What every fine-tuning method is: how it goes into a model, onto disk and back; and what the methods share."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from peftkern.nn._adapters import AdapterModule


class Method:
    """One way to fine-tune a model: adapters of one kind.

    Who calls a method (`peftkern.tune`, `save`, `load`) has checked that the model is one, unwrapped it from
    torch.compile and DistributedDataParallel, and checked the adapter's name, that no module has that name yet, and
    the names of the options.

    Attributes:
        name: as in `peftkern.tune(model, name)`.
        module: what it puts into a model.
        mergeable: whether `module` has `merge` and `unmerge`.
        overwrites: whether `load` copies into an adapter of that name and kind; without, the name must be new.
    """

    name: ClassVar[str]
    module: ClassVar[type[AdapterModule]]
    mergeable: ClassVar[bool] = False
    overwrites: ClassVar[bool] = False

    def install(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        """Adds an adapter, active and alone trainable (`model.requires_grad_(False)`, then `activate`).

        Subclasses have their options in the signature, by keyword and with defaults.

        Raises:
            TypeError, ValueError: an option that cannot be. Nothing has changed then.
        """
        raise NotImplementedError

    def save(self, model: nn.Module, directory: Path, adapter_name: str, base_model_name_or_path: str | None) -> None:
        """Writes one adapter, in PEFT's two files where PEFT has the method, whole or not at all.

        Raises:
            ValueError: the adapter has no values to save, or the format has no room for something of it.
            OSError, ImportError: the files cannot be written.
        """
        raise NotImplementedError

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` is of this method."""
        raise NotImplementedError

    def load(self, model: nn.Module, directory: Path, adapter_name: str) -> None:
        """Reads an adapter; it is active and alone trainable afterwards.

        Raises:
            FileNotFoundError, TypeError, ValueError, ImportError: the files are missing, corrupt, incomplete, not of
                this method or not of this model. Nothing has changed then.
        """
        raise NotImplementedError

    def modules(self, model: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterModule]:
        """Path -> this method's modules in a model, those that have the adapter if one is named."""
        return {
            path: module
            for path, module in model.named_modules()
            if type(module) is self.module and (adapter_name is None or adapter_name in module.settings)
        }

    def options(self) -> dict[str, Any]:
        """Option -> default, as `install` has them."""
        parameters = list(inspect.signature(self.install).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}

    def check_options(self, op: str, given: Collection[str]) -> None:
        """Raises TypeError unless `install` has all these options."""
        known = self.options()
        for option in given:
            if option not in known:
                raise TypeError(
                    f"{op}: {self.name} has no option {option!r}{did_you_mean(option, known)}; it has "
                    f"{', '.join(known) or 'none'}"
                )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """ " (did you mean 'rank'?)" where something known is near, else nothing."""
    near = difflib.get_close_matches(str(name), known, n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
