"""The rounding points of the NF4 GEMMs, emulated: as near the truth as a product with weights rounded once."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, nf4_quantize

HEADER = (Path(__file__).parents[1] / "csrc/common/nf4_codebook.h").read_text()
NAMES = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}


def scaled_codebook(dtype: torch.dtype) -> tuple[Tensor, float]:
    """The 16-bit table that the kernels look codes up in, and its scale."""
    scale = re.search(rf"kNf4{NAMES[dtype]}Scale = ([\d.]+)f", HEADER)
    table = re.search(rf"kNf4{NAMES[dtype]}Codebook\[16\] = {{(.*?)}}", HEADER, re.S)
    assert scale and table
    bits = [int(word, 16) for word in re.findall(r"0x([0-9a-f]{4})", table.group(1))]
    signed = torch.tensor([value - 0x10000 if value > 0x7FFF else value for value in bits], dtype=torch.int16)
    return signed.view(dtype).float(), float(scale.group(1))


def parts(weight: NF4Weight) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scales [out, in / 64]."""
    out, depth = weight.shape
    pairs = weight.codes.view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), 1).view(out, depth).long()
    return codes, weight.absmax.view(out, depth // 64)


def promoted(x: Tensor, codes: Tensor, scales: Tensor, slices: int) -> Tensor:
    """x W^T as the kernels for few tokens make it: fp32 products of blocks, scaled into fp32 sums, slices in order."""
    table, scale = scaled_codebook(x.dtype)
    values = table[codes].view(*scales.shape, 64)
    factors = scales * torch.tensor(1 / scale)
    total = torch.zeros(x.shape[0], codes.shape[0])
    for piece in torch.arange(scales.shape[1]).chunk(slices):
        sums = torch.zeros_like(total)
        for block in piece.tolist():
            product = x[:, 64 * block : 64 * block + 64].float() @ values[:, block].T
            sums += factors[:, block] * product
        total += sums
    return total


WEIGHTS = {
    "gaussian": lambda shape: torch.randn(shape),
    "laplace": lambda shape: torch.distributions.Laplace(0.0, 1.0).sample(shape),
    "student": lambda shape: torch.distributions.StudentT(4.0).sample(shape),
    "uniform": lambda shape: torch.rand(shape) * 2 - 1,
}
INPUTS = {
    "centred": lambda x: x,
    "mean": lambda x: x + 1,
    "relu": lambda x: x.relu(),
}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_scaled_codebook_is_as_good_as_weights_rounded_once(dtype, weights, inputs, seed):
    weight = nf4_quantize(WEIGHTS[weights](torch.Size((128, 2048))), double_quant=False)
    x = INPUTS[inputs](torch.randn(64, 2048)).to(dtype)
    codes, scales = parts(weight)
    truth = x.double() @ weight.dequantize(torch.float32).double().T
    rounded_once = x.float() @ weight.dequantize(torch.float32).to(dtype).float().T

    def error(y: Tensor) -> float:
        return ((y.double() - truth).norm() / truth.norm()).item()

    for slices in (1, 4):
        assert error(promoted(x, codes, scales, slices)) <= 1.1 * error(rounded_once)


@pytest.mark.parametrize("dtype", NAMES)
def test_plain_codebook_would_not_do(dtype, seed):
    """What the scale is for: the plain table's errors do not cancel where inputs have a mean."""
    weight = nf4_quantize(torch.randn(128, 2048), double_quant=False)
    x = (torch.randn(64, 2048) + 1).to(dtype)
    codes, scales = parts(weight)
    table = weight.dequantize(torch.float32) / scales.repeat_interleave(64, 1)
    truth = x.double() @ weight.dequantize(torch.float32).double().T
    plain = x.double() @ (table.to(dtype).double() * scales.double().repeat_interleave(64, 1)).T
    scaled = promoted(x, codes, scales, 1)
    assert (plain - truth).norm() > 4 * (scaled.double() - truth).norm()
