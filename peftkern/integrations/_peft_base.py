"""What the fast paths of PEFT's layers share: the base layer as an op takes it, and what keeps a call off the ops.

An obstacle is a reason to run PEFT's own forward, in words for `explain`; empty if there is none. Reading one never
changes anything, and torch.compile traces it without a graph break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from peft.import_utils import is_bnb_4bit_available
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from peftkern import backends
from peftkern.integrations import _peft_small
from peftkern.integrations._calls import FAST, PLAIN, calls_of, transform_obstacle
from peftkern.integrations._peft_small import TOO_SMALL
from peftkern.nf4 import NF4Weight
from peftkern.nn._fused_block import AdaptedProjection, Projects
from peftkern.nn.nf4_linear import NF4Linear
from peftkern.ops._linear import Weight, computing_dtype
from peftkern.ops.nf4_linear import nf4_linear
from peftkern.ops.nf4_quantize import NESTED_BLOCK_SIZE

if is_bnb_4bit_available():
    import bitsandbytes

    BNB_LINEARS: tuple[type[nn.Module], ...] = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.LinearNF4)
else:
    BNB_LINEARS = ()

DENSE: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)
"""The weight of GPT-2's Conv1D is [in, out]; the ops read its transposed view where it lies."""


class Accelerated(Projects):
    """Mixed into a PEFT layer's class: forward is one op unless there is an obstacle, then it is PEFT's own."""

    _obstacle: Callable[..., str]
    _fast: Callable[..., Tensor]
    _op: Callable[..., str]
    _usual_op: ClassVar[str]
    _drops: Callable[..., bool]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not kwargs and is_small(self, x):
            calls_of(self)[TOO_SMALL] += 1
            return super().forward(x, *args)  # type: ignore[misc]
        obstacle = self._obstacle(x, args, kwargs)
        if not torch.compiler.is_compiling():
            calls_of(self)[obstacle or FAST] += 1
        return self._stock(x, *args, **kwargs) if obstacle else self._fast(x, **kwargs)

    def projection(self, x: Tensor) -> AdaptedProjection | None:
        return None

    def probe(self) -> Tensor:
        return probe_of(self, None)

    def ran_fused(self) -> None:
        if not torch.compiler.is_compiling():
            calls_of(self)[FAST] += 1

    def _stock(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def is_small(layer: Any, x: Any) -> bool:
    """Whether PEFT's own forward is faster; a small layer's call has no time for more than a few looks."""
    # What makes the op slow for small layers is not in a compiled graph.
    if type(x) not in PLAIN or torch.compiler.is_compiling():
        return False
    least = _peft_small.LEAST.get((layer._usual_op, x.dtype))
    if least is None:
        return False
    elements = x.numel()
    products = elements * layer.out_features
    if products >= least.products and elements >= least.rows * layer.in_features:
        return False
    if not _has_least(layer, x):
        return False
    backends.check_environment(layer._usual_op)
    return products < least.products_with_dropout or elements < least.rows * layer.in_features or not layer._drops()


def least_rows(layer: Any, x: Tensor) -> int:
    """With fewer rows of x PEFT's own forward is faster."""
    least = _peft_small.LEAST.get((layer._usual_op, x.dtype))
    if least is None or not _has_least(layer, x):
        return 0
    products = least.products_with_dropout if layer._drops() else least.products
    return max(least.rows, -(-products // max(layer.in_features * layer.out_features, 1)))


def _has_least(layer: Any, x: Tensor) -> bool:
    """Whether it is plain LoRA or (IA)^3 on a dense weight on the CPU; under autocast torch is slower."""
    plain = type(layer._modules["base_layer"]) in DENSE and not layer.lora_variant
    return plain and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def probe_of(layer: Any, x: Tensor | None) -> Tensor:
    """An input like the one that a layer will get, without rows; x gives device and dtype."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", torch.empty(0, device="cpu"))
    state = getattr(weight, "quant_state", None)
    dtype = getattr(base, "weight_dtype", weight.dtype) if state is None else state.dtype
    if x is not None and x.is_floating_point():
        dtype = x.dtype
    device = weight.device if x is None else x.device
    return torch.empty(0, layer.in_features, dtype=dtype, device=device)


class Base(NamedTuple):
    """A base layer as the linear ops take it.

    Attributes:
        weight, bias: of the layer.
        dtype: in which it computes.
        keeps_dtype: whether y has the dtype that x came in, also under autocast.
    """

    weight: Weight
    bias: Tensor | None
    dtype: torch.dtype
    keeps_dtype: bool

    def run(self, x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
        """op(x), in the layer's dtype."""
        y = op(x if x.dtype == self.dtype else x.to(self.dtype))
        return y.to(x.dtype) if self.keeps_dtype and y.dtype != x.dtype else y

    def alone(self, x: Tensor) -> Tensor:
        """A 4-bit base layer without adapters."""
        return self.run(x, lambda x: nf4_linear(x, cast(NF4Weight, self.weight), self.bias))


def read_base(layer: Any, x: Tensor) -> Base:
    """The base layer of a PEFT layer, one that `base_obstacle` lets pass. No byte is copied."""
    if type(layer) is NF4Linear:
        dtype = _dtype(layer, x)
        return Base(layer.nf4, layer.bias, dtype, dtype != x.dtype)
    if type(layer) in BNB_LINEARS:
        return Base(_bnb_weight(layer.weight), layer.bias, _dtype(layer, x), True)
    weight = tensor_of(layer, "weight")
    return Base(weight if type(layer) is nn.Linear else weight.t(), tensor_of(layer, "bias"), x.dtype, False)


def _dtype(layer: Any, x: Tensor) -> torch.dtype:
    """What a quantised layer computes in for x; bitsandbytes settles it at the first call unless it was given."""
    if type(layer) in BNB_LINEARS and not layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype


def _bnb_weight(weight: Any) -> NF4Weight:
    """bitsandbytes' bytes as a value of ours; quant_storage may be wider elements of the same bytes."""
    state = weight.quant_state
    codes = weight.data.view(torch.uint8).view(-1, 1)
    nested_absmax, table, offset = (
        (state.state2.absmax, state.state2.code, state.offset) if state.nested else [None] * 3
    )
    shape = torch.Size(state.shape)
    return NF4Weight(codes, state.absmax, nested_absmax, table, offset, shape, state.dtype, state.blocksize)


def op_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """What the op on this base layer will compute in."""
    return computing_dtype(x if type(layer) in DENSE else x.new_empty(0, dtype=_dtype(layer, x)))


def idle(layer: Any, names: list[str]) -> str:
    """Why none of a layer's adapters computes; empty if one does."""
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "merged"
    return "" if names else "no active adapter"


def call_obstacle(layer: Any, names: list[str], x: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """What of the call or of the layer's state needs PEFT's own forward; adapter_names aside."""
    if args or kwargs:
        return "arguments beside x"
    # Disabled while merged, PEFT unmerges. A dense base alone is torch's own linear.
    reason = idle(layer, names)
    if reason and (type(layer.base_layer) not in BNB_LINEARS or (layer.disable_adapters and layer.merged)):
        return f"{reason}, the base alone"
    transform = transform_obstacle(x)
    if transform:
        return transform
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return "x has the wrong shape"
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return "global module hooks"
    return ""


def base_obstacle(layer: Any, x: Tensor, op: str) -> str:
    """What makes a base layer none of those that the op computes."""
    kind = type(layer)
    if kind not in DENSE and kind is not NF4Linear and kind not in BNB_LINEARS:
        return f"the base layer is {kind.__module__}.{kind.__name__}"
    choice = backends.choose(op, x)
    if choice.implementation == "reference" and not choice.asked:  # slower than what PEFT does
        return choice.reason
    if kind in BNB_LINEARS:
        obstacle = _bnb_obstacle(layer)
        if obstacle:
            return obstacle
        return hidden_obstacle("base_layer", layer, (layer.bias,), x)
    weight = tensor_of(layer, "weight")
    if kind in DENSE and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, the base weight {weight.dtype}"
    return hidden_obstacle("base_layer", layer, (weight, tensor_of(layer, "bias")), x)


def _bnb_obstacle(layer: Any) -> str:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return "the 4-bit weight has no quant_state"
    if state.quant_type != "nf4":
        return f"the 4-bit weight is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the 4-bit weight for its eval path"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"the 4-bit weight is {list(state.shape)}, not [out, in]"
    if state.nested and (state.state2.blocksize != NESTED_BLOCK_SIZE or state.offset is None):
        return f"the 4-bit weight's scales are in blocks of {state.state2.blocksize}"
    return ""


def tensor_of(module: nn.Module, name: str) -> Any:
    """A parameter, or what a wrapper has put in its place; past nn.Module's search for it."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter


def hidden_obstacle(name: str, module: nn.Module, tensors: Iterable[Tensor | None], x: Tensor) -> str:
    """What a module would do when called beside computing with these tensors of its own; the op does not call it."""
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    for tensor in tensors:
        if tensor is None:
            continue
        if hasattr(tensor, "device_mesh"):
            return f"{name} is sharded, unless FSDP2 gathers it for the call"
        if type(tensor) not in PLAIN or hasattr(tensor, "ds_id"):
            return f"{name} has special tensors"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    return ""


def trains(weight: Weight) -> bool:
    """Whether a dense weight gets a gradient."""
    return isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()


# bitsandbytes, on CPUs with AVX-512-BF16, repacks a weight in place at the first forward in eval mode. From then on
# PEFT's merge and DoRA read garbage, and a backward through it loses gradients.
_REPACKS = "support_avx512bf16_for_cpu"


def keep_bytes(layer: nn.Module) -> bool | None:
    """Has a bitsandbytes layer leave its bytes as they are, unpacked; returns the setting to give back."""
    if type(layer) not in BNB_LINEARS or not hasattr(layer, _REPACKS):
        return None
    weight = cast(Any, layer.weight)
    before = getattr(layer, _REPACKS)
    setattr(layer, _REPACKS, False)
    unpack = getattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu_inverse", None)
    if unpack is not None and getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)
    return bool(before)


def let_repack(layer: nn.Module, setting: bool | None) -> None:
    """Undoes `keep_bytes`."""
    if setting is not None and hasattr(layer, _REPACKS):
        setattr(layer, _REPACKS, setting)
