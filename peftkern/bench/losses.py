"""cross_entropy beside torch's on fp32 copies of the logits, which is what transformers' models compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.bench.contenders import normal
from peftkern.bench.measure import Run
from peftkern.ops.cross_entropy import cross_entropy


def contenders(classes: int, rows: int) -> dict[str, Run]:
    """Name -> run(i): the mean loss of bf16 logits and its gradient."""
    generator = torch.Generator().manual_seed(rows)
    logits = normal(generator, rows, classes).bfloat16().requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator, device="cpu").to(logits.device)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        return lambda _: torch.autograd.grad(loss(logits, target), logits)

    return {"peftkern": step(cross_entropy), "torch fp32": step(lambda x, t: F.cross_entropy(x.float(), t))}


def work(classes: int, rows: int) -> tuple[float, float]:
    """(bytes, operations): bf16 logits read twice, their gradient written; some ten operations an exponential."""
    return 3 * 2.0 * rows * classes, 2 * 10.0 * rows * classes
