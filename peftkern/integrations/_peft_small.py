"""When torch's separate operations are faster than one op: on dense bases, for few rows and small products.

An op costs some 60 us more than torch's operations in Python and in autograd, and has no kernel of its own for a few
rows of an fp32 weight. The limits are where forward, and forward with backward, take at most a tenth longer by the op,
measured on one thread of a CPU with AVX-512-BF16 (docs/peft.md). DoRA and 4-bit bases have none: the op is faster.
"""

from typing import NamedTuple

import torch

TOO_SMALL = "too small: torch is faster"


class Least(NamedTuple):
    """What a call has to reach for the op.

    Attributes:
        products: rows * in * out.
        products_with_dropout: likewise, where the adapter drops elements of x.
        rows: of x.
    """

    products: int
    products_with_dropout: int
    rows: int = 1


LEAST: dict[tuple[str, torch.dtype], Least] = {
    ("lora_linear", torch.float32): Least(1 << 22, 1 << 18, rows=8),
    ("lora_linear", torch.bfloat16): Least(1 << 15, 1 << 14),
    ("ia3_linear", torch.float32): Least(1 << 26, 1 << 26),
    ("ia3_linear", torch.bfloat16): Least(1 << 26, 1 << 26),
}
