"""Inputs for the engine composed of torch's ops, and how near float64 its results are.

A product of the library is rounded to x's dtype, so an element is rounded a few times where the kernels round it once;
ROUNDINGS bounds what these add.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from linear_cases import (
    Inputs,
    assert_near_float64,
    float_tensors,
    linear_inputs,
    lora_inputs,
    random_nf4,
)
from projection_cases import projection_inputs, projections_of, together
from torch import Tensor

import peftkern
from peftkern.ops.bottleneck_adapter import bottleneck_adapter_reference
from peftkern.ops.dora_linear import dora_linear_reference
from peftkern.ops.ia3_linear import ia3_linear_reference
from peftkern.ops.lora_linear import lora_linear_reference
from peftkern.ops.lora_mlp import lora_mlp_reference
from peftkern.ops.lora_qkv import lora_qkv_reference
from peftkern.ops.nf4_linear import nf4_linear_reference

# Of the result and its spread, in units of the dtype's rounding.
ROUNDINGS = 1.0
FP32_SUM = 5e-6
OUT, IN = 7, 33


def random_weight(kind: str, shape: tuple[int, int]) -> Any:
    return random_nf4(shape) if kind == "nf4" else torch.randn(shape).to(getattr(torch, kind))


def composed(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return partial(function, **{"backend": "torch", **options})


def qkv(**inputs: Any) -> Tensor:
    projections = zip(*projections_of({name: value for name, value in inputs.items() if name != "x"}))
    weights, lora_as, lora_bs, scalings, biases = map(list, projections)
    return together(peftkern.lora_qkv(inputs["x"], weights, lora_as, lora_bs, scalings, biases, backend="torch"))


def qkv_reference(**inputs: Any) -> Tensor:
    return together(lora_qkv_reference(inputs["x"], projections_of(inputs)))


def mlp(activation: str = "silu", **inputs: Any) -> Tensor:
    weights, lora_as, lora_bs, scalings, biases = map(list, zip(*projections_of(inputs)))
    adapters = [None if a is None else (a, b, s) for a, b, s in zip(lora_as, lora_bs, scalings)]
    return peftkern.lora_mlp(inputs["x"], *weights, adapters, activation, biases=biases, backend="torch")


def mlp_reference(activation: str = "silu", **inputs: Any) -> Tensor:
    return lora_mlp_reference(inputs["x"], projections_of(inputs), activation)


def dora_inputs(weight: Any, x: Tensor, rank: int, adapter_dtype: torch.dtype, bias_dtype: Any) -> Inputs:
    inputs = lora_inputs(weight, x, rank, adapter_dtype, bias_dtype)
    return {**inputs, "magnitude": (torch.rand(weight.shape[0]) + 0.5) * weight.shape[1] ** 0.5}


def of_op(op: str, kind: str, x: Tensor, out: int, rank: int, adapter_dtype: torch.dtype) -> tuple[Any, Any, Inputs]:
    """The op on this engine, its reference, and inputs."""
    features, dtype = x.shape[-1], x.dtype
    weight = random_weight(kind, (out, features))
    if op == "nf4_linear":
        return composed(peftkern.nf4_linear), nf4_linear_reference, linear_inputs(random_nf4((out, features)), x, dtype)
    if op == "lora_linear":
        return composed(peftkern.lora_linear), lora_linear_reference, lora_inputs(weight, x, rank, adapter_dtype, dtype)
    if op == "dora_linear":
        inputs = dora_inputs(weight, x, rank, adapter_dtype, dtype)
        return composed(peftkern.dora_linear), dora_linear_reference, inputs
    if op in ("ia3_linear", "ia3_linear of inputs"):
        options = {"scale_input": op != "ia3_linear"}
        scale = torch.randn(features if options["scale_input"] else out).to(adapter_dtype)
        inputs = {**linear_inputs(weight, x, dtype), "scale": scale}
        return composed(peftkern.ia3_linear, **options), partial(ia3_linear_reference, **options), inputs
    if op == "bottleneck_adapter":
        shapes = {"down_weight": (rank, features), "down_bias": (rank,), "up_weight": (features, rank)}
        factors = {name: (torch.randn(shape) / rank**0.5).to(adapter_dtype) for name, shape in shapes.items()}
        inputs = {"x": x, **factors, "up_bias": torch.randn(features).to(adapter_dtype), "scaling": torch.tensor(0.7)}
        return composed(peftkern.bottleneck_adapter), bottleneck_adapter_reference, inputs
    inputs = {"x": x}
    for i, size in enumerate((out, out, 9)):
        ins = out if op == "lora_mlp" and i == 2 else features
        of_one = random_weight(kind, (size, ins))
        inputs |= projection_inputs(i, of_one, None if i == 1 else rank, adapter_dtype, dtype if i else None)
    return (qkv, qkv_reference, inputs) if op == "lora_qkv" else (mlp, mlp_reference, inputs)


OPS = (
    *("nf4_linear", "lora_linear", "lora_qkv", "lora_mlp", "dora_linear", "ia3_linear", "ia3_linear of inputs"),
    "bottleneck_adapter",
)


def check(op: str, kind: str, x: Tensor, out: int, rank: int, adapter_dtype: torch.dtype, grad_y: Any = None) -> None:
    function, reference, inputs = of_op(op, kind, x, out, rank, adapter_dtype)
    if grad_y is None:
        grad_y = torch.randn_like(reference(**inputs))
    trains = op in ("lora_linear", "lora_qkv", "lora_mlp")
    weights = tuple(name for name in float_tensors(inputs) if name.startswith("weight"))
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps
    product_error = FP32_SUM if x.dtype == torch.float32 else rounding + FP32_SUM
    frozen = () if trains else weights
    assert_near_float64(
        function, reference, inputs, grad_y, frozen=frozen, through_x=tuple(inputs), product_error=product_error
    )
