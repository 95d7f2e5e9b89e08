"""multi_lora_linear: a linear layer on a batch whose samples each have an adapter of their own, or none (LoRA, arXiv
2106.09685, equation 3; batches of many adapters: Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285).

Formula, with x flattened to rows, i the adapter of a row, d(x) = dropout(x) and its mask as in lora_linear:
    h  = d(x) A_i^T                                      [rows, largest rank], fp32
    y  = x W^T + scaling_i * h B_i^T + bias              of a row without an adapter x W^T + bias
    dh = scaling_i * dy B_i                              dx = dy W + mask * (dh A_i)
    dA_i = dh^T d(x), dB_i = scaling_i * dy^T h          over the rows of adapter i; zeros if there is none
The rows are sorted by adapter, so that each of these lines is one pass over all adapters, and W is read once.
Saved for backward: x and h, whose rows are in that order. The dropout mask is regenerated from the seed
(`_dropout.py`), at the rows' places in x.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.decode import Weight as FrozenWeight
from peftkern.engines.torch.multi_lora import multi_lora_linear as composed_multi
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale
from peftkern.ops._linear import (
    Weight,
    accumulate_dtype,
    autocast,
    check_linear,
    check_tensor,
    dense_weight,
    empty_like,
    grad_bias,
    grad_weights,
    native_weight,
    number,
    oracle,
    out_features_of,
)
from peftkern.ops._op import NATIVE, Op
from peftkern.ops.lora_linear import check_dropout, check_lora

OP = "multi_lora_linear"


@oracle
def multi_lora_linear_reference(
    x: Tensor,
    weight: Weight,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float | Tensor],
    indices: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`multi_lora_linear` in plain torch, differentiable: fp32 (float64 for float64 x), rounded once.

    Every adapter computes on every row, and the rows that are not its own drop the result. No seed: no dropout.
    """
    compute = accumulate_dtype(x)
    wide = x.to(compute)
    dropped = wide
    if seed is not None and dropout_p > 0:
        mask = keep_mask(seed.to(x.device), math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        dropped = torch.where(mask, wide * keep_scale(dropout_p), 0)
    y = F.linear(wide, dense_weight(weight, compute), None if bias is None else bias.to(compute))
    of_row = indices.reshape(*indices.shape, *(1,) * (x.dim() - indices.dim()))
    for i, (lora_a, lora_b, scaling) in enumerate(zip(lora_as, lora_bs, scalings)):
        delta = F.linear(F.linear(dropped, lora_a.to(compute)), lora_b.to(compute))
        y = y + torch.where(of_row == i, scaling * delta, 0)
    return y.to(x.dtype)


def multi_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float | Tensor],
    indices: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """`lora_linear` with an adapter for each sample of a batch (LoRA, arXiv 2106.09685, equation 3).

    Args:
        x: [..., in], any leading shape and strides. fp32, bf16, fp16 on the kernels; float64 on the reference.
        weight: dense [out, in] in any of these dtypes, or an NF4Weight (QLoRA).
        lora_as, lora_bs: [rank, in] and [out, rank] of each adapter: x's dtype or fp32; any ranks; none at all too.
        scalings: for each a number or a 0-d tensor, read at every call.
        indices: int64 or int32, of the first dimensions of x, such as [batch] for x [batch, tokens, in] or [rows] for
            x [rows, in]: which adapter each has; -1 for none. On the CPU, where nothing waits for it, or on x's device.
        bias: [out], optional.
        dropout_p: probability of dropping an element of x on the low-rank path, used if `training`. The mask is that of
            a `lora_linear` on all of x.
        backend: "reference" or "cpu"; by default the fastest that runs.

    Returns:
        [..., out] in x's dtype; with one adapter for all, the bits of `lora_linear`. Differentiable in x, adapters,
        scalings, bias and a dense weight. An adapter that no row has gets a gradient of zeros.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes, indices or devices, or a backend that cannot run them.
            Under torch.compile an index out of range is a RuntimeError, as it is found later; the reference takes it
            for none.
    """
    dropout_p = number(dropout_p)
    if isinstance(scalings, Sequence):
        scalings = [number(scaling) for scaling in scalings]
    out_features = _check(x, weight, lora_as, lora_bs, scalings, indices, bias, dropout_p)
    x, bias = autocast(x, bias)
    indices = indices.long()
    implementation = backends.choose(OP, x, backend).implementation
    dropout_p = dropout_p if training and len(lora_as) else 0.0
    if implementation == "torch":
        adapters = _native_adapters(x, out_features, lora_as, lora_bs, scalings)
        return composed_multi(x, FrozenWeight.of(weight), *adapters, indices, bias, dropout_p)
    indices = indices.to(x.device)
    seed = draw_seed() if dropout_p > 0 else None
    if implementation == "reference":
        return multi_lora_linear_reference(x, weight, lora_as, lora_bs, scalings, indices, bias, dropout_p, seed)
    adapters = _native_adapters(x, out_features, lora_as, lora_bs, scalings)
    y, _ = NATIVE.multi_lora_linear(x, *native_weight(weight), *adapters, indices, bias, dropout_p, seed)
    return y


def _native_adapters(
    x: Tensor, out_features: int, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scalings: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The lists of the schema; torch's autograd wants them not empty, so that one of rank 0 stands for none."""
    if not lora_as:
        return [x.new_empty(0, x.shape[-1])], [x.new_empty(out_features, 0)], [0.0]
    # A tensor is folded into B [out, rank]: torch differentiates it.
    bs = [b.float() * s if isinstance(s, Tensor) else b for b, s in zip(lora_bs, scalings)]
    return list(lora_as), bs, [1.0 if isinstance(s, Tensor) else s for s in scalings]


def _check(
    x: Any, weight: Any, lora_as: Any, lora_bs: Any, scalings: Any, indices: Any, bias: Any, dropout_p: Any
) -> int:
    """Checks every argument; returns out_features."""
    out_features, _ = check_linear(OP, x, weight, bias)
    check_dropout(OP, dropout_p)
    for name, values in (("lora_as", lora_as), ("lora_bs", lora_bs), ("scalings", scalings)):
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(f"{OP}: {name} must be a sequence, one entry per adapter, got {type(values).__name__}")
        if len(values) != len(lora_as):
            raise ValueError(f"{OP}: {name} must have {len(lora_as)} entries, as lora_as, got {len(values)}")
    for i, (lora_a, lora_b, scaling) in enumerate(zip(lora_as, lora_bs, scalings)):
        check_lora(f"{OP}[{i}]", x, weight, lora_a, lora_b, scaling, bias, dropout_p)
    on_host = isinstance(indices, Tensor) and indices.device.type == "cpu"
    check_tensor(OP, "indices", indices, (torch.int64, torch.int32), indices.device if on_host else x.device)
    # Size by size: a trace would take a comparison of shapes as a reason to fix them.
    leading = x.shape[:-1]
    if indices.dim() > len(leading) or any(a != b for a, b in zip(indices.shape, leading)):
        raise ValueError(f"{OP}: indices must have the first dimensions of {list(leading)}, got {list(indices.shape)}")
    if not torch.compiler.is_compiling() and indices.device.type == "cpu" and indices.numel() > 0:
        low, high = (int(end) for end in torch.aminmax(indices))
        if low < -1 or high >= len(lora_as):
            wrong = low if low < -1 else high
            raise ValueError(f"{OP}: indices must be from -1 to {len(lora_as) - 1}, got {wrong}")
    return out_features


def _fake(call: Any) -> tuple[Tensor, Tensor]:
    width = max((lora_a.shape[0] for lora_a in call.lora_as), default=0)
    h = call.x.new_empty((math.prod(call.x.shape[:-1]), width), dtype=torch.float32)
    return call.x.new_empty((*call.x.shape[:-1], out_features_of(call.wf))), h


def _fake_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return (
        empty_like(call.x, call.need_x, call.grad_y.dtype),
        [empty_like(lora_a, bool(need)) for lora_a, need in zip(call.lora_as, call.need_as)],
        [empty_like(lora_b, bool(need)) for lora_b, need in zip(call.lora_bs, call.need_bs)],
    )


def _backward(run: Any, call: Any, needs: Any, grad_y: Tensor) -> dict[str, Any]:
    found = {}
    if needs.x or any(needs.lora_as) or any(needs.lora_bs):
        need_as, need_bs = [int(need) for need in needs.lora_as], [int(need) for need in needs.lora_bs]
        found["x"], found["lora_as"], found["lora_bs"] = run(
            grad_y=grad_y, need_x=needs.x, need_as=need_as, need_bs=need_bs
        )
    if any(needs.w):
        found["w"] = grad_weights(needs.w, [grad_y], [call.x], call.w, call.wf)
    if needs.bias:
        found["bias"] = grad_bias(grad_y, call.bias)
    return found


Op(OP, _fake, _backward, ("x", "h", "w", "indices", "seed", "lora_as", "lora_bs"), _fake_backward)
