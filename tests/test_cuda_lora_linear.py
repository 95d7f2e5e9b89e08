"""lora_linear for CUDA tensors: its two launches on an emulated device, its backward, and which calls it takes."""

from ctypes import CDLL
from typing import Any

import pytest
import torch
from cuda_decode import assert_near, lora_linear, plan_of
from cuda_emulation import COMPILER, library
from linear_cases import random_nf4
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern
from peftkern import NF4Weight, backends
from peftkern._native import ops
from peftkern.nn import LoRALinear, NF4Linear
from peftkern.ops._linear import native_weight
from peftkern.ops._op import Call
from peftkern.ops.lora_linear import CUDA_ROWS, _backward_on_cuda
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference
from peftkern.ops.nf4_quantize import nf4_quantize_reference

emulated = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels() -> CDLL:
    return library()


def exact(x: Tensor, q: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    wide = x.double()
    low_rank = wide @ lora_a.double().T @ lora_b.double().T
    return wide @ nf4_dequantize_reference(q, torch.float64).T + scaling * low_rank


@emulated
@pytest.mark.parametrize("rows", range(1, CUDA_ROWS + 1))
@pytest.mark.parametrize(
    ("rank", "shape", "nested", "dtype", "adapter_dtypes", "plan"),
    [
        (1, (1, 64), False, torch.bfloat16, (torch.float32, torch.float32), "one tile"),
        (7, (33, 320), True, torch.float16, (torch.float16, torch.float32), "16 warps"),
        (16, (70, 1536), True, torch.bfloat16, (torch.bfloat16, torch.bfloat16), "split"),
        (64, (37, 2112), False, torch.bfloat16, (torch.float32, torch.bfloat16), "two tiles going round"),
    ],
)
def test_forward(
    kernels: CDLL,
    seed: int,
    rank: int,
    shape: tuple[int, int],
    nested: bool,
    dtype: torch.dtype,
    adapter_dtypes: tuple[torch.dtype, torch.dtype],
    plan: str,
    rows: int,
) -> None:
    q = nf4_quantize_reference(torch.randn(shape), 64, nested)
    x = (torch.randn(rows, shape[1]) + 1).to(dtype)
    lora_a, lora_b = (
        torch.randn(rank, shape[1]).to(adapter_dtypes[0]),
        torch.randn(shape[0], rank).to(adapter_dtypes[1]),
    )
    bias = None if rows % 2 else torch.randn(shape[0]).to(dtype)
    y, h = lora_linear(kernels, x, q, lora_a, lora_b, plan_of(plan, q, rows), 0.5, bias)
    torch.testing.assert_close(h, x.float() @ lora_a.float().T, rtol=1e-5, atol=1e-3)
    wanted = exact(x, q, lora_a, lora_b, 0.5)
    assert_near(y, wanted if bias is None else wanted + bias.double(), q, x)


@emulated
@pytest.mark.parametrize("plan", ["one tile", "split"])
def test_all_of_the_epilogue(kernels: CDLL, seed: int, plan: str) -> None:
    """A factor of the weight's rows, as other adapters have it, applies to the low-rank part and not to the bias."""
    q = nf4_quantize_reference(torch.randn(37, 384), 64, True)
    x, lora_a, lora_b = torch.randn(3, 384).to(torch.bfloat16), torch.randn(5, 384), torch.randn(37, 5)
    bias, row_scale = torch.randn(37), torch.rand(37)
    y, _ = lora_linear(kernels, x, q, lora_a, lora_b, plan_of(plan, q, 3), 0.5, bias, row_scale)
    assert_near(y, exact(x, q, lora_a, lora_b, 0.5) * row_scale.double() + bias.double(), q, x)


@emulated
@pytest.mark.parametrize(("device", "overlaps"), [(0, False), (1, True)])
def test_the_decode_overlaps_only_where_its_code_waits(kernels: CDLL, seed: int, device: int, overlaps: bool) -> None:
    """Device 0 runs code of PTX 8.0, as one between the build's architectures does: it would not wait for h."""
    q = nf4_quantize_reference(torch.randn(16, 128), 64, False)
    x = torch.randn(2, 128).to(torch.bfloat16)
    kernels.host_set_device(device)
    try:
        lora_linear(kernels, x, q, torch.randn(7, 128), torch.randn(16, 7), plan_of("one tile", q, 2), device=device)
        assert kernels.host_last_was_programmatic() == overlaps
    finally:
        kernels.host_set_device(0)


@emulated
@pytest.mark.parametrize("change", ["lora_a", "lora_b", "scaling"])
def test_the_comparison_would_notice(kernels: CDLL, seed: int, change: str) -> None:
    q = nf4_quantize_reference(torch.randn(16, 128), 64, False)
    x = torch.randn(2, 128).to(torch.bfloat16)
    right: dict[str, Any] = {"lora_a": torch.randn(7, 128), "lora_b": torch.randn(16, 7), "scaling": 0.5}
    wrong = {**right, change: 0.6 if change == "scaling" else right[change].roll(1, dims=0)}
    y, _ = lora_linear(kernels, x, q, plan=plan_of("one tile", q, 2), **wrong)
    with pytest.raises(AssertionError):
        assert_near(y, exact(x, q, **right), q, x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_backward(seed: int, dtype: torch.dtype, nested: bool) -> None:
    """That for CUDA tensors, of tensors on the CPU: the native op's results within the second rounding of grad_x."""
    q, scaling = random_nf4((70, 192), 64, nested), 0.7
    x, grad_y = torch.randn(2, 3, 192).to(dtype), torch.randn(2, 3, 70).to(dtype)
    lora_a, lora_b = torch.randn(5, 192), torch.randn(70, 5).to(dtype)
    w, wf = native_weight(q)
    _, h = ops.lora_linear(x, w, wf, lora_a, lora_b, scaling, None, 0.0, None)
    inputs = {"grad_y": grad_y, "x": x, "h": h, "w": w, "wf": wf, "lora_a": lora_a, "lora_b": lora_b}
    inputs |= {"scaling": scaling, "dropout_p": 0.0, "seed": None}

    def found(*needs: bool) -> tuple[Tensor, ...]:
        return _backward_on_cuda(Call({**inputs, **dict(zip(("need_x", "need_a", "need_b"), needs))}))

    wanted = ops.lora_linear_backward(*inputs.values(), True, True, True)
    with torch.autocast("cpu"):
        all_found = found(True, True, True)
    for got, like, error in zip(all_found, wanted, (torch.finfo(dtype).eps, 1e-6, torch.finfo(dtype).eps), strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape
        assert (got.double() - like.double()).norm() <= error * like.double().norm()
    for needed in range(3):
        alone = found(*(i == needed for i in range(3)))
        assert torch.equal(alone[needed], found(True, True, True)[needed])
        assert all(gradient.numel() == 0 for i, gradient in enumerate(alone) if i != needed)


class WithCuda:
    """A build that has the kernels."""

    @staticmethod
    def cuda_archs() -> str:
        return "90a"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "caps", WithCuda)


def call(
    rows: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = "cuda",
    columns: int = 192,
    block_size: int = 64,
    dense: bool = False,
    **options: Any,
) -> Tensor:
    """lora_linear of tensors that are on a GPU in name only."""
    q = random_nf4((70, columns), block_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = [
            None if part is None else torch.empty(part.shape, dtype=part.dtype, device="cuda") for part in q.tensors
        ]
        weight = NF4Weight(*parts, q.shape, q.dtype, block_size)  # type: ignore[arg-type]
        x, lora_a, lora_b = (
            torch.empty(shape, dtype=dtype, device="cuda") for shape in ((rows, columns), (7, columns), (70, 7))
        )
        base: Any = torch.empty(70, columns, dtype=dtype, device="cuda") if dense else weight
        return peftkern.lora_linear(x, base, lora_a, lora_b, backend=backend, **options)


@pytest.mark.parametrize("rows", [0, 1, CUDA_ROWS])
@pytest.mark.parametrize("dtype", HALVES)
def test_calls_that_it_takes(built: None, dtype: torch.dtype, rows: int) -> None:
    y = call(rows, dtype, dropout_p=0.1)  # dropout is for training
    assert y.shape == (rows, 70) and y.dtype == dtype and y.device.type == "cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 9}, "takes at most 8 rows of x, got 9"),
        ({"dtype": torch.float32}, "takes bf16 or fp16, got torch.float32"),
        ({"dense": True}, "takes an NF4Weight, got a dense weight"),
        ({"dropout_p": 0.1, "training": True}, "takes no dropout, got dropout_p=0.1"),
        ({"block_size": 32}, "takes weights of .* whole blocks of 64 or more, got 192 in blocks of 32"),
        ({"block_size": 128}, "takes weights of .* whole blocks of 64 or more, got 192 in blocks of 128"),
        ({"columns": 72}, "takes weights of .* whole blocks of 64 or more, got 72 in blocks of 64"),
    ],
)
def test_calls_that_it_refuses(built: None, options: dict[str, Any], message: str) -> None:
    wanted = f"lora_linear: backend 'cuda' {message}; use backend='triton' or 'torch'"
    with pytest.raises(RuntimeError, match=wanted):
        call(**options)


def test_several_adapters_have_no_kernel(built: None) -> None:
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="multi_lora_linear: backend 'cuda' has no kernel for this"),
    ):
        backends.choose("multi_lora_linear", torch.empty(1, dtype=torch.bfloat16, device="cuda"), "cuda")


def test_auto_leaves_what_it_refuses_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "GPU_RECORDS", {"lora_linear": ("cuda", "chip.json")})
    q = random_nf4((70, 192))
    with FakeTensorMode():
        few, many = (torch.empty(rows, 192, dtype=torch.bfloat16, device="cuda") for rows in (8, 9))
    assert backends.choose("lora_linear", few, None, q, 0.0).implementation == "cuda"
    choice = backends.choose("lora_linear", many, None, q, 0.0)
    assert choice == ("torch", "auto: backend 'cuda' takes at most 8 rows of x, got 9", False)


def test_explain_knows(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (
        LoRALinear(nn.Linear(192, 70, dtype=torch.bfloat16)),
        LoRALinear(NF4Linear(192, 70, dtype=torch.bfloat16), dropout=0.1),
    )
    monkeypatch.setenv("PEFTKERN_BACKEND", "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 192, dtype=torch.bfloat16, device="cuda")
        dense, dropping = (peftkern.explain(layer, x)[0] for layer in layers)
        (evaluating,) = peftkern.explain(layers[1].eval(), x)
    assert dense.implementation == "none" and "takes an NF4Weight, got a dense weight" in dense.reason
    assert dropping.implementation == "none" and "takes no dropout, got dropout_p=0.1" in dropping.reason
    assert evaluating.implementation == "cuda"
