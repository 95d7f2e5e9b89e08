"""HF PEFT's layers on the fused ops: `accelerate` a model that has them, and `restore` it.

Layers keep their parameters, names and state; only their class becomes a subclass whose forward is one op where the op
computes what PEFT would, and PEFT's own forward everywhere else. PEFT is not imported before a model has its layers.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from peftkern import backends
from peftkern.blocks import exchange_blocks
from peftkern.nn._adapters import AdapterModule
from peftkern.nn._fused_block import FusedBlock
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.ops._linear import autocast

TESTED_VERSIONS = ((0, 19), (0, 22))
"""PEFT's releases from the first on, up to and without the last."""
_REPACKS = "_peftkern_repacks"
# What else of a model changes: each has use, restore, is_ours and explain.
_PARTS = ("peftkern.integrations._attention", "peftkern.integrations._loss")

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


class Calls(NamedTuple):
    """How often an accelerated layer's forward ran, calls inside a compiled graph not counted.

    Attributes:
        fast: as one op.
        stock: as PEFT's own, by the reason.
    """

    fast: int
    stock: Mapping[str, int]


def accelerate(model: Model, fuse_blocks: bool = False) -> Model:
    """Runs the LoRA, DoRA and (IA)^3 layers of HF PEFT in a model on `lora_linear`, `dora_linear` and `ia3_linear`.

    In place, for models of get_peft_model, PeftModel.from_pretrained, transformers' add_adapter and PeftMixedModel.
    The classes of `lora.Linear`, `lora.Linear4bit`, `ia3.Linear` and `ia3.Linear4bit` become subclasses of theirs with
    another forward; it is PEFT's own whenever the op does not apply, see `explain`. No parameter is renamed, copied or
    moved: optimizers, state dicts, merging and saving work as before. Layers that come later need another call.

    Modules of transformers that look their attention up run torch's ("sdpa") on `prefix_attention` without a prefix,
    and transformers' loss of causal language models on `cross_entropy`, where they are faster. The model's config stays
    as it is. A model with peftkern's own adapters gains these two as well.

    Also mended: `merge` on 4-bit layers scales `lora_bias`, (IA)^3 on 4-bit layers returns x's dtype, and bitsandbytes'
    eval path no longer repacks the 4-bit weights of these layers in place.

    Args:
        model: any module.
        fuse_blocks: also run q, k and v, and gate, up and down, of the blocks that `peftkern.fuse_blocks` knows in one
            op each, where all of them are such layers of LoRA. It saves memory, not time.

    Returns:
        The same model. Without adapters, or with a PEFT outside TESTED_VERSIONS, nothing changes but a warning.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_module("accelerate", model)
    layers = [module for _, module in _peft_layers(model)]
    ours = any(isinstance(module, AdapterModule) for module in model.modules())
    if not layers and not ours:
        warnings.warn("accelerate: the model has no layers of PEFT; nothing to accelerate", stacklevel=2)
    elif not layers or _is_supported("accelerate"):
        for layer in layers:
            _accelerate_layer(layer)
        for part in _PARTS if "transformers" in sys.modules else ():
            import_module(part).use(model)
        if fuse_blocks and not exchange_blocks(model):
            warnings.warn("accelerate: the model has no block to fuse; see peftkern.fuse_blocks", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every layer and block has its own class again. Other models stay as they are.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_module("restore", model)
    layers = [layer for _, layer in _accelerated_layers(model)]
    for block in [module for module in model.modules() if isinstance(module, FusedBlock)]:
        if any(getattr(block, name, None) in layers for name in block.projections):
            block.undo()
    for layer in layers:
        _restore_layer(layer)
    for part in _imported_parts():
        part.restore(model)
    return model


@contextmanager
def accelerated() -> Iterator[None]:
    """LoRA and (IA)^3 layers that PEFT creates within the context are accelerated, whoever asks it to.

    For PeftModel.from_pretrained, load_adapter and whatever creates the model out of sight. PEFT's own factories are
    replaced for the time being, in all threads.
    """
    if not _is_supported("accelerated"):
        yield
        return
    from peft.tuners.ia3 import IA3Model
    from peft.tuners.lora import LoraModel

    tuners: tuple[Any, ...] = (LoraModel, IA3Model)
    factories = [tuner._create_new_module for tuner in tuners]
    for tuner, factory in zip(tuners, factories):
        tuner._create_new_module = staticmethod(_accelerating(factory))
    try:
        yield
    finally:
        for tuner, factory in zip(tuners, factories):
            tuner._create_new_module = staticmethod(factory)


def register(config: Config) -> Config:
    """Has PEFT create accelerated layers for a LoraConfig, by PEFT's hook for custom modules.

    The hook knows LoRA alone, is not saved with the config, and has to be registered on every config object. Layers
    that it does not know PEFT creates as always.

    Args:
        config: a peft.LoraConfig; its other custom modules stay, but come first.

    Returns:
        The same config.

    Raises:
        TypeError: `config` is not a LoraConfig.
    """
    if "peft" not in sys.modules or not isinstance(config, sys.modules["peft"].LoraConfig):
        raise TypeError(f"register: config must be a peft.LoraConfig, got {type(config).__name__}")
    if _is_supported("register"):
        # nn.Linear stands for its subclasses too, NF4Linear and bitsandbytes' among them.
        config._register_custom_module({nn.Linear: _create_lora_layer})  # type: ignore[attr-defined]
    return config


def calls(model: nn.Module) -> dict[str, Calls]:
    """Path -> how often each accelerated layer of a model ran, and how, since it was accelerated."""
    return {path: _calls_of(layer) for path, layer in _accelerated_layers(model)}


def explain_part(module: nn.Module) -> tuple[str, str, str] | None:
    """What runs the attention or loss of a module, where `accelerate` has changed it: (op, implementation, reason)."""
    return next((part.explain(module) for part in _imported_parts() if part.is_ours(module)), None)


def explain_layer(
    layer: nn.Module, x: Tensor | None = None, adapter_names: Sequence[str] | None = None
) -> tuple[str, str, str] | None:
    """What would run a layer of PEFT: (op, implementation, reason); None if it is none of PEFT's.

    Args:
        layer: any module.
        x: an input; by default one of the base weight's dtype and device stands for it.
        adapter_names: of the samples of a mixed batch.
    """
    if not _is_peft_layer(layer):
        return None
    if not _is_accelerated(layer):
        kind = type(layer)
        known = kind in _fast_classes() if _is_supported(None) else False
        reason = "peftkern.accelerate(model) has not been called" if known else f"no op for {kind.__module__} layers"
        return "linear", "torch", f"PEFT's own forward: {reason}"
    from peftkern.integrations._peft_base import least_rows, probe_of

    accelerated: Any = layer
    call = {} if adapter_names is None else {"adapter_names": adapter_names}
    op, probe = accelerated._op(**call), probe_of(accelerated, x)
    probe = probe if adapter_names is None else probe.expand(len(adapter_names), 0, -1)
    fast, stock = _calls_of(layer)
    ran = f"; ran {fast} times, PEFT's own {sum(stock.values())} times"
    try:
        obstacle = accelerated._obstacle(probe, (), call)
        implementation, reason, _ = backends.choose(op, autocast(probe, None)[0])
    except RuntimeError as error:
        return op, "none", str(error)
    if obstacle:
        return op, "torch", f"PEFT's own forward: {obstacle}{ran}"
    rows = least_rows(accelerated, probe)
    small = f"; PEFT's own below {rows} rows of x, where torch is faster" if rows > 1 else ""
    return op, implementation, reason + small + ran


def _imported_parts() -> list[Any]:
    return [sys.modules[name] for name in _PARTS if name in sys.modules]


def _calls_of(layer: nn.Module) -> Calls:
    counts = dict(layer.__dict__.get("_peftkern_calls", {}))
    return Calls(counts.pop("fast", 0), counts)


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")


def _is_supported(function: str | None) -> bool:
    """Whether PEFT's release is one of those tested; if not, says so in the name of `function`."""
    release = version("peft")
    parts = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    first, last = TESTED_VERSIONS
    if first <= parts < last:
        return True
    if function is not None:
        wanted = f">={'.'.join(map(str, first))}, <{'.'.join(map(str, last))}"
        warnings.warn(f"{function}: PEFT must be {wanted}, got {release}; its own forward stays", stacklevel=3)
    return False


def _is_peft_layer(module: nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _is_accelerated(module: nn.Module) -> bool:
    base = sys.modules.get("peftkern.integrations._peft_base")
    return base is not None and isinstance(module, base.Accelerated)


def _peft_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if _is_peft_layer(module)]


def _accelerated_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if _is_accelerated(module)]


def _fast_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """PEFT's class -> ours."""
    from peftkern.integrations import _peft_ia3, _peft_lora

    return {**_peft_lora.ACCELERATED, **_peft_ia3.ACCELERATED}


def _accelerate_layer(layer: Any) -> None:
    """Only of exactly one of PEFT's classes, or of ours that merge: a subclass may compute something else."""
    from peftkern.integrations._peft_base import keep_bytes
    from peftkern.integrations.peft_merge import MERGING

    stock = {merging: stock for stock, merging in MERGING.items()}.get(type(layer), type(layer))
    fast_class = _fast_classes().get(stock)
    if fast_class is not None:
        layer.__class__ = fast_class
        layer.__dict__[_REPACKS] = keep_bytes(layer.base_layer)


def _restore_layer(layer: Any) -> None:
    from peftkern.integrations._calls import forget_calls
    from peftkern.integrations._peft_base import let_repack

    let_repack(layer.base_layer, layer.__dict__.pop(_REPACKS, None))
    forget_calls(layer)
    layer.__class__ = next(stock for stock, fast in _fast_classes().items() if fast is type(layer))


def _accelerating(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> Any:
        layer = factory(*args, **kwargs)
        _accelerate_layer(layer)
        return layer

    return create


def _create_lora_layer(target: Any, adapter_name: str, *, config: Any, **kwargs: Any) -> Any:
    """What PEFT would create for a layer that has a fast path, accelerated; None leaves the others to PEFT."""
    from peft.tuners.lora.layer import dispatch_default

    from peftkern.integrations._peft_base import BNB_LINEARS

    base = target.get_base_layer() if _is_peft_layer(target) else target
    if kwargs.get("parameter_name") is not None:
        return None
    layer = None
    if type(base) in BNB_LINEARS:
        from peft.tuners.lora.bnb import dispatch_bnb_4bit

        layer = dispatch_bnb_4bit(target, adapter_name, config=config, **kwargs)
    if layer is None and (type(base) in BNB_LINEARS or _is_plain(base)):
        layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if layer is not None:
        _accelerate_layer(layer)
    return layer


def _is_plain(base: nn.Module) -> bool:
    """A weight of torch's own tensor type: torchao and others put theirs into an nn.Linear."""
    return type(base) in (nn.Linear, NF4Linear) and type(base.weight) is nn.Parameter
