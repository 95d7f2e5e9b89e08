"""lora_mlp: a gated MLP whose three linear layers have low-rank adapters (SwiGLU and GEGLU, arXiv 2002.05202, equation
6; LoRA, arXiv 2106.09685, equation 3; QLoRA on NF4 weights).

Formula, each projection as in lora_linear, gate and up together as in lora_qkv:
    g = gate(x)    u = up(x)    p = act(g) * u, rounded to x's dtype    y = down(p)
    dp = dy's gradient through down    dg = dp * u * act'(g)    du = dp * act(g)    dx = those of gate and up, one sum
Saved for backward: x, g, u and the low-rank products h of all three. p is computed again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.mlp import lora_mlp as composed_mlp
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    empty_like,
    formats_of,
    grad_weights,
    number,
    oracle,
)
from peftkern.ops._op import NAMESPACES, Op
from peftkern.ops._projections import (
    Projection,
    check_projection,
    composed_projections,
    draw_seeds,
    grad_biases,
    native_projections,
    projection_reference,
    split_grad_a,
    stacked_dtype,
    stacked_products,
)

NAMES = ("gate", "up", "down")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

Adapter = tuple[Tensor, Tensor, float | Tensor]


@oracle
def lora_mlp_reference(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str = "silu",
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """`lora_mlp` in plain torch, differentiable, with the products' gradients rounded where the op rounds them."""
    wide = x.to(accumulate_dtype(x))
    gate, up = (projection_reference(wide, projections[i], dropout_p, seeds, i).to(x.dtype) for i in range(2))
    wide_gate = gate.to(wide.dtype)
    if activation == "silu":
        activated = F.silu(wide_gate)
    else:
        activated = F.gelu(wide_gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    product = (activated * up.to(wide.dtype)).to(x.dtype)
    return projection_reference(product, projections[2], dropout_p, seeds, 2)


def lora_mlp(
    x: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    adapters: Mapping[str, Adapter | None] | Sequence[Adapter | None],
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    biases: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """`down(act(gate(x)) * up(x))` of three LoRA linears (arXiv 2002.05202, equation 6), in few passes.

    Keeps for backward what gate and up gave, but neither the activation nor its product.

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        gate, up: weights [middle, in], dense or NF4Weight.
        down: weight [out, middle], dense or NF4Weight.
        adapters: (A, B, scaling) or None for each of gate, up and down, in this order or by these names; a name left
            out has none. A and B as in `lora_linear`, scaling a number or a 0-d tensor.
        activation: "silu" (SwiGLU), "gelu" (GEGLU) or "gelu_tanh".
        dropout_p: probability of dropping an element on the low-rank paths, used if `training`. Each adapter has its
            own mask, that of `lora_linear` calls for gate, up and down.
        biases: for each of gate, up and down a tensor or None.
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype. Differentiable in x, adapters, scalings, biases and dense weights.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes or devices, or a backend that cannot run them.
    """
    dropout_p = number(dropout_p)
    projections = _checked(x, (gate, up, down), adapters, activation, dropout_p, biases)
    projections = [p._replace(bias=autocast(x, p.bias)[1]) for p in projections]
    x, _ = autocast(x, None)
    implementation = backends.choose("lora_mlp", x, backend).implementation
    seeds = None if implementation == "torch" else draw_seeds(projections, dropout_p, training, x.device)
    if implementation == "reference":
        return lora_mlp_reference(x, projections, activation, dropout_p, seeds)
    if implementation == "torch":
        return composed_mlp(x, composed_projections(projections), activation, dropout_p if training else 0.0)
    y, *_ = NAMESPACES[implementation].lora_mlp(x, *native_projections(projections), activation, dropout_p, seeds)
    return y


def _checked(x: Any, weights: tuple[Any, ...], adapters: Any, activation: Any, dropout_p: Any, biases: Any) -> list:
    """The three projections, all arguments checked."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"lora_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if isinstance(adapters, Mapping):
        if unknown := set(adapters) - set(NAMES):
            raise ValueError(f"lora_mlp: adapters must be of {', '.join(NAMES)}, got {sorted(map(str, unknown))}")
        adapters = [adapters.get(name) for name in NAMES]
    biases = (None,) * 3 if biases is None else biases
    for name, values in (("adapters", adapters), ("biases", biases)):
        if len(values) != 3:
            raise ValueError(f"lora_mlp: {name} must have 3 entries, for gate, up and down, got {len(values)}")
    projections = []
    for name, weight, adapter, bias in zip(NAMES, weights, adapters, biases):
        if adapter is not None and len(adapter) != 3:
            raise ValueError(f"lora_mlp: {name}'s adapter must be (A, B, scaling), got {len(adapter)} values")
        lora_a, lora_b, scaling = (None, None, 0.0) if adapter is None else adapter
        projections.append(Projection(weight, lora_a, lora_b, number(scaling), bias))
    middle = check_projection("lora_mlp gate", x, projections[0], dropout_p)
    if check_projection("lora_mlp up", x, projections[1], dropout_p) != middle:
        raise ValueError(f"lora_mlp: up must have shape [{middle}, in] as gate, got {list(weights[1].shape)}")
    check_projection("lora_mlp down", x.new_empty((1, middle), device=x.device), projections[2], dropout_p)
    return projections


def _fake(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = [weight.out_features for weight in formats_of(call.wf)]
    gate, up, y = (call.x.new_empty((*call.x.shape[:-1], out)) for out in outs)
    return y, gate, up, stacked_products(call)


def _fake_backward(call: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    x, gate, (*inner_as, down_a) = call.x, call.gate, call.lora_as
    stacked, nothing = (call.h.shape[1] - down_a.shape[0], x.shape[-1]), x.new_empty(0)
    return (
        empty_like(x, call.need_x),
        x.new_empty(stacked, dtype=stacked_dtype(inner_as)) if call.need_a else nothing,
        empty_like(down_a) if call.need_a else nothing.clone(),
        [empty_like(lora_b) for lora_b in call.lora_bs] if call.need_b else [],
        empty_like(gate, call.need_inner or (call.need_a and down_a.shape[0] > 0)),
        empty_like(gate),
        empty_like(call.up),
    )


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    need_a, need_b, need_inner = any(needs.lora_as), any(needs.lora_bs), any(needs.w) or any(needs.biases)
    grad_x, grad_a, grad_down_a, grad_bs, product, *grad_inner = run(
        grad_y=grad_y, need_x=needs.x, need_a=need_a, need_b=need_b, need_inner=need_inner
    )
    grad_ys = (*grad_inner, grad_y)
    return {
        "x": grad_x,
        "w": grad_weights(needs.w, grad_ys, (call.x, call.x, product), call.w, call.wf),
        "lora_as": [*split_grad_a(grad_a, call.lora_as[:2]), grad_down_a] if need_a else None,
        "lora_bs": grad_bs if need_b else None,
        "biases": grad_biases(needs.biases, grad_ys, call.biases),
    }


_saves = ("x", "gate", "up", "h", "seeds", "w", "lora_as", "lora_bs")
Op("lora_mlp", _fake, _backward, _saves, _fake_backward, triton="lora_mlp_triton")
