"""prompt_embedding in Triton against a loop over the places: dtypes, sizes, places, prompts to choose from, errors."""

from typing import Any

import pytest
import torch
from linear_cases import assert_same_bits
from test_prompt_embedding import FP32_SUM, SIZES, by_loop, inputs_of
from torch import Tensor

from peftkern import prompt_embedding
from peftkern.ops._op import NAMESPACES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def results(device: str, inputs: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    leaves = {name: moved[name].detach().requires_grad_() for name in ("prompt", "embedding_weight")}
    result = prompt_embedding(**{**moved, **leaves}, backend="triton")
    grads = torch.autograd.grad(result.inputs_embeds, tuple(leaves.values()), grad.to(device))
    outputs = {name: value.detach().cpu() for name, value in result._asdict().items() if value is not None}
    return {**outputs, **{name: value.cpu() for name, value in zip(leaves, grads)}}


def check(device: str, inputs: dict[str, Any], grad: Tensor | None = None) -> None:
    batch, tokens = inputs["input_ids"].shape
    weight, prompt = inputs["embedding_weight"], inputs["prompt"]
    if grad is None:
        grad = torch.randn(batch, prompt.shape[-2] + tokens, weight.shape[1]).to(weight.dtype)
    expected, actual = by_loop(inputs, grad.double()), results(device, inputs, grad)
    assert set(actual) == set(expected)
    for name in ("inputs_embeds", "attention_mask", "labels", "position_ids"):
        assert actual[name].dtype == expected[name].dtype
        assert torch.equal(actual[name], expected[name]), name
    for name, like in (("prompt", prompt), ("embedding_weight", weight)):
        assert actual[name].dtype == like.dtype and actual[name].shape == like.shape
        # One rounding to the gradient's own dtype.
        rounding = torch.finfo(like.dtype).eps / 2 + FP32_SUM
        error = (actual[name].double() - expected[name]).abs()
        assert (error <= rounding * (expected[name].abs() + 1)).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(device: str, dtype: torch.dtype, seed: int) -> None:
    for size in SIZES:
        check(device, inputs_of(*size, dtype=dtype))


@pytest.mark.parametrize("places", ["", "shared", "own"])
@pytest.mark.parametrize("prompts", [0, 3])
def test_places_and_prompts(device: str, prompts: int, places: str, seed: int) -> None:
    check(device, inputs_of(18, 3, 4, prompts=prompts, places=places))
    if not prompts:
        check(device, inputs_of(1, 3, 130, places=places))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, *DTYPES, torch.float64])
def test_mask_dtypes(device: str, dtype: torch.dtype, seed: int) -> None:
    inputs = inputs_of()
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    check(device, inputs)


def test_strided_inputs(device: str, seed: int) -> None:
    inputs = inputs_of(dtype=torch.float32, places="own", prompts=2)
    grad = torch.randn(7, 3, 7).permute(1, 0, 2)
    for name in ("input_ids", "attention_mask", "labels", "prompt", "prompt_places", "embedding_weight"):
        value = inputs[name]
        inputs[name] = torch.stack((value, value), dim=-1)[..., 0]
        assert not inputs[name].is_contiguous()
    check(device, inputs, grad)
    check(device, inputs, torch.ones(()).expand(3, 7, 7))


def test_nothing_beside_the_ids(device: str, seed: int) -> None:
    inputs = inputs_of() | {"attention_mask": None, "labels": None, "position_ids": None}
    grad = torch.randn(3, 7, 7)
    actual = results(device, inputs, grad)
    assert set(actual) == {"inputs_embeds", "prompt", "embedding_weight"}
    assert_same_bits(results(device, inputs, grad), actual)


def test_opcheck(device: str, seed: int) -> None:
    inputs = [value.to(device) for value in inputs_of(prompts=2, places="own").values()]
    inputs[1].requires_grad_(), inputs[2].requires_grad_()
    torch.library.opcheck(NAMESPACES["triton"].library.prompt_embedding, tuple(inputs))


@pytest.mark.parametrize("name", ["input_ids", "prompt_ids", "prompt_places"])
def test_ids_out_of_range(device: str, name: str, seed: int) -> None:
    """Past the checks of values, as under torch.compile: nothing is read that is not there."""
    if device != "cpu":
        pytest.skip("an assertion on a GPU ends its context")
    inputs = inputs_of(prompts=2, places="own")
    inputs[name].view(-1)[-1] = 100
    with pytest.raises(RuntimeError, match=f"prompt_embedding: {name} must be from 0 to"):
        NAMESPACES["triton"].library.prompt_embedding(*inputs.values())
