"""lora_mlp: a gated MLP whose three linear layers have low-rank adapters (SwiGLU and GEGLU, arXiv 2002.05202, equation
6; LoRA, arXiv 2106.09685, equation 3; QLoRA on NF4 weights).

Formula, each projection as in lora_linear, gate and up together as in lora_qkv:
    g = gate(x)    u = up(x)    p = act(g) * u, rounded to x's dtype    y = down(p)
    dp = dy's gradient through down    dg = dp * u * act'(g)    du = dp * act(g)    dx = those of gate and up, one sum
Saved for backward: x, g, u and the low-rank products h of all three. p is computed again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.ops._linear import Weight, accumulate_dtype, autocast, number, oracle, raise_double_backward
from peftkern.ops._projections import (
    Projection,
    check_projection,
    draw_seeds,
    grad_biases,
    grad_weights,
    native_projections,
    only,
    projection_reference,
    split_grad_a,
    stacked_dtype,
)
from peftkern.ops._registration import NAMESPACES, register

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
        backend: "reference", "cpu" or "triton"; by default the fastest that runs.

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
    seeds = draw_seeds(projections, dropout_p, training, x.device)
    if implementation == "reference":
        return lora_mlp_reference(x, projections, activation, dropout_p, seeds)
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


def _fake(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    scale_counts: list[int],
    block_sizes: list[int],
    out_features: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    biases: list[Tensor],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank = sum(lora_a.shape[0] for lora_a in lora_as)
    gate, up, y = (x.new_empty((*x.shape[:-1], out)) for out in out_features)
    return y, gate, up, x.new_empty((math.prod(x.shape[:-1]), rank), dtype=torch.float32)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    scale_counts: list[int],
    block_sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_inner: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    down_rank, empty = lora_as[2].shape[0], (0,)
    stacked = (h.shape[1] - down_rank, x.shape[-1])
    return (
        x.new_empty(x.shape if need_x else empty),
        x.new_empty(stacked, dtype=stacked_dtype(lora_as[:2])) if need_a else x.new_empty(empty),
        lora_as[2].new_empty(lora_as[2].shape) if need_a else x.new_empty(empty),
        [lora_b.new_empty(lora_b.shape) for lora_b in lora_bs] if need_b else [],
        gate.new_empty(gate.shape if need_inner or (need_a and down_rank) else empty),
        gate.new_empty(gate.shape),
        up.new_empty(up.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weights, scales, counts, block_sizes, _, lora_as, lora_bs, scalings, biases, *rest = inputs
    activation, dropout_p, seeds = rest
    saved = output[1:]  # gate, up and h
    ctx.save_for_backward(x, *saved, seeds, *weights, *lora_as, *lora_bs, *scales)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # no zeros for these
    ctx.scalars = counts, block_sizes, scalings, activation, dropout_p
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def _backward(ops: Any, ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, gate, up, h, seeds, *rest = ctx.saved_tensors
    counts, block_sizes, scalings, activation, dropout_p = ctx.scalars
    weights, lora_as, lora_bs, scales = rest[:3], rest[3:6], rest[6:9], rest[9:]
    need_x, need_weights, _, _, _, _, need_as, need_bs, _, need_biases, *_ = ctx.needs_input_grad
    need_a, need_b, need_inner = any(need_as), any(need_bs), any(need_weights) or any(need_biases)
    lists = weights, scales, counts, block_sizes, lora_as, lora_bs, scalings
    grad_x, grad_a, grad_down_a, grad_bs, product, *grad_inner = ops.lora_mlp_backward(
        grad_y, x, gate, up, h, *lists, activation, dropout_p, seeds, need_x, need_a, need_b, need_inner
    )
    grad_ys = (*grad_inner, grad_y)
    grad_as = [*split_grad_a(grad_a, lora_as[:2]), grad_down_a] if need_a else [None] * 3
    return (
        grad_x if need_x else None,
        grad_weights(need_weights, grad_ys, (x, x, product), weights),
        [None] * len(scales),
        *(None,) * 3,
        only(need_as, grad_as),
        only(need_bs, grad_bs) if need_b else [None] * 3,
        None,
        grad_biases(need_biases, grad_ys, ctx.bias_dtypes),
        *(None,) * 3,
    )


register("lora_mlp", _fake, _backward, _setup_context, triton="lora_mlp_triton")
register("lora_mlp_backward", _fake_backward, raise_double_backward("lora_mlp"), triton="lora_mlp_triton")
