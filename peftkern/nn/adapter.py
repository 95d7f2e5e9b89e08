"""AdaptedSublayer: a sublayer's output through named bottleneck adapters (arXiv 1902.00751), and trained norms."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkern.nn._adapters import AdapterModule, check_name
from peftkern.nn.nf4_linear import _CALL_HOOKS
from peftkern.ops._linear import FLOATING, number
from peftkern.ops.bottleneck_adapter import bottleneck_adapter, check_activation

INITS = ("houlsby", "bert", "mam_adapter")
LEARNED = "learned"
# Of AdapterHub's "bert".
BERT_STD = 0.02


@dataclass(frozen=True)
class BottleneckSettings:
    """One adapter's hyper-parameters; the defaults are the paper's code's.

    Attributes:
        bottleneck: m, rows of the down-projection, positive.
        activation: see `bottleneck_adapter`.
        scaling: a number, or "learned": a trained one that starts at 1.
        parallel: take the sublayer's input instead of its output (arXiv 2110.04366); the output is the residual.
        init: weights from a normal distribution, "houlsby": cut off at two standard deviations, or "bert": of standard
            deviation 0.02; "mam_adapter" (arXiv 2110.04366): D as nn.Linear's, U zero. Biases start at zero.
        init_scale: the standard deviation of "houlsby". At the default, a new adapter changes its input of unit
            variance by less than this.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    bottleneck: int = 64
    activation: str = "gelu"
    scaling: float | str = 1.0
    parallel: bool = False
    init: str = "houlsby"
    init_scale: float = 1e-3

    def __post_init__(self) -> None:
        if type(self.bottleneck) is not int:
            raise TypeError(f"BottleneckAdapter: bottleneck must be an int, got {self.bottleneck!r}")
        if self.bottleneck < 1:
            raise ValueError(f"BottleneckAdapter: bottleneck must be positive, got {self.bottleneck}")
        check_activation("BottleneckAdapter", self.activation)
        for name in ("scaling", "init_scale"):
            object.__setattr__(self, name, number(getattr(self, name)))
        if self.scaling != LEARNED:
            _check_number("scaling", self.scaling, f"a number or {LEARNED!r}")
        _check_number("init_scale", self.init_scale, "a number")
        if self.init_scale <= 0:
            raise ValueError(f"BottleneckAdapter: init_scale must be positive, got {self.init_scale}")
        if type(self.parallel) is not bool:
            raise TypeError(f"BottleneckAdapter: parallel must be a bool, got {self.parallel!r}")
        if self.init not in INITS:
            raise ValueError(f"BottleneckAdapter: init must be one of {', '.join(INITS)}, got {self.init!r}")


def _check_number(name: str, value: Any, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"BottleneckAdapter: {name} must be {wanted}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"BottleneckAdapter: {name} must be finite, got {value}")


class BottleneckAdapter(nn.Module):
    """`residual + scaling * (f(x D^T + b_D) U^T + b_U)` with trained D, U and biases, over `ops.bottleneck_adapter`.

    State-dict names are AdapterHub's: `adapter_down.0.weight` [m, features], `adapter_up.weight` [features, m], their
    biases, and `scaling` [1] where it is learned.

    Args:
        features: of x.
        settings: the hyper-parameters.
        dtype: of the parameters, fp32 or what x will have.
        device: of the parameters.

    Raises:
        TypeError: a dtype that cannot be.

    Shape:
        x [..., features] -> [..., features], in x's dtype.
    """

    def __init__(
        self,
        features: int,
        settings: BottleneckSettings | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_dtype(type(self).__name__, dtype)
        self.features = features
        self.settings = settings or BottleneckSettings()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        size = self.settings.bottleneck
        # Not nn.Linear: what replaces or re-initialises every nn.Linear of a model must pass these by.
        down = nn.ParameterDict({"weight": empty(size, features), "bias": empty(size)})
        self.adapter_down = nn.ModuleDict({"0": down})
        self.adapter_up = nn.ParameterDict({"weight": empty(features, size), "bias": empty(features)})
        if self.settings.scaling == LEARNED:
            self.scaling = empty(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        settings = self.settings
        down = self._down
        for part in (down, self.adapter_up):
            if settings.init == "bert":
                nn.init.normal_(part["weight"], std=BERT_STD)
            elif settings.init == "houlsby":
                std = settings.init_scale
                nn.init.trunc_normal_(part["weight"], std=std, a=-2 * std, b=2 * std)
            elif part is down:
                nn.init.kaiming_uniform_(part["weight"], a=math.sqrt(5))
            else:
                nn.init.zeros_(part["weight"])
            nn.init.zeros_(part["bias"])
        if settings.scaling == LEARNED:
            nn.init.ones_(self.scaling)

    @property
    def _down(self) -> nn.ParameterDict:
        return cast(nn.ParameterDict, self.adapter_down["0"])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        down, up, settings = self._down, self.adapter_up, self.settings
        scaling = self.scaling[0] if settings.scaling == LEARNED else cast(float, settings.scaling)
        return bottleneck_adapter(
            x, down["weight"], down["bias"], up["weight"], up["bias"], settings.activation, scaling, residual
        )

    def extra_repr(self) -> str:
        s = self.settings
        kind = ", parallel" if s.parallel else ""
        return f"features={self.features}, bottleneck={s.bottleneck}, {s.activation}, scaling={s.scaling}{kind}"


def check_dtype(op: str, dtype: Any) -> None:
    """Raises TypeError unless parameters can have this dtype."""
    if dtype not in FLOATING:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")


class AdaptedSublayer(AdapterModule):
    """A sublayer's last module with named bottleneck adapters on its output (arXiv 1902.00751, figure 2).

    Put it around what the sublayer ends in, before the residual is added: an output projection of any kind, an
    NF4Linear among them, or the dropout behind it. One adapter is active, and trainable, at a time; without one, or
    with adapters disabled, the module computes what the base does, bit for bit. It cannot be merged: the adapter is not
    linear.

    A parallel adapter takes the sublayer's input, which `take_input_of` records.

    State-dict names: `base_layer.*` and `adapters.<name>.*`, see `BottleneckAdapter`.

    Args:
        base: a module that returns one tensor [..., features]; it becomes `base_layer` and loses its gradients.
        features: of the base's output.
        settings: of the first adapter.
        adapter_name: of the first adapter, which is active.
        dtype: of the first adapter's parameters, fp32 or what the base returns.
        device: of the first adapter's parameters.

    Attributes:
        settings: adapter name -> BottleneckSettings.

    Raises:
        TypeError, ValueError: a base, setting, name or dtype that cannot be.
    """

    def __init__(
        self,
        base: nn.Module,
        features: int,
        settings: BottleneckSettings | None = None,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(base, nn.Module):
            raise TypeError(f"{type(self).__name__}: base must be an nn.Module, got {type(base).__name__}")
        super().__init__()
        self.features = features
        self.base_layer = base
        self.adapters = nn.ModuleDict()
        self._source: RemovableHandle | None = None
        self._argument = 0
        self._input: Tensor | None = None
        self.add_adapter(adapter_name, settings, dtype, device)
        self.set_adapter(adapter_name)
        base.requires_grad_(False)
        self.training = base.training

    def add_adapter(
        self,
        adapter_name: str,
        settings: BottleneckSettings | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Adds an adapter, frozen until `set_adapter` makes it the active one.

        Raises:
            TypeError, ValueError: a name or dtype that cannot be, or a name that is taken.
        """
        check_name(type(self).__name__, adapter_name)
        self._check_new(adapter_name)
        adapter = BottleneckAdapter(self.features, settings, dtype, device)
        self.adapters[adapter_name] = adapter.requires_grad_(False).train(self.training)
        self.settings[adapter_name] = adapter.settings

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """Weights, biases and a learned scaling."""
        self._check_exists("adapter_parameters", adapter_name)
        return tuple(self.adapters[adapter_name].parameters())

    def take_input_of(self, module: nn.Module, argument: int = 0) -> None:
        """Gives parallel adapters what `module` is called with, which runs before this one at every forward.

        Args:
            module: such as the norm before the sublayer, whose input is the residual stream.
            argument: which of its positional arguments.
        """
        self._forget_source()
        self._argument = argument
        self._source = module.register_forward_pre_hook(self._record)

    def _forget_source(self) -> None:
        if self._source is not None:
            self._source.remove()
        self._source = None

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._running is not None and self._running.settings.parallel:
            self._input = args[self._argument]

    @property
    def _running(self) -> BottleneckAdapter | None:
        """The adapter that forward uses."""
        if not self._enabled or self._active is None:
            return None
        return cast(BottleneckAdapter, self.adapters[self._active])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_layer(*args, **kwargs)
        adapter = self._running
        if adapter is None:
            return output
        if not adapter.settings.parallel:
            return adapter(output)
        source, self._input = self._input, None
        if source is None:
            raise RuntimeError("AdaptedSublayer: a parallel adapter needs the sublayer's input; see take_input_of")
        return adapter(source, output)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, and with the last one the record of the sublayer's input."""
        super().delete_adapter(adapter_name)
        if not self.settings:
            self._forget_source()

    def _tables(self) -> tuple[Any, ...]:
        return (self.adapters, self.settings)

    def extra_repr(self) -> str:
        return f"features={self.features}, active={self._active}" + ("" if self._enabled else ", disabled")


class AdaptedNorm(AdapterModule):
    """A normalisation with a trained copy for each adapter, as the paper trains them beside its adapters.

    Args:
        base: a module with parameters of its own and none inside; it becomes `base_layer` and loses its gradients.
        adapter_name: of the first copy, which is active.

    Attributes:
        settings: adapter name -> None.

    Raises:
        TypeError, ValueError: a base or name that cannot be.
    """

    def __init__(self, base: nn.Module, adapter_name: str = "default") -> None:
        if not isinstance(base, nn.Module) or not base._parameters or base._modules:
            raise TypeError(f"AdaptedNorm: base must be a module of parameters alone, got {type(base).__name__}")
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict()
        self.add_adapter(adapter_name)
        self.set_adapter(adapter_name)
        base.requires_grad_(False)
        self.training = base.training
        # The base is called by its forward alone.
        for name in _CALL_HOOKS:
            setattr(self, name, getattr(base, name))

    def add_adapter(self, adapter_name: str) -> None:
        """Adds a copy of the base, frozen until `set_adapter` makes it the active one.

        Raises:
            ValueError: a name that cannot be or is taken.
        """
        check_name(type(self).__name__, adapter_name)
        self._check_new(adapter_name)
        twin = copy.copy(self.base_layer)
        parameters = {
            name: None if own is None else nn.Parameter(own.detach().clone(), requires_grad=False)
            for name, own in self.base_layer._parameters.items()
        }
        # Hooks are the wrapper's.
        hooks: dict[str, Any] = {
            name: OrderedDict() if isinstance(getattr(twin, name), dict) else None for name in _CALL_HOOKS
        }
        twin.__dict__.update(hooks, _parameters=parameters)
        self.adapters[adapter_name] = twin
        self.settings[adapter_name] = None

    def adapter_parameters(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """Those of the copy."""
        self._check_exists("adapter_parameters", adapter_name)
        return tuple(self.adapters[adapter_name].parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = self._enabled and self._active is not None
        module = self.adapters[cast(str, self._active)] if running else self.base_layer
        return module.forward(*args, **kwargs)

    def _tables(self) -> tuple[Any, ...]:
        return (self.adapters, self.settings)
