"""The decode kernels on the emulated device, as the host functions of nf4_linear and lora_linear launch them."""

from ctypes import CDLL, byref

import torch
from cuda_emulation import DTYPES, Epilogue, Linear, LoraDown, Memory, Plan, launched, view_of
from torch import Tensor

from peftkern.nf4 import NF4Weight
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference
from peftkern.ops.nf4_quantize import ceil_divide


def decode(
    kernels: CDLL,
    x: Tensor,
    q: NF4Weight,
    plan: Plan,
    epilogue: Epilogue | None = None,
    poison_stride: int = 0,
    device: int = 0,
) -> Tensor:
    """The kernel's y; with a stride, rows of x lie apart and poison is between them."""
    out_features, in_features = q.shape
    padded = torch.cat((x, x.new_full((len(x), poison_stride), float("nan"))), dim=1)
    source = Memory(padded[:, : in_features + poison_stride])
    view, _alive = view_of(q)
    y = Memory(None, (len(x), out_features), x.dtype)
    partials = Memory(None, (plan.splits, len(x), out_features), torch.float32)
    task = Linear(
        source.address,
        in_features + poison_stride,
        len(x),
        in_features,
        out_features,
        DTYPES[x.dtype],
        view,
        epilogue or Epilogue(),
        y.address,
        plan.splits,
        partials.address,
    )
    launched(kernels.peftkern_cuda_nf4_linear_decode(byref(task), byref(plan), device, None))
    return y.tensor()


def lora_linear(
    kernels: CDLL,
    x: Tensor,
    q: NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    plan: Plan,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    device: int = 0,
) -> tuple[Tensor, Tensor]:
    """y and h of the two launches, the low-rank part and the bias in the second's epilogue."""
    rank = len(lora_a)
    source, a, b, h = Memory(x), Memory(lora_a), Memory(lora_b), Memory(None, (len(x), rank), torch.float32)
    adapter = DTYPES[lora_a.dtype]
    down = LoraDown(source.address, x.shape[1], *x.shape, DTYPES[x.dtype], a.address, adapter, rank, h.address)
    launched(kernels.peftkern_cuda_lora_down(byref(down), None))
    added, factors = (None if part is None else Memory(part) for part in (bias, row_scale))
    epilogue = Epilogue(h=h.address, lora_b=b.address, lora_b_dtype=DTYPES[lora_b.dtype], rank=rank, h_scale=scaling)
    if added is not None and bias is not None:
        epilogue.bias, epilogue.bias_dtype = added.address, DTYPES[bias.dtype]
    if factors is not None:
        epilogue.row_scale = factors.address
    return decode(kernels, x, q, plan, epilogue, device=device), h.tensor()


def assert_near(y: Tensor, wanted: Tensor, q: NF4Weight, x: Tensor) -> None:
    """Within one rounding of y and the codes' rounding: 2^-9 (bf16) or 2^-12 (fp16) of |x| |W|, an average error."""
    rounding = torch.finfo(y.dtype).eps / 2
    magnitude = (x.double() ** 2) @ (nf4_dequantize_reference(q, torch.float64).T ** 2)
    error = (y.double() - wanted).abs()
    assert bool((error <= rounding * (wanted.abs() + 3 * magnitude.sqrt()) + 1e-6).all()), error.max()


PLANS = {
    "one tile": (1, 8, 1, 1 << 20, 1 << 20),
    "two tiles": (2, 8, 1, 1 << 20, 1 << 20),
    "16 warps": (1, 16, 1, 1 << 20, 1 << 20),
    "going round": (1, 8, 1, 1 << 20, 2),
    "two tiles going round": (2, 8, 1, 1 << 20, 1),
    "split": (1, 8, 3, 1, 1 << 20),
}


def plan_of(name: str, q: NF4Weight, rows: int) -> Plan:
    row_tiles, warps, splits, split_groups, ctas = PLANS[name]
    groups = ceil_divide(q.shape[1], 128)
    if splits > 1:
        split_groups = ceil_divide(groups, splits)
        splits = ceil_divide(groups, split_groups)
    row_tiles = row_tiles if rows <= 4 else 1
    tiles = ceil_divide(q.shape[0], 16 * row_tiles)
    return Plan(row_tiles, warps, splits, min(split_groups, groups), min(ctas, tiles))
