"""NF4Linear: nn.Linear on a frozen 4-bit weight (QLoRA, arXiv 2305.14314), over `ops.nf4_linear`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.integrations.bitsandbytes import (
    DTYPES,
    FORMAT_KEY,
    PART_NAMES,
    bnb_keys,
    format_values,
    native_entries,
    read_bnb,
    read_native,
)
from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_linear import nf4_linear
from peftkern.ops.nf4_quantize import BLOCK_SIZES, NESTED_BLOCK_SIZE, nf4_quantize

_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "device_mesh")


def gathered(value: Any) -> Any:
    """A DTensor as the whole tensor, from all processes; anything else as it is."""
    return value.full_tensor() if _is_sharded(value) else value


def _quantize(weight: Tensor, block_size: int, double_quant: bool) -> NF4Weight:
    """`nf4_quantize` with a nested_quant_map of its own: shared storage cannot be saved by safetensors."""
    q = nf4_quantize(weight.detach(), block_size, double_quant)
    return replace(q, nested_quant_map=None if q.nested_quant_map is None else q.nested_quant_map.clone())


class NF4Linear(nn.Linear):
    """A linear layer, `y = x @ dequantize(W)^T + bias`, whose weight is frozen NF4 codes.

    `weight` is a uint8 Parameter without grad of shape (ceil(out * in / 2), 1). Buffers: `absmax`, `nested_absmax`,
    `nested_quant_map`, `offset` (the last three None when flat) as in NF4Weight, and `nf4_format`, 6 int64 that tell a
    state dict's reader shape, dtype and block size. `.to(dtype)`, `.half()` and the like cast the bias alone.

    `load_state_dict` reads this module's names, bitsandbytes' names and a float `weight` (quantised on load). All
    entries are checked before one is copied; a dict with some of the weight's entries is an error even with
    strict=False. With assign=True the dense dtype (what `dequantize()` gives) is the file's, else the module's.

    Args:
        in_features, out_features: as in nn.Linear, positive.
        bias: whether there is a trainable bias [out_features].
        device: of parameters and buffers; "meta" allocates nothing.
        dtype: of the bias and of the dense weight that the codes stand for; torch's default dtype if None.
        block_size: elements per absmax, a power of two from 32 to 4096.
        double_quant: quantise absmax itself to 8 bits.
        compute_dtype: x is cast to it and the result back to x's dtype; None computes in x's dtype.

    Raises:
        TypeError, ValueError: a dtype or size that cannot be.

    Shape:
        x [..., in_features] -> [..., out_features], in x's dtype. Differentiable in x and bias.
    """

    nf4_format: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"NF4Linear: {name} must be a positive int, got {value!r}")
        for name, kind in (("dtype", dtype), ("compute_dtype", compute_dtype)):
            if kind not in DTYPES and not (name == "compute_dtype" and kind is None):
                raise TypeError(f"NF4Linear: {name} must be one of {', '.join(map(str, DTYPES))}, got {kind}")
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"NF4Linear: block_size must be one of {BLOCK_SIZES}, got {block_size}")
        # Not nn.Linear's __init__: it would allocate the dense weight, on meta and before from_linear too.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = compute_dtype
        self.weight_dtype = dtype

        elements = in_features * out_features
        blocks = -(-elements // block_size)
        codes = torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
        nested_shapes = {"nested_absmax": (nested_blocks,), "nested_quant_map": (256,), "offset": ()}
        self.register_buffer("absmax", torch.empty(blocks, dtype=absmax_dtype, device=device))
        for name, shape in nested_shapes.items():
            empty = torch.empty(shape, dtype=torch.float32, device=device) if double_quant else None
            self.register_buffer(name, empty)
        self.register_buffer(FORMAT_KEY, torch.tensor(self._format_values(), dtype=torch.int64, device=device))
        own_bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantises a dense layer, to put in its place.

        The bias is the same Parameter, the forward and backward hooks the same registrations (their handles remove
        them here too); device, dtype and training flag are kept. A layer on meta gives one on meta.

        Raises:
            TypeError: `linear` is not an nn.Linear with a floating-point weight.
            ValueError: the weight has NaN or infinity, or the block size cannot be.
            RuntimeError: the weight is sharded.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, NF4Linear):
            raise TypeError(f"NF4Linear.from_linear: linear must be a dense nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"NF4Linear.from_linear: linear.weight must be one of {', '.join(map(str, DTYPES))}, got {weight.dtype}"
            )
        if _is_sharded(weight):
            raise RuntimeError("NF4Linear.from_linear: linear.weight is sharded; quantise before sharding")
        rows, columns = weight.shape
        layer = cls(columns, rows, False, "meta", weight.dtype, block_size=block_size, double_quant=double_quant)
        if not weight.is_meta:
            layer._assign(_quantize(weight, block_size, double_quant))
        layer.bias = linear.bias
        layer.training = linear.training
        for name in _CALL_HOOKS:
            setattr(layer, name, getattr(linear, name))
        return layer

    @property
    def nf4(self) -> NF4Weight:
        """The weight as the ops take it; shares this module's tensors."""
        return NF4Weight(
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_quant_map,
            self.offset,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.block_size,
        )

    @property
    def W_q(self) -> Tensor:
        """The codes, under the name by which HF PEFT tells a quantised layer that has `dequantize()`."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out_features, in_features], in `dtype` or the dtype it was quantised from."""
        return self.nf4.dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.compute_dtype is None or self.compute_dtype == input.dtype:
            return nf4_linear(input, self.nf4, self.bias)
        return nf4_linear(input.to(self.compute_dtype), self.nf4, self.bias).to(input.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Linear does (same generator state, same values), then quantises.

        Does nothing on meta.

        Raises:
            RuntimeError: the weight is sharded.
        """
        # accelerate's init_empty_weights puts parameters on meta but not buffers.
        if self.weight.is_meta or self.absmax.is_meta:
            return
        if _is_sharded(self.weight):
            raise RuntimeError("NF4Linear.reset_parameters: the weight is sharded; initialise before sharding")
        dense = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        own = self._own_entries()
        for name, part in native_entries(_quantize(dense, self.block_size, self.double_quant)).items():
            own[name].copy_(part)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return (
            f"{super().extra_repr()}, block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={self.weight_dtype}{compute}"
        )

    def _format_values(self) -> list[int]:
        shape = torch.Size((self.out_features, self.in_features))
        return format_values(shape, self.weight_dtype, self.block_size, self.double_quant)

    def _own_entries(self) -> dict[str, Tensor]:
        """Name -> Parameter or buffer of the quantised weight; the names that a state dict must have."""
        entries = {name: getattr(self, name) for name in (*PART_NAMES, FORMAT_KEY)}
        return {name: value for name, value in entries.items() if value is not None}

    def _assign(self, q: NF4Weight) -> None:
        for name, part in native_entries(q).items():
            setattr(self, name, nn.Parameter(part, requires_grad=False) if name == "weight" else part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """nn.Module's, except that the weight's bytes move between devices but are never cast."""
        fixed = {id(value): name for name, value in self._own_entries().items()}

        def keep_bytes(tensor: Tensor) -> Tensor:
            if id(tensor) not in fixed:
                return fn(tensor)
            # `.to(dtype)` and `.half()` cast what is floating point: show them the same bits as integers. A view, so
            # that `share_memory_` reaches the storage.
            floating = tensor.is_floating_point()
            bits = tensor.view(torch.int32) if floating else tensor
            moved = fn(bits)
            if moved.dtype != bits.dtype:  # `.type(dtype)` casts integers too
                moved = bits.to(moved.device)
            if moved is bits:
                return tensor
            if fixed[id(tensor)] == FORMAT_KEY and not moved.is_meta:  # `to_empty` lost the values
                moved.copy_(torch.tensor(self._format_values(), device="cpu"))
            return moved.view(torch.float32) if floating else moved

        return super()._apply(keep_bytes, recurse)  # type: ignore[return-value]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Converts and checks this layer's entries; nn.Module's method then copies or assigns them."""
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *arguments)
        try:
            q = self._read(state_dict, prefix)
        except (ValueError, TypeError, RuntimeError) as error:
            error_msgs.append(f"NF4Linear: {error}")
            return

        converted = dict(state_dict)
        if q is not None:
            if not local_metadata.get("assign_to_params_buffers", False):
                q = replace(q, dtype=self.weight_dtype)
            for key in bnb_keys(state_dict, prefix):
                del converted[key]
            converted |= {prefix + name: part for name, part in native_entries(q).items()}
        errors = len(error_msgs)
        # The hooks have run, before the conversion, so that one that renames keys works.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            super()._load_from_state_dict(converted, prefix, *arguments)
        finally:
            self._load_state_dict_pre_hooks = hooks
        if q is not None and len(error_msgs) == errors:
            self.weight_dtype = q.dtype

    def _read(self, state_dict: dict[str, Any], prefix: str) -> NF4Weight | None:
        """The weight in `state_dict`, None if it has none of its entries; it and the bias checked against the module.

        Raises:
            ValueError, TypeError, RuntimeError: what is wrong with which entry.
        """
        bias = state_dict.get(prefix + "bias")
        if bias is not None and self.bias is not None:
            if not isinstance(bias, Tensor) or not bias.is_floating_point():
                raise ValueError(f'"{prefix}bias" must be a floating-point Tensor, got {getattr(bias, "dtype", bias)}')
            if bias.shape != self.bias.shape:
                raise ValueError(f'"{prefix}bias" must have shape {list(self.bias.shape)}, got {list(bias.shape)}')
            if bias.is_meta:
                raise ValueError(f'"{prefix}bias" is on the meta device, it has no values')
        present = [name for name in (*PART_NAMES, FORMAT_KEY) if prefix + name in state_dict]
        weight = state_dict.get(prefix + "weight")
        if bnb_keys(state_dict, prefix):
            q = read_bnb(state_dict, prefix)
        elif not present:
            return None  # nn.Module's method reports the missing names
        elif present == ["weight"] and isinstance(weight, Tensor) and weight.is_floating_point():
            q = self._quantize_entry(weight, prefix + "weight")
        else:
            q = read_native(state_dict, prefix)

        if tuple(q.shape) != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f'"{prefix}weight" must be NF4 of shape {wanted} [out, in], got {list(q.shape)}')
        if q.block_size != self.block_size:
            raise ValueError(f'"{prefix}weight" must have block size {self.block_size}, got {q.block_size}')
        if q.nested != self.double_quant:
            raise ValueError(f'"{prefix}weight" must have double_quant={self.double_quant}, got {q.nested}')
        if _is_sharded(q.codes) != _is_sharded(self.weight):
            raise ValueError(f'"{prefix}weight" and the module must both be sharded or both be whole')
        return q

    def _quantize_entry(self, weight: Tensor, key: str) -> NF4Weight:
        if weight.dtype not in DTYPES:
            raise ValueError(f'"{key}" must be one of {", ".join(map(str, DTYPES))}, got {weight.dtype}')
        if tuple(weight.shape) != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f'"{key}" must have shape {wanted} [out, in], got {list(weight.shape)}')
        if weight.is_meta or _is_sharded(weight):
            raise ValueError(
                f'"{key}" is {"on the meta device" if weight.is_meta else "sharded"}, it cannot be quantised'
            )
        try:
            return _quantize(weight, self.block_size, self.double_quant)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f'"{key}": {error}') from error
