"""How often something accelerated ran, and how; and what of torch's transforms keeps any call off the ops.

Imports neither PEFT nor transformers.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FAST = "fast"
PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that are nothing more."""
_CALLS = "_peftkern_calls"


def calls_of(owner: Any) -> Counter[str]:
    """How often a layer's forward ran, by what it met: FAST or the obstacle."""
    counts = owner.__dict__.get(_CALLS)
    if counts is None:
        counts = owner.__dict__[_CALLS] = Counter()
    return counts


def forget_calls(owner: Any) -> None:
    """As if it had never run."""
    owner.__dict__.pop(_CALLS, None)


def transform_obstacle(x: Tensor) -> str:
    """What of torch's transforms is at work that the ops have no rule for; empty if nothing is."""
    if type(x) not in PLAIN or x.layout is not torch.strided:
        return "x is not a plain tensor"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a torch.func transform"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation"
    return ""
