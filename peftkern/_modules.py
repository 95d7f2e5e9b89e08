"""Walking and changing the module tree of a whole model."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from peftkern.nn._adapters import AdapterModule

HEAD_NAME = "lm_head"


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without those inside an AdapterModule that wraps another module."""
    inside = None
    for path, module in model.named_modules():
        if inside is None or not path.startswith(inside):
            yield path, module
            wraps = isinstance(module, AdapterModule) and "base_layer" in module._modules
            inside = path + "." * bool(path) if wraps else None


def places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every path by which the model holds each module."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


def put(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Puts `module` at each path."""
    for path in paths:
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Path -> module; one that the model holds more than once by its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterModule)}


def adapter_names(model: nn.Module) -> list[str]:
    """Of all adapters of all methods."""
    return list(dict.fromkeys(name for module in adapter_modules(model).values() for name in module.settings))


def activate(model: nn.Module, adapter_name: str | None) -> None:
    """Makes an adapter active and trainable wherever it is, and in the other modules none."""
    for module in adapter_modules(model).values():
        module.set_adapter(adapter_name if adapter_name in module.settings else None)


def use_forward_of_linears(model: nn.Module) -> None:
    """Turns off the fused eval path of torch's transformer encoders: it reads the weights and skips forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Modules that give the logits: called lm_head, named by transformers, or tied to an embedding."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    return {
        module
        for path, module in model.named_modules()
        if module is output
        or path.rpartition(".")[2] == HEAD_NAME
        or (isinstance(module, nn.Linear) and id(module.weight) in embedded)
    }


def check_model(op: str, model: Any) -> None:
    """`model` is a Module that no other adapter library has wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    for path, _ in outer_modules(model):
        if path.rpartition(".")[2] == "base_layer":
            raise ValueError(f'{op}: the model has adapters of another library, "{path}"')


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile and DistributedDataParallel were given: they put a name before every path."""
    inner = (
        model.module if isinstance(model, nn.parallel.DistributedDataParallel) else getattr(model, "_orig_mod", None)
    )
    return model if inner is None else unwrapped(inner)
