"""The layers that are timed against each other, each on enough copies of its weight that caches do not help."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.bench.measure import ROTATED_BYTES, Run, copies
from peftkern.integrations.bitsandbytes import bnb_state_dict
from peftkern.nn import (
    BottleneckAdapter,
    DoRALinear,
    IA3Linear,
    LoRAAttention,
    LoRALinear,
    LoRAMLP,
    NF4Linear,
)
from peftkern.ops._linear import dense_weight
from peftkern.ops.dora_linear import dora_norm as ops_dora_norm

RANK = 16
BOTTLENECK = 64


def has(package: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(package) is not None


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """The same fp32 numbers on any default device."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def nf4_linear(out_features: int, in_features: int) -> NF4Linear:
    """An NF4Linear with random bytes: speed does not depend on them, and quantising takes time."""
    layer = NF4Linear(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16).to_empty(
        device=torch.get_default_device()
    )
    layer.weight.data.random_(0, 256)
    layer.absmax.random_(0, 256)
    assert layer.nested_absmax is not None and layer.nested_quant_map is not None and layer.offset is not None
    layer.nested_absmax.fill_(0.02)
    layer.nested_quant_map.copy_(torch.linspace(-1, 1, 256))
    layer.offset.fill_(0.03)
    return layer


def dense_linear(out_features: int, in_features: int, dtype: torch.dtype) -> nn.Linear:
    """A dense layer with small random weights."""
    layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype).to_empty(
        device=torch.get_default_device()
    )
    nn.init.uniform_(layer.weight, -0.02, 0.02)
    return layer.requires_grad_(False)


def bnb_linear(out_features: int, in_features: int) -> nn.Module:
    """A bitsandbytes Linear4bit (NF4, double quantisation, bf16) with the bytes of ours."""
    import bitsandbytes as bnb

    state = bnb_state_dict(nf4_linear(out_features, in_features))
    codes = state.pop("weight")
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16, device="meta")
    layer.weight = bnb.nn.Params4bit.from_prequantized(codes, state, device=torch.get_default_device(), module=layer)
    return layer


def bnb_quantize(weight: Tensor) -> Any:
    """bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes.functional as functional

    return functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def bnb_dequantize(layer: Any) -> Tensor:
    """The dense weight of a Linear4bit."""
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(layer.weight, layer.weight.quant_state)


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_lora(layer: nn.Module, dropout: float, use_dora: bool = False) -> nn.Module:
    """HF PEFT's LoRA or DoRA of rank 16 with fp32 adapters around a layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["layer"], use_dora=use_dora)
    model: Any = get_peft_model(_Holder(layer), config)  # type: ignore[arg-type]
    wrapped = model.base_model.model.layer
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    nn.init.normal_(wrapped.lora_B["default"].weight, std=0.01)
    return wrapped.train()


def lora(layer: nn.Linear, dropout: float) -> LoRALinear:
    """Our LoRA of the same shape."""
    wrapped = LoRALinear(layer, rank=RANK, alpha=2 * RANK, dropout=dropout)
    nn.init.normal_(wrapped.factors("default")[1], std=0.01)
    return wrapped.train()


class Qkv(nn.Module):
    """q, k and v of grouped-query attention: k and v have a quarter of q's features."""

    def __init__(self, layer: Callable[[int, int], nn.Module], out_features: int, in_features: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (layer(out, in_features) for out in self.sizes(out_features))

    @staticmethod
    def sizes(out_features: int) -> tuple[int, int, int]:
        """Of q, k and v."""
        return out_features, max(1, out_features // 4), max(1, out_features // 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def fused(self) -> nn.Module:
        """In one op."""
        return LoRAAttention.from_block(self)


class Mlp(nn.Module):
    """A SwiGLU MLP."""

    def __init__(self, layer: Callable[[int, int], nn.Module], middle: int, features: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = layer(middle, features), layer(middle, features)
        self.down_proj = layer(features, middle)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def fused(self) -> nn.Module:
        """In one op."""
        return LoRAMLP.from_block(self)


def peft_ia3(layer: nn.Module) -> nn.Module:
    """HF PEFT's (IA)^3 on the output of a layer."""
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["layer"], feedforward_modules=[])
    model: Any = get_peft_model(_Holder(layer), config)  # type: ignore[arg-type]
    return model.base_model.model.layer.train()


def dora(layer: nn.Linear) -> DoRALinear:
    """Our DoRA of the same shape as `lora`."""
    wrapped = DoRALinear(layer, rank=RANK, alpha=2 * RANK)
    nn.init.normal_(wrapped.factors("default")[1], std=0.01)
    return wrapped.train()


def ia3(layer: nn.Linear) -> IA3Linear:
    """Our (IA)^3 on the output."""
    return IA3Linear(layer).train()


def dora_norm(layer: DoRALinear) -> Tensor:
    """The norms of a DoRA layer, from the stored weight."""
    with torch.no_grad():
        square_norm = layer._base_square_norm()
        factors = layer.factors("default")
        return ops_dora_norm(layer.base_weight, *factors, layer.scaling["default"], square_norm, torch.bfloat16)


def dense_dora_norm(layer: DoRALinear) -> Tensor:
    """The same as HF PEFT takes it: of a dense W + s B A in bf16, with B A by way of the identity."""
    with torch.no_grad():
        a, b = layer.factors("default")
        change = F.linear(F.linear(torch.eye(layer.in_features), a), b).T
        weight = dense_weight(layer.base_weight, torch.bfloat16)
        return torch.linalg.norm(weight + layer.scaling["default"] * change.bfloat16(), dim=1)


def changing(step: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """A step before which the layer's factors change, as an optimizer changes them."""

    def call(layer: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.mul_(1.0)
        step(layer)

    return call


def adapter(features: int) -> BottleneckAdapter:
    """Our bottleneck adapter in bf16."""
    return BottleneckAdapter(features, dtype=torch.bfloat16)


class EagerAdapter(nn.Module):
    """The same in plain torch, as AdapterHub computes it: two linear layers, an activation, a scaled sum."""

    scaling = 1.0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, BOTTLENECK, dtype=torch.bfloat16)
        self.up = nn.Linear(BOTTLENECK, features, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x))) * self.scaling + x


def _bytes(layer: nn.Module) -> int:
    tensors = [*layer.parameters(), *layer.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def rotate(build: Callable[[], nn.Module], call: Callable[[Any], Any], rotated: int = ROTATED_BYTES) -> Run:
    """`call` on copies that take turns; a single copy with rotated=0, which then stays in cache."""
    first = build()
    layers = [first, *(build() for _ in range(copies(_bytes(first), rotated) - 1))]
    # bitsandbytes repacks a weight at its first call in eval mode.
    for layer in layers:
        call(layer)
    return lambda i: call(layers[i % len(layers)])


def forward(x: Tensor) -> Callable[[nn.Module], Tensor]:
    """A forward pass without gradients."""

    def call(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def forward_backward(x: Tensor, *grads: Tensor) -> Callable[[nn.Module], None]:
    """A training step of the layer: gradients of x and of whatever the layer trains."""
    x = x.clone().requires_grad_()

    def call(layer: nn.Module) -> None:
        y = layer(x)
        torch.autograd.backward((y,) if isinstance(y, Tensor) else y, grads)
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    return call


def dense_call(x: Tensor) -> Callable[[nn.Linear], Tensor]:
    """torch's F.linear on a dense layer."""

    def call(layer: nn.Linear) -> Tensor:
        with torch.no_grad():
            return F.linear(x, layer.weight)

    return call
