"""The dropout mask: Philox4x32-10 by its known answers, and the kernels' mask bit for bit that of `keep_mask`."""

import pytest
import torch
from linear_cases import only_level
from torch import Tensor

from peftkern._native import ops
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale, philox, threshold
from peftkern.ops._linear import native_weight

# Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = (
    ((0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([value]) for value in counter)
    k0, k1 = (torch.tensor(value) for value in key)
    assert [word.item() for word in philox((c0, c1, c2, c3), (k0, k1))] == list(words)


def test_mask_by_the_formula() -> None:
    """Counter (column >> 3, row low, stream, row high); element e of 8 takes word e & 3, low half first."""
    seed, p, stream = 0x0123456789ABCDEF, 0.3, 5
    mask = keep_mask(torch.tensor(seed), 3, 21, p, stream)
    assert mask.shape == (3, 21) and mask.dtype == torch.bool
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    for row in range(3):
        for column in range(21):
            c0, c1, c2, c3 = (torch.tensor(value) for value in (column // 8, row, stream, 0))
            word = philox((c0, c1, c2, c3), key)[column % 8 % 4].item()
            bits = word & 0xFFFF if column % 8 < 4 else word >> 16
            assert mask[row, column].item() == (bits >= round(p * 65536))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_keep_fraction(p: float, seed: int) -> None:
    """Of a million, within 5 standard deviations; also of each column of a Philox call."""
    mask = keep_mask(draw_seed(), 1024, 1024, p).double()
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - (1 - p)) <= 5 * deviation + 2**-16
    columns = mask.view(1024, 128, 8).mean(dim=(0, 1))
    assert (columns - (1 - p)).abs().max().item() <= 5 * deviation * 8**0.5 + 2**-16


def test_masks_are_unalike(seed: int) -> None:
    """Seeds, streams, rows and columns: each pair agrees on half of its elements at p = 0.5."""
    first = keep_mask(torch.tensor(1), 256, 256, 0.5)
    others = {
        "seed": keep_mask(torch.tensor(2), 256, 256, 0.5),
        "high half of the seed": keep_mask(torch.tensor(1 + 2**32), 256, 256, 0.5),
        "stream": keep_mask(torch.tensor(1), 256, 256, 0.5, stream=1),
        "row": first.roll(1, 0),
        "column": first.roll(1, 1),
        "call": first.roll(8, 1),
        "transposed": first.t(),
    }
    for name, other in others.items():
        agreement = (first == other).double().mean().item()
        assert abs(agreement - 0.5) <= 5 * 0.5 / 256, name


def test_a_mask_does_not_depend_on_its_size() -> None:
    large = keep_mask(torch.tensor(7), 40, 100, 0.5)
    assert torch.equal(keep_mask(torch.tensor(7), 13, 33, 0.5), large[:13, :33])
    assert keep_mask(torch.tensor(7), 0, 33, 0.5).shape == (0, 33)


def test_threshold_and_keep_scale() -> None:
    """Scaled by the share that is kept after rounding, so that the expectation is exact; 0 where nothing is kept."""
    assert [threshold(p) for p in (0.0, 2**-18, 2**-16, 0.5, 1 - 2**-16, 1.0)] == [0, 0, 1, 32768, 65535, 65536]
    assert [keep_scale(p) for p in (0.0, 0.5, 1 - 2**-16, 1.0)] == [1.0, 2.0, 65536.0, 0.0]
    assert keep_mask(torch.tensor(3), 99, 99, 0.0).all() and not keep_mask(torch.tensor(3), 99, 99, 1.0).any()
    for p in (0.1, 1 / 3, 0.77):
        assert keep_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1.0, rel=1e-15)


def test_seeds_follow_the_generator(seed: int) -> None:
    first, second = draw_seed(), draw_seed()
    assert first.dtype == torch.int64 and first.shape == () and first != second
    torch.manual_seed(seed)
    assert draw_seed() == first


def factors(mask: Tensor, p: float) -> Tensor:
    return mask.float() * torch.tensor(keep_scale(p), dtype=torch.float32)


@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.5, 1 - 2**-16, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (25, 65), (270, 70), (9, 600)])
def test_kernels_make_the_same_mask(isa: str, rows: int, columns: int, p: float, seed: int) -> None:
    """Each of the three places: on x, on the result dx and on the weight side of dA. With x, A and B of ones and zeros
    each holds the mask, scaled, by itself."""
    mask_seed, eye = draw_seed(), torch.eye(columns)
    expected = factors(keep_mask(mask_seed, rows, columns, p), p)
    x, weight = torch.ones(rows, columns), native_weight(torch.zeros(columns, columns))
    one_per_row = torch.eye(rows, columns)
    with only_level(isa):
        _, h = ops.lora_linear(x, *weight, eye, eye, 1.0, None, p, mask_seed)
        grads = [
            ops.lora_linear_backward(grad_y, x, h, *weight, eye, eye, 1.0, p, mask_seed, True, True, False)
            for grad_y in (x, one_per_row)
        ]
    assert torch.equal(h, expected)
    assert torch.equal(grads[0][0], expected)
    marked = min(rows, columns)
    assert torch.equal(grads[1][1][:marked], expected[:marked])
    assert not grads[1][1][marked:].any()


@pytest.mark.parametrize("value", [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)])
def test_kernels_take_any_seed(isa: str, value: int) -> None:
    mask_seed, eye = torch.tensor(value), torch.eye(40)
    weight = native_weight(torch.zeros(40, 40))
    _, h = ops.lora_linear(torch.ones(5, 40), *weight, eye, eye, 1.0, None, 0.25, mask_seed)
    assert torch.equal(h, factors(keep_mask(mask_seed, 5, 40, 0.25), 0.25))


def test_kernels_draw_nothing_without_a_seed(isa: str) -> None:
    eye, weight = torch.eye(40), native_weight(torch.zeros(40, 40))
    _, h = ops.lora_linear(torch.ones(5, 40), *weight, eye, eye, 1.0, None, 0.25, None)
    assert torch.equal(h, torch.ones(5, 40))


@pytest.mark.parametrize(
    ("p", "seed_value", "message"),
    [
        (1.5, torch.tensor(0), "dropout_p must be from 0 to 1, got 1.5"),
        (float("nan"), torch.tensor(0), "dropout_p must be from 0 to 1, got nan"),
        (0.5, torch.tensor(0.0), "seed must be Long with 1 elements, got Float"),
        (0.5, torch.tensor([0, 1]), "seed must be Long with 1 elements, got Long with 2"),
    ],
)
def test_bad_dropout_raises(p: float, seed_value: Tensor, message: str) -> None:
    eye, weight = torch.eye(8), native_weight(torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match=f"lora_linear: {message}"):
        ops.lora_linear(torch.ones(2, 8), *weight, eye, eye, 1.0, None, p, seed_value)
