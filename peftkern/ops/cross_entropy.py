"""cross_entropy: the loss of language models, from logits in their own dtype.

Formula, for a row x of logits with target t, in fp32:
    loss = L - (x_t - m),  m = max_j x_j,  L = log sum_j e^(x_j - m)
    dx_j = dloss * (e^(x_j - m - L) - [j = t]), rounded once
Rows whose target is ignored have loss 0 and no gradient. torch's function on fp32 copies of bf16 logits makes three
tensors of their size in fp32 and two passes over each; this makes the gradient alone, in the logits' dtype.
Saved for backward: logits, target, m and L [rows].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch import cross_entropy as composed
from peftkern.ops._linear import FLOATING, accumulate_dtype, check_tensor, empty_like, oracle
from peftkern.ops._op import NATIVE, Op

OP = "cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


@oracle
def cross_entropy_reference(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """`cross_entropy` without a reduction, in plain torch, differentiable: fp32 (float64 for float64)."""
    wide = logits.to(accumulate_dtype(logits))
    return F.cross_entropy(wide, target, ignore_index=ignore_index, reduction="none")


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean", *, backend: str | None = None
) -> Tensor:
    """`F.cross_entropy` of classes, computed in fp32 without fp32 copies of the logits.

    Args:
        logits: [rows, classes], any row stride. fp32, bf16, fp16 on the kernels; float64 on the reference.
        target: [rows], int64: a class, or ignore_index.
        ignore_index: the target of rows that do not count.
        reduction: "mean" over the rows that count (NaN without any), "sum", or "none".
        backend: "reference" or "cpu"; by default the fastest that runs.

    Returns:
        A number, or [rows] for "none", in fp32 (float64 for float64). Differentiable in logits.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes, targets or devices, or a backend that cannot run them.
            Under torch.compile a target out of range is a RuntimeError, as it is found later.
    """
    _check(logits, target, ignore_index, reduction)
    implementation = backends.choose(OP, logits, backend).implementation
    if implementation == "torch":
        losses = composed.cross_entropy(logits, target, ignore_index)
    elif implementation == "reference":
        losses = cross_entropy_reference(logits, target, ignore_index)
    else:
        losses = NATIVE.cross_entropy(logits, target, ignore_index)[0]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _check(logits: Any, target: Any, ignore_index: Any, reduction: Any) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{OP}: logits must be a Tensor, got {type(logits).__name__}")
    check_tensor(OP, "logits", logits, FLOATING, logits.device)
    check_tensor(OP, "target", target, (torch.int64,), logits.device)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits must have shape [rows, classes], got {list(logits.shape)}")
    if target.dim() != 1 or target.shape[0] != logits.shape[0]:
        raise ValueError(f"{OP}: target must have shape [{logits.shape[0]}] (logits' rows), got {list(target.shape)}")
    if type(ignore_index) is not int:
        raise TypeError(f"{OP}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not torch.compiler.is_compiling() and target.device.type == "cpu":
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= logits.shape[1]))]
        if wrong.numel():
            last = logits.shape[1] - 1
            raise ValueError(f"{OP}: target must be from 0 to {last} or {ignore_index}, got {int(wrong[0])}")


def _fake(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = call.logits.new_empty((call.logits.shape[0],), dtype=torch.float32)
    return losses, torch.empty_like(losses), torch.empty_like(losses)


def _fake_backward(call: Any) -> Tensor:
    return empty_like(call.logits)


def _backward(run: Any, call: Any, needs: Any, grad_losses: Tensor) -> dict[str, Any]:
    return {"logits": run(grad_losses=grad_losses)} if needs.logits else {}


Op(OP, _fake, _backward, ("logits", "target", "top", "log_sum"), _fake_backward)
