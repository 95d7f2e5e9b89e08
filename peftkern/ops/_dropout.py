"""The dropout mask of every backend: Philox4x32-10 (Salmon et al., SC 2011), regenerated and never stored.

One call per 8 columns: key = seed, counter = (column >> 3, row low, stream, row high). Element e = column & 7 takes
word e & 3, its low 16 bits for e < 4 and its high 16 bits otherwise. It is kept iff those bits are at least
round(p * 65536), and kept values are multiplied by 65536 / (65536 - round(p * 65536)): the expectation is exact, p is
quantised to 1.5e-5.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed from the device's default generator as a 0-d int64 tensor there.

    So `torch.manual_seed` and recompute work, nothing waits for the device, and a replayed CUDA graph draws anew.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The number of 16-bit values that are dropped."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by; 0 when everything is dropped."""
    dropped = threshold(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2**32, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> list[Tensor]:
    """Philox4x32: four words of 32 random bits, as int64 tensors of the counter's broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        h0, l0 = _multiply(c0, 0xD2511F53)
        h1, l1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, stream: int = 0) -> Tensor:
    """The bool mask (rows, columns) of kept elements."""
    device = seed.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange((columns + 7) // 8, device=device).unsqueeze(0)
    zero = torch.zeros_like(row + group)
    counter = (zero + group, zero + (row & _LOW), zero + stream, zero + (row >> 32))
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    halves = [w & 0xFFFF for w in words] + [w >> 16 for w in words]
    bits = torch.stack(halves, dim=-1).flatten(1)[:, :columns]
    return bits >= threshold(p)
