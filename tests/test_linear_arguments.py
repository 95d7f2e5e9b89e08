"""What the linear ops take and refuse: F.linear on an NF4Weight, meta tensors, and an error for each wrong argument."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import lora_inputs, random_nf4

from peftkern import lora_linear, nf4_linear
from peftkern._native import ops
from peftkern.ops._linear import native_weight

OUT, IN = 7, 33
NF4 = random_nf4((OUT, IN), 32)


def test_functional_linear(isa: str, seed: int) -> None:
    weight, x, bias = random_nf4((OUT, IN)), torch.randn(3, IN), torch.randn(OUT)
    assert torch.equal(F.linear(x, weight, bias), nf4_linear(x, weight, bias))  # type: ignore[arg-type]
    assert torch.equal(F.linear(x, weight), nf4_linear(x, weight))  # type: ignore[arg-type]
    assert torch.equal(F.linear(input=x, weight=weight, bias=bias), nf4_linear(x, weight, bias))  # type: ignore


@pytest.mark.parametrize("function", [torch.matmul, torch.add, torch.Tensor.mul, F.embedding])
def test_other_functions_name_dequantize(function: Any) -> None:
    with pytest.raises(TypeError, match=r"NF4Weight: .*dequantize\(\)"):
        function(torch.ones(3, IN), random_nf4((OUT, IN)))


def test_nf4_meta_tensors() -> None:
    y = nf4_linear(torch.randn(2, 3, IN).to("meta"), random_nf4((OUT, IN)).to("meta"))
    assert y.device.type == "meta" and y.shape == (2, 3, OUT)


GOOD_NF4 = {"x": torch.ones(3, IN), "weight": NF4, "bias": torch.ones(OUT), "backend": None}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(3, IN).int()}, TypeError, "x must be .*, got torch.int32"),
        ({"x": torch.ones(3, IN + 1)}, ValueError, r"x must have shape \[..., 33\] .*, got \[3, 34\]"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \[..., 33\] .*, got \[\]"),
        ({"x": torch.ones(3, IN, device="meta")}, RuntimeError, "weight must be on x's device meta, got cpu"),
        ({"weight": torch.ones(OUT, IN)}, TypeError, "weight must be an NF4Weight, got Tensor"),
        ({"weight": NF4.to("meta")}, RuntimeError, "weight must be on x's device cpu, got meta"),
        ({"weight": replace(NF4, codes=NF4.codes[1:])}, (ValueError, RuntimeError), "codes must .*116 elements"),
        ({"weight": replace(NF4, codes=NF4.codes.int())}, (TypeError, RuntimeError), "codes must be"),
        ({"weight": replace(NF4, absmax=NF4.absmax[1:])}, (ValueError, RuntimeError), "absmax must .*8 elements"),
        (
            {"weight": replace(NF4, absmax=NF4.absmax.to("meta"))},
            RuntimeError,
            "absmax must be on .*(cpu|CPU)",
        ),
        ({"weight": replace(NF4, offset=None)}, (ValueError, RuntimeError), "must be given together"),
        ({"weight": replace(NF4, block_size=48)}, (ValueError, RuntimeError), "block_size must be .*, got 48"),
        ({"weight": replace(NF4, shape=torch.Size((OUT * IN,)))}, ValueError, r"must .* \[out, in\], got \[231\]"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
        ({"bias": torch.ones(OUT).int()}, TypeError, "bias must be .*, got torch.int32"),
        ({"bias": torch.ones(OUT + 1)}, ValueError, r"bias must have shape \[7\] .*, got \[8\]"),
        ({"bias": torch.ones(OUT, 1)}, ValueError, r"bias must have shape \[7\] .*, got \[7, 1\]"),
        ({"bias": torch.ones(OUT, device="meta")}, RuntimeError, "bias must be on x's device cpu, got meta"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' needs (tensors on a GPU|triton)"),
        (
            {"x": torch.ones(3, IN).double(), "backend": "cpu"},
            RuntimeError,
            "backend 'cpu' takes fp32, bf16 or fp16 on the CPU, got torch.float64",
        ),
    ],
)
def test_bad_nf4_arguments_raise(change: dict[str, Any], error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"nf4_(linear|dequantize): .*{message}"):
        nf4_linear(**{**GOOD_NF4, "backend": backend, **change})


def test_a_bias_that_the_kernels_lack(isa: str) -> None:
    with pytest.raises(RuntimeError, match="nf4_linear: bias must be fp32, bf16 or fp16, got Double"):
        nf4_linear(torch.ones(3, IN), NF4, torch.ones(OUT).double())


def test_native_nf4_op_checks_its_arguments() -> None:
    codes, absmax, _, _, _ = NF4.tensors
    w, wf = native_weight(NF4)
    x, bias, grad_y = torch.ones(3, IN), torch.ones(OUT), torch.ones(3, OUT)
    for change, message in (
        ({"x": x.double()}, "x must be fp32, bf16 or fp16, got Double"),
        ({"x": x[0, 0]}, r"x must have shape \[..., features\], got \[\]"),
        ({"x": x[:, :31]}, r"x must have shape \[..., 33\], got \[3, 31\]"),
        ({"w": [codes[1:], *w[1:]]}, "codes must be Byte with 116 elements, got Byte with 115"),
        ({"w": [codes.float(), *w[1:]]}, "codes must be Byte with 116 elements, got Float"),
        ({"w": [codes, absmax[1:], *w[2:]]}, "absmax must be Byte with 8 elements, got Byte with 7"),
        ({"w": [codes, absmax.float(), *w[2:]]}, "absmax must be Byte with 8 elements, got Float"),
        ({"w": [*w[:2], torch.ones(2), *w[3:]]}, "nested_absmax must be Float with 1 elements"),
        ({"w": [*w[:3], torch.ones(255), w[4]]}, "nested_quant_map must be Float with 256 elements"),
        ({"w": [*w[:4], torch.ones(2)]}, "offset must be Float with 1 elements"),
        ({"w": w[:4]}, "w must have 5 tensors for weight 0, got 4"),
        ({"w": w[:4], "wf": [*wf[:4], 4]}, "nested_absmax, nested_quant_map and offset must be given together"),
        ({"w": w[:1], "wf": [*wf[:4], 1]}, "absmax is missing"),
        ({"wf": wf[:4]}, "wf must have 5 entries, got 4"),
        ({"wf": [*wf, *wf]}, "wf must have 5 entries, got 10"),
        ({"wf": [7, *wf[1:]]}, "wf has an unknown format, 7"),
        ({"wf": [1, 48, *wf[2:]]}, "block_size must be a power of two from 32 to 4096, got 48"),
        ({"wf": [1, 8192, *wf[2:]]}, "block_size must be a power of two from 32 to 4096, got 8192"),
        ({"wf": [1, -32, *wf[2:]]}, "block_size must be a power of two from 32 to 4096, got -32"),
        ({"w": w[:1], "wf": [0, 0, OUT, IN, 1]}, r"weight must have shape \[7, 33\], got \[116, 1\]"),
        ({"wf": [1, 32, OUT + 1, IN, 5]}, "codes must be Byte with 132 elements"),
        ({"wf": [1, 32, -OUT, -IN, 5]}, r"weight must have a shape that is not negative, got \[-7, -33\]"),
        ({"bias": bias[1:]}, r"bias must have shape \[7\], got \[6\]"),
        ({"bias": bias.int()}, "bias must be fp32, bf16 or fp16, got Int"),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_linear: {message}"):
            ops.nf4_linear(**{"x": x, "w": w, "wf": wf, "bias": bias, **change})
    for arguments, message in (
        ((grad_y.double(), w, wf), "grad_y must be fp32, bf16 or fp16, got Double"),
        ((grad_y[:, 1:], w, wf), r"grad_y must have shape \[..., 7\], got \[3, 6\]"),
        ((grad_y, w, [*wf[:3], IN + 1, 5]), "codes must be Byte with 119 elements"),
    ):
        with pytest.raises(RuntimeError, match=f"nf4_linear_backward: {message}"):
            ops.nf4_linear_backward(*arguments)


def test_lora_meta_tensors(seed: int) -> None:
    inputs = lora_inputs(random_nf4((OUT, IN)), torch.randn(5, IN), bias_dtype=torch.float32)
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    for options in ({}, {"dropout_p": 0.5, "training": True}):
        y = lora_linear(**inputs, **options)
        assert y.device.type == "meta" and y.shape == (5, OUT)


GOOD_LORA = {
    "x": torch.ones(3, IN),
    "weight": NF4,
    "lora_a": torch.ones(2, IN),
    "lora_b": torch.ones(OUT, 2),
    "scaling": 1.0,
    "bias": torch.ones(OUT),
    "dropout_p": 0.5,
    "training": True,
}
BAD_LORA = [
    ("x", None, TypeError, "must be a Tensor, got NoneType"),
    ("x", torch.ones(3, IN).bool(), TypeError, "must be .*, got torch.bool"),
    ("x", torch.ones(IN, 3), ValueError, r"must have shape \[..., 33\] .*, got \[33, 3\]"),
    ("weight", "nf4", TypeError, "must be a Tensor or NF4Weight, got str"),
    ("weight", torch.ones(OUT, IN).int(), TypeError, "must be .*, got torch.int32"),
    ("weight", torch.ones(1, OUT, IN), ValueError, r"must have shape \[out, in\], got \[1, 7, 33\]"),
    ("weight", torch.ones(OUT, IN, device="meta"), RuntimeError, "must be on x's device cpu, got meta"),
    ("lora_a", None, TypeError, "must be a Tensor, got NoneType"),
    ("lora_a", torch.ones(2, IN).half(), TypeError, "must be torch.float32.*, got torch.float16"),
    ("lora_a", torch.ones(IN, 2), ValueError, r"must have shape \[rank, 33\], got \[33, 2\]"),
    ("lora_a", torch.ones(IN), ValueError, r"must have shape \[rank, 33\], got \[33\]"),
    ("lora_a", torch.ones(2, IN, device="meta"), RuntimeError, "must be on x's device cpu, got meta"),
    ("lora_b", 2.0, TypeError, "must be a Tensor, got float"),
    ("lora_b", torch.ones(OUT, 2).double(), TypeError, "must be torch.float32.*, got torch.float64"),
    ("lora_b", torch.ones(OUT, 3), ValueError, r"must have shape \[7, 2\] .*, got \[7, 3\]"),
    ("lora_b", torch.ones(2, OUT), ValueError, r"must have shape \[7, 2\] .*, got \[2, 7\]"),
    ("lora_b", torch.ones(OUT, 2, device="meta"), RuntimeError, "must be on x's device cpu, got meta"),
    ("scaling", torch.ones(2), ValueError, r"must be a number or a 0-d tensor, got shape \[2\]"),
    ("scaling", torch.ones((), device="meta"), RuntimeError, "must be on x's device cpu, got meta"),
    ("scaling", "2", TypeError, "must be a number or a 0-d tensor, got str"),
    ("scaling", None, TypeError, "must be a number or a 0-d tensor, got NoneType"),
    ("scaling", torch.tensor(1j), TypeError, "must be .*, got torch.complex64"),
    ("bias", 0.0, TypeError, "must be a Tensor, got float"),
    ("bias", torch.ones(IN), ValueError, r"must have shape \[7\] .*, got \[33\]"),
    ("bias", torch.ones(OUT, device="meta"), RuntimeError, "must be on x's device cpu, got meta"),
    ("dropout_p", -0.1, ValueError, "must be from 0 to 1, got -0.1"),
    ("dropout_p", 1.1, ValueError, "must be from 0 to 1, got 1.1"),
    ("dropout_p", float("nan"), ValueError, "must be from 0 to 1, got nan"),
    ("dropout_p", "0.5", TypeError, "must be a number.*, got str"),
    ("backend", "gpu", ValueError, "must be one of .*, got 'gpu'"),
    ("backend", "cuda", RuntimeError, "'cuda' (is not part of this build|needs tensors on a CUDA)"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_LORA)
def test_bad_lora_arguments_raise(name: str, value: Any, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"lora_linear: {name} {message}"):
        lora_linear(**{**GOOD_LORA, "backend": backend, name: value})


def test_float64_is_not_for_the_kernels(seed: int) -> None:
    inputs = lora_inputs(torch.randn(OUT, IN), torch.randn(3, IN), bias_dtype=torch.float32)
    values = {name: value.double() for name, value in inputs.items()}
    assert lora_linear(**values).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"lora_linear: backend 'cpu' takes .* on the CPU, got torch.float64"):
        lora_linear(**values, backend="cpu")
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=f"lora_linear: {name} must be fp32, bf16 or fp16, got Double"):
            lora_linear(**{**inputs, name: values[name]})


def test_native_lora_op_checks_its_arguments() -> None:
    x, dense, lora_a, lora_b = torch.ones(3, IN), torch.ones(OUT, IN), torch.ones(2, IN), torch.ones(OUT, 2)
    w, wf = native_weight(NF4)
    dense_w, dense_wf = native_weight(dense)
    good = {"x": x, "w": w, "wf": wf, "lora_a": lora_a, "lora_b": lora_b, "scaling": 1.0, "bias": torch.ones(OUT)}
    good |= {"dropout_p": 0.0, "seed": None}
    for change, message in (
        ({"x": x.double()}, "x must be fp32, bf16 or fp16, got Double"),
        ({"x": x[:, 1:]}, r"x must have shape \[..., 33\], got \[3, 32\]"),
        ({"w": [NF4.codes[1:], *w[1:]]}, "codes must be Byte with 116 elements, got Byte with 115"),
        ({"w": w[:1]}, "w must have 5 tensors for weight 0, got 1"),
        ({"wf": [1, 48, *wf[2:]]}, "block_size must be a power of two from 32 to 4096, got 48"),
        ({"w": dense_w, "wf": [0, 0, OUT + 1, IN, 1]}, r"weight must have shape \[8, 33\], got \[7, 33\]"),
        ({"lora_a": lora_a.double()}, "lora_a must be fp32, bf16 or fp16, got Double"),
        ({"lora_a": lora_a[:, 1:]}, r"lora_a must have shape \[rank, 33\], got \[2, 32\]"),
        ({"lora_b": lora_b[1:]}, r"lora_b must have shape \[7, 2\], got \[6, 2\]"),
        ({"bias": torch.ones(OUT + 1)}, r"bias must have shape \[7\], got \[8\]"),
        ({"dropout_p": 2.0}, "dropout_p must be from 0 to 1, got 2"),
    ):
        with pytest.raises(RuntimeError, match=f"lora_linear: {message}"):
            ops.lora_linear(**{**good, **change})
    del good["bias"]
    good |= {"grad_y": torch.ones(3, OUT), "h": torch.ones(3, 2), "w": dense_w, "wf": dense_wf}
    good |= {"need_x": True, "need_a": True, "need_b": True}
    for change, message in (
        ({"grad_y": torch.ones(3, OUT + 1)}, r"grad_y must have shape \[..., 7\], got \[3, 8\]"),
        ({"grad_y": torch.ones(2, OUT)}, r"x must have shape .*grad_y's rows, got \[3, 33\]"),
        ({"x": x[:, 1:]}, r"x must have shape \[..., 33\], got \[3, 32\]"),
        ({"h": torch.ones(3, 3)}, r"h must have shape \[rows, rank\], got \[3, 3\]"),
        ({"h": torch.ones(2, 2)}, r"h must have shape \[rows, rank\], got \[2, 2\]"),
        ({"h": torch.ones(3, 2).double()}, "h must be fp32, bf16 or fp16, got Double"),
        ({"lora_b": lora_b[1:]}, r"lora_b must have shape \[7, 2\], got \[6, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=f"lora_linear_backward: {message}"):
            ops.lora_linear_backward(**{**good, **change})
