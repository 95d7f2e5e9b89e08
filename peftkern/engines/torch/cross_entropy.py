"""cross_entropy in blocks of rows; the formula is that of `peftkern/ops/cross_entropy.py`.

Saved for backward: logits, target and the log-sum-exp of each row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.engines.torch.autograd import Function, without_autocast

# Of fp32 logits in a block: 32 MB.
BLOCK_ELEMENTS = 1 << 23


class _CrossEntropy(Function):
    op = "cross_entropy"

    @staticmethod
    def forward(ignore_index: int, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
        log_sums = torch.empty_like(losses)
        with without_autocast(logits):
            for block in _blocks(logits):
                wide = logits[block].float()
                torch.logsumexp(wide, 1, out=log_sums[block])
                picked = wide.gather(1, _class(target[block], ignore_index)).squeeze(1)
                torch.sub(log_sums[block], picked, out=losses[block])
        losses.masked_fill_(target == ignore_index, 0)
        return losses, log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.ignore_index, logits, target = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def gradients(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        logits, target, log_sums = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        weights = grad_losses.masked_fill(target == ctx.ignore_index, 0).unsqueeze(1)
        for block in _blocks(logits):
            slopes = logits[block].float().sub_(log_sums[block].unsqueeze(1)).exp_()
            places = _class(target[block], ctx.ignore_index)
            slopes.scatter_add_(1, places, slopes.new_full((1, 1), -1.0).expand(places.shape))
            torch.mul(slopes, weights[block], out=grad[block])
        return None, grad, None


def _class(target: Tensor, ignore_index: int) -> Tensor:
    """[rows, 1]: the target, or class 0 of a row that is ignored."""
    return target.masked_fill(target == ignore_index, 0).unsqueeze(1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, min(start + step, logits.shape[0]))


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The loss of every row, fp32 [rows], for logits [rows, classes]."""
    return _CrossEntropy.run(ignore_index, logits, target)[0]  # type: ignore[no-any-return]
