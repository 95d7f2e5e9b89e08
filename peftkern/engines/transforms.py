"""What else than autograd may be looking at a call."""

import torch


def is_transformed() -> bool:
    """Whether torch.func is at work, which may want a gradient of a tensor that says that it requires none."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
