"""Activations by name, and their gradients by what torch has for them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
# Of the gradient behind the activation and z.
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: aten.silu_backward(grad, z),
    "tanh": lambda grad, z: aten.tanh_backward(grad, torch.tanh(z)),
}
