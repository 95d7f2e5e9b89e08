"""What multi_lora_linear refuses: an error for each wrong argument, of the function and of the native op."""

from typing import Any

import pytest
import torch
from linear_cases import random_nf4

from peftkern import multi_lora_linear
from peftkern._native import ops
from peftkern.ops._linear import native_weight

OUT, IN = 7, 33
A, B = torch.ones(2, IN), torch.ones(OUT, 2)
GOOD: dict[str, Any] = {
    "x": torch.ones(3, 2, IN),
    "weight": random_nf4((OUT, IN)),
    "lora_as": [A, A],
    "lora_bs": [B, B],
    "scalings": [1.0, 1.0],
    "indices": torch.tensor([0, -1, 1]),
}
BAD = [
    ("x", [1.0], TypeError, ": x must be a Tensor, got list"),
    ("x", torch.ones(3, 4), ValueError, r": x must have shape \[..., 33\] .*, got \[3, 4\]"),
    ("weight", "nf4", TypeError, ": weight must be a Tensor or NF4Weight, got str"),
    ("lora_as", A, TypeError, ": lora_as must be a sequence, one entry per adapter, got Tensor"),
    ("lora_bs", None, TypeError, ": lora_bs must be a sequence, one entry per adapter, got NoneType"),
    ("lora_bs", [B], ValueError, ": lora_bs must have 2 entries, as lora_as, got 1"),
    ("scalings", [1.0] * 3, ValueError, ": scalings must have 2 entries, as lora_as, got 3"),
    ("scalings", [1.0, "2"], TypeError, r"\[1\]: scaling must be a number or a 0-d tensor, got str"),
    ("lora_as", [A, torch.ones(2, 5)], ValueError, r"\[1\]: lora_a must have shape \[rank, 33\], got \[2, 5\]"),
    ("lora_bs", [torch.ones(OUT, 3), B], ValueError, r"\[0\]: lora_b must have shape \[7, 2\] .*, got \[7, 3\]"),
    ("lora_as", [A, A.half()], TypeError, r"\[1\]: lora_a must be torch.float32, got torch.float16"),
    ("indices", [0, 1, 1], TypeError, ": indices must be a Tensor, got list"),
    ("indices", torch.ones(3), TypeError, ": indices must be torch.int64 or torch.int32, got torch.float32"),
    ("indices", torch.ones(3, device="meta").long(), RuntimeError, ": indices must be on x's device cpu, got meta"),
    ("indices", torch.tensor([0, 1]), ValueError, r": indices must have the first dimensions of \[3, 2\], got \[2\]"),
    ("indices", torch.ones(3, 2, 1).long(), ValueError, r": indices must have .* of \[3, 2\], got \[3, 2, 1\]"),
    ("indices", torch.tensor([0, 1, 2]), ValueError, ": indices must be from -1 to 1, got 2"),
    ("indices", torch.tensor([0, -2, 1]), ValueError, ": indices must be from -1 to 1, got -2"),
    ("bias", torch.ones(IN), ValueError, r": bias must have shape \[7\] .*, got \[33\]"),
    ("dropout_p", 2.0, ValueError, ": dropout_p must be from 0 to 1, got 2.0"),
    ("backend", "gpu", ValueError, ": backend must be one of .*, got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_arguments_raise(name: str, value: Any, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"multi_lora_linear{message}"):
        multi_lora_linear(**{**GOOD, "backend": backend, name: value})


def test_native_op_checks_its_arguments() -> None:
    x, dense = torch.ones(3, IN), native_weight(torch.ones(OUT, IN))
    good = (x, *dense, [A, A], [B, B], [1.0, 1.0], torch.tensor([0, -1, 1]), None, 0.0, None)
    for position, value, message in (
        (0, x.double(), "x must be fp32, bf16 or fp16, got Double"),
        (3, [A, A[:, 1:]], r"lora_a must have shape \[rank, 33\], got \[2, 32\]"),
        (4, [B], "lora_bs must have 2 entries, got 1"),
        (5, [1.0], "scalings must have 2 entries, got 1"),
        (6, torch.tensor([0, 1]), r"indices must have shape x's leading shape, got \[2\]"),
        (6, torch.tensor([], dtype=torch.int64), r"indices must have shape x's leading shape, got \[0\]"),
        (6, torch.tensor([0, 1, 1]).int(), "indices must be Long, got Int"),
        (6, torch.tensor([0, 1, 2]), "indices must be from -1 to 1, got 2"),
        (6, torch.tensor([0, -2, 1]), "indices must be from -1 to 1, got -2"),
    ):
        with pytest.raises(RuntimeError, match=f"multi_lora_linear: {message}"):
            ops.multi_lora_linear(*good[:position], value, *good[position + 1 :])
    needs = (True, [1, 1], [1, 1])
    good = (torch.ones(3, OUT), x, torch.ones(3, 2), *dense, [A, A], [B, B], [1.0] * 2, good[6], 0.0, None, *needs)
    for position, value, message in (
        (0, torch.ones(2, OUT), r"x must have shape .*grad_y's rows, got \[3, 33\]"),
        (2, torch.ones(3, 3), r"h must have shape \[rows, largest rank\], got \[3, 3\]"),
        (8, torch.tensor([0, 1, 2]), "indices must be from -1 to 1, got 2"),
        (12, [1], "need_as must have 2 entries, got 1"),
    ):
        with pytest.raises(RuntimeError, match=f"multi_lora_linear_backward: {message}"):
            ops.multi_lora_linear_backward(*good[:position], value, *good[position + 1 :])
