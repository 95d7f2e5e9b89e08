"""What will run and what it holds: `explain` for calls, `report` for models."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftkern import backends
from peftkern._modules import outer_modules
from peftkern._native import ops
from peftkern.engines.torch import decode
from peftkern.integrations.peft import explain_layer, explain_part
from peftkern.nn._adapted_linear import AdaptedLinear
from peftkern.nn._adapters import AdapterModule
from peftkern.nn._fused_block import FusedBlock
from peftkern.nn._merge import weight_dtype
from peftkern.nn.lora_linear import LoRALinear
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.ops._linear import autocast

NAMES_SHOWN = 5


class Explanation(NamedTuple):
    """Which implementation runs an op.

    Attributes:
        name: the module's path, or the function's name.
        op: a peftkern op, or "linear" for torch's.
        implementation: "reference", "cpu", ...; "torch" for torch's own op; "none" if what was asked for cannot run.
        reason: why.
    """

    name: str
    op: str
    implementation: str
    reason: str


def explain(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Which implementation would run, and why. Nothing is computed and no random number drawn.

    Args:
        target: a model: one record per NF4Linear and module with adapters in it, HF PEFT's
            accelerated attentions and losses included. Or a public
            function of peftkern: one record.
        args, kwargs: of the call. For a model they may be left out: each layer's own dtype and device are taken. A
            model's first tensor gives the device, and the dtype if it is floating point; `adapter_names` counts for
            HF PEFT's layers.

    Raises:
        TypeError: `target` is neither.
        TypeError, ValueError, RuntimeError: what the function itself raises for these arguments before it chooses.
    """
    if isinstance(target, nn.Module):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = next(tensors, None)
        return _explain_model(target, x, kwargs.get("adapter_names"))
    name = getattr(target, "__name__", type(target).__name__)
    if not callable(target) or not getattr(target, "__module__", "").startswith("peftkern.ops."):
        raise TypeError(f"explain: target must be an nn.Module or a function of peftkern, got {name}")
    with torch.random.fork_rng(devices=[]):
        chosen = backends.choice_of(target, *args, **kwargs)
    if chosen is None:
        return [Explanation(name, name, "reference", "the only implementation")]
    op, choice = chosen
    return [Explanation(name, op, choice.implementation, choice.reason)]


def _explain_model(model: nn.Module, x: Tensor | None, adapter_names: Sequence[str] | None = None) -> list[Explanation]:
    blocks = (module for module in model.modules() if isinstance(module, FusedBlock))
    fused = {layer: block.op for block in blocks for layer in block.fused_layers()}
    records = []
    within = None
    for path, module in outer_modules(model):
        if within is not None and path.startswith(within):
            continue  # computed by the op of the PEFT layer around it
        peft_layer = explain_layer(module, x, adapter_names)
        if peft_layer is not None:
            record = Explanation(path, *peft_layer)
            records.append(record._replace(op=fused.get(module, record.op)))
            within = path + "." * bool(path) if records[-1].implementation != "torch" else None
        elif isinstance(module, AdapterModule | NF4Linear):
            records.append(_explain_layer(path, module, x, fused.get(module)))
        elif part := explain_part(module):
            records.append(Explanation(path, *part))
    return records


def _explain_layer(path: str, layer: AdapterModule | NF4Linear, x: Tensor | None, fused: str | None) -> Explanation:
    """`fused` is the op that runs it together with others, if there is one."""
    state = _state(layer)
    if isinstance(layer, AdapterModule) and not isinstance(layer, AdaptedLinear):
        return _explain_module(path, layer, x, state)
    plain = layer.effective_layer if isinstance(layer, AdaptedLinear) else layer
    if fused is None and plain is not None and not isinstance(plain, NF4Linear):
        return Explanation(path, "linear", "torch", f"{state}: a dense layer alone")
    op = fused or (cast(AdaptedLinear, layer).op if plain is None else "nf4_linear")
    base = cast(AdaptedLinear, layer).base_layer if plain is None else plain
    call: tuple[Any, ...] = ()
    if op == "lora_linear" and isinstance(layer, LoRALinear):
        dropout = layer.settings[cast(str, layer.active_adapter)].dropout
        call = layer.base_weight, dropout if layer.training else 0.0
    probe = _probe(base, x)
    found = _chosen(path, op, probe, state, *call)
    if found.implementation == "torch" and isinstance(base, NF4Linear):
        return found._replace(reason=f"{found.reason}; {decode.explained(probe.device)}")
    return found


def _explain_module(path: str, module: AdapterModule, x: Tensor | None, state: str) -> Explanation:
    """Of a module that is no linear layer; its first parameter stands for x where there is none."""
    if state:
        return Explanation(path, module.op, "none", f"{state}: the base alone")
    first = next((p for p in (*module.parameters(), *module.stored_tensors()) if p.is_floating_point()), None)
    probe = x if x is not None and x.is_floating_point() else first
    return _chosen(path, module.op, torch.empty(0, device="cpu") if probe is None else probe.new_empty(0), state)


def _chosen(path: str, op: str, probe: Tensor, state: str, *call: Any) -> Explanation:
    """What would run `op` on an input like `probe`; `call` as in `backends.choose`."""
    if not hasattr(ops, op):
        return Explanation(path, op, "torch", f"{state}; plain torch" if state else "plain torch")
    probe, _ = autocast(probe, None)
    try:
        implementation, reason, _ = backends.choose(op, probe, None, *call)
    except RuntimeError as error:
        implementation, reason = "none", str(error)
    return Explanation(path, op, implementation, f"{state}; {reason}" if state else reason)


def _probe(base: nn.Linear, x: Tensor | None) -> Tensor:
    """An input like the one that the op on this base will get, of one row."""
    dtype = weight_dtype(base)
    if x is not None and x.is_floating_point():
        dtype = x.dtype
    if isinstance(base, NF4Linear) and base.compute_dtype is not None:
        dtype = base.compute_dtype
    return torch.empty(1, base.in_features, dtype=dtype, device=base.weight.device if x is None else x.device)


def _state(layer: AdapterModule | NF4Linear) -> str:
    """Why a module with adapters does not run one; empty if it does."""
    if isinstance(layer, NF4Linear):
        return ""
    if not layer.enabled:
        return "adapters disabled"
    if layer.active_adapter is None and getattr(layer, "batch", None) is None:
        return "no active adapter"
    return "merged" if getattr(layer, "merged", False) else ""


@dataclass(frozen=True)
class Row:
    """One module that holds tensors.

    Attributes:
        name: its path.
        method: "NF4", "trained", "frozen", or of a module with adapters its method, "QLoRA r=8".
        implementation: what will run it, see `Explanation`.
        trainable_parameters, parameters: elements; of an NF4 weight those of the dense one.
        bytes: of parameters and buffers. A tensor that modules share counts in the first.
    """

    name: str
    method: str
    implementation: str
    trainable_parameters: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `report` found; `print` shows it as a table in which layers of the same kind are one line.

    Attributes:
        rows: one per module that holds tensors; what is inside a module with adapters counts there.
        no_gradient: trainable tensors whose grad is None although others have one. Empty before a backward.
        zero_gradient: trainable tensors whose grad is all zeros. In the first step of a new adapter every lora_A is.
    """

    rows: list[Row]
    no_gradient: list[str]
    zero_gradient: list[str]

    @property
    def trainable_parameters(self) -> int:
        return sum(row.trainable_parameters for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name) or "(model)"
            groups.setdefault((pattern, row.method, row.implementation), []).append(row)
        lines = [_cells(*key, rows) for key, rows in groups.items()]
        header = ("module", "count", "method", "runs on", "trainable", "parameters", "MiB")
        table = _table([header, *lines, _cells("total", "", "", self.rows)])
        share = self.trainable_parameters / max(1, self.parameters)
        notes = [f"{share:.2%} of the parameters are trainable"]
        missed = {"no gradient": self.no_gradient, "zero gradient": self.zero_gradient}
        notes += [f"{what}: {_shortened(names)}" for what, names in missed.items() if names]
        return "\n".join([table, *notes])


def report(model: nn.Module) -> Report:
    """What each module of a model is, runs on and holds; after a backward also which trainable tensors it missed.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {type(model).__name__}")
    implementations = {record.name: record.implementation for record in explain(model)}
    seen: set[int] = set()
    rows = [_row(path, module, _implementation(path, implementations), seen) for path, module in outer_modules(model)]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    after_backward = any(p.grad is not None for p in trainable.values())
    return Report(
        [row for row in rows if row.bytes],
        [name for name, p in trainable.items() if after_backward and p.grad is None],
        [name for name, p in trainable.items() if p.grad is not None and not p.grad.any()],
    )


def _implementation(path: str, implementations: dict[str, str]) -> str:
    """Of the module itself, or of the PEFT layer around it."""
    while path and path not in implementations:
        path = path.rpartition(".")[0]
    return implementations.get(path, "torch")


def _row(path: str, module: nn.Module, implementation: str, seen: set[int]) -> Row:
    """The row of a module, without the tensors in `seen`, to which its own are added."""
    owners = list(module.modules()) if isinstance(module, AdapterModule) else [module]
    tensors = [
        (owner, t) for owner in owners for t in (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
    ]
    new = {id(t): (owner, t) for owner, t in tensors if id(t) not in seen}
    seen.update(new)
    parameters = [(t, _elements(owner, t)) for owner, t in new.values() if isinstance(t, nn.Parameter)]
    trainable = sum(elements for t, elements in parameters if t.requires_grad)
    size = sum(t.nbytes for _, t in new.values())
    if isinstance(module, AdapterModule):
        stored = {id(t): t for t in module.stored_tensors() if id(t) not in seen}
        seen.update(stored)
        size += sum(t.nbytes for t in stored.values())
    total = sum(elements for _, elements in parameters)
    return Row(path, _method(module, trainable), implementation, trainable, total, size)


def _elements(owner: nn.Module, parameter: nn.Parameter) -> int:
    if isinstance(owner, NF4Linear) and parameter is owner.weight:
        return owner.in_features * owner.out_features
    return parameter.numel()


def _method(module: nn.Module, trainable: int) -> str:
    if isinstance(module, NF4Linear):
        return "NF4"
    if not isinstance(module, AdapterModule):
        return "trained" if trainable else "frozen"
    state = _state(module)
    return module.method_name + (f", {state}" if state else "")


def _cells(name: str, method: str, implementation: str, rows: list[Row]) -> tuple[str, ...]:
    trainable, parameters = (sum(getattr(row, f) for row in rows) for f in ("trainable_parameters", "parameters"))
    size = sum(row.bytes for row in rows)
    return name, f"{len(rows)}", method, implementation, f"{trainable:,}", f"{parameters:,}", f"{size / 2**20:,.1f}"


def _table(lines: list[tuple[str, ...]]) -> str:
    """Columns aligned, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = (False, True, False, False, True, True, True)
    padded = (
        "  ".join(cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(line, widths, right))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
