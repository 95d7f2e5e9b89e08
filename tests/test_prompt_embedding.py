"""prompt_embedding against a loop over the places: every dtype, level and layout; gradients, torch's tools, errors."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, assert_same_bits, compile_counting, graph_count, only_level
from torch import Tensor

from peftkern import prompt_embedding
from peftkern._native import ops
from peftkern.ops.prompt_embedding import prompt_embedding_reference

VOCABULARY, FEATURES = 11, 7
# One fp32 sum of up to 100 terms: errors of about 2^-24 * 10, with room.
FP32_SUM = 2e-6
# batch, tokens, prompt rows, features: one, odd, beside a vector's width and beside eight of them, and nothing.
SIZES = ((1, 1, 1, 1), (3, 5, 2, 7), (4, 3, 20, 130), (2, 9, 3, 257), (2, 4, 0, 5), (0, 4, 3, 5), (2, 0, 3, 5))

Inputs = dict[str, Any]
native = partial(prompt_embedding, backend="cpu")


def inputs_of(
    batch: int = 3,
    tokens: int = 5,
    rows: int = 2,
    features: int = FEATURES,
    dtype: torch.dtype = torch.float32,
    prompts: int = 0,
    places: str = "",
) -> Inputs:
    """Arguments; with several prompts to choose from, and places of all samples or of each, if asked for."""
    order = torch.stack([torch.randperm(rows + tokens)[:rows].sort().values for _ in range(max(1, batch))])[:batch]
    chosen = {"": None, "shared": torch.randperm(rows + tokens)[:rows].sort().values, "own": order}[places]
    return {
        "input_ids": torch.randint(VOCABULARY, (batch, tokens)),
        "embedding_weight": torch.randn(VOCABULARY, features).to(dtype),
        "prompt": torch.randn(*([prompts] if prompts else []), rows, features),
        "prompt_ids": torch.randint(prompts, (batch,)) if prompts else None,
        "attention_mask": torch.randint(2, (batch, tokens)),
        "labels": torch.randint(VOCABULARY, (batch, tokens)),
        "position_ids": torch.randint(9, (batch, tokens)),
        "prompt_places": chosen,
    }


def by_loop(inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """What every output and gradient must be, place by place; sums in float64."""
    ids, weight, prompt, places = (inputs[n] for n in ("input_ids", "embedding_weight", "prompt", "prompt_places"))
    (batch, tokens), rows = ids.shape, prompt.shape[-2]
    out = {
        "inputs_embeds": torch.zeros(batch, rows + tokens, weight.shape[1], dtype=weight.dtype),
        **{
            name: torch.zeros(batch, rows + tokens, dtype=inputs[name].dtype)
            for name in ("attention_mask", "labels", "position_ids")
        },
        "prompt": torch.zeros(prompt.shape, dtype=torch.float64),
        "embedding_weight": torch.zeros(weight.shape, dtype=torch.float64),
    }
    for b in range(batch):
        own: Any = ... if inputs["prompt_ids"] is None else int(inputs["prompt_ids"][b])
        at = range(rows) if places is None else (places if places.dim() == 1 else places[b]).tolist()
        row = token = position = 0
        for place in range(rows + tokens):
            if place in at:
                out["inputs_embeds"][b, place] = prompt[own][row].to(weight.dtype)
                out["attention_mask"][b, place] = 1
                out["labels"][b, place] = -100
                out["prompt"][own][row] += grad[b, place]
                row += 1
            else:
                out["inputs_embeds"][b, place] = weight[ids[b, token]]
                out["attention_mask"][b, place] = inputs["attention_mask"][b, token]
                out["labels"][b, place] = inputs["labels"][b, token]
                out["embedding_weight"][ids[b, token]] += grad[b, place]
                position = int(inputs["position_ids"][b, token]) + row
                token += 1
            out["position_ids"][b, place] = position
            position += 1
    return out


def run(function: Any, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("prompt", "embedding_weight")}
    result = function(**{**inputs, **leaves})
    grads = torch.autograd.grad(result.inputs_embeds, tuple(leaves.values()), grad)
    outputs = {name: value.detach() for name, value in result._asdict().items() if value is not None}
    return {**outputs, **dict(zip(leaves, grads))}


def check(inputs: Inputs, grad: Tensor | None = None) -> None:
    batch, tokens = inputs["input_ids"].shape
    weight, prompt = inputs["embedding_weight"], inputs["prompt"]
    if grad is None:
        grad = torch.randn(batch, prompt.shape[-2] + tokens, weight.shape[1]).to(weight.dtype)
    before = {name: value.clone() for name, value in inputs.items() if value is not None}
    expected = by_loop(inputs, grad.double())
    for function in (native, prompt_embedding_reference):
        actual = run(function, inputs, grad)
        assert set(actual) == set(expected)
        for name in ("inputs_embeds", "attention_mask", "labels", "position_ids"):
            assert actual[name].dtype == expected[name].dtype
            assert torch.equal(actual[name], expected[name]), name
        if function is native:
            for name, like in (("prompt", prompt), ("embedding_weight", weight)):
                assert actual[name].dtype == like.dtype and actual[name].shape == like.shape
                # One rounding to the gradient's own dtype.
                limit = torch.finfo(like.dtype).eps / 2 + FP32_SUM
                torch.testing.assert_close(actual[name].double(), expected[name], rtol=limit, atol=10 * FP32_SUM)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written over"


@pytest.mark.parametrize("places", ["", "shared", "own"])
@pytest.mark.parametrize("prompts", [0, 3])
def test_reference_gradients(prompts: int, places: str, seed: int) -> None:
    inputs = inputs_of(prompts=prompts, places=places)

    def function(weight: Tensor, prompt: Tensor) -> Tensor:
        return prompt_embedding_reference(**{**inputs, "embedding_weight": weight, "prompt": prompt}).inputs_embeds

    leaves = [inputs[name].double().requires_grad_() for name in ("embedding_weight", "prompt")]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(isa: str, dtype: torch.dtype, prompts: int, seed: int) -> None:
    with only_level(isa):
        for batch, tokens, rows, features in SIZES:
            for places in ("", "shared", "own"):
                check(inputs_of(batch, tokens, rows, features, dtype, prompts, places))


def test_prefix_is_a_concatenation(seed: int) -> None:
    """What PEFT computes, with position ids, which PEFT drops."""
    inputs = inputs_of()
    ids, weight, prompt = inputs["input_ids"], inputs["embedding_weight"], inputs["prompt"]
    result = native(**inputs)
    ones, ignored = torch.ones(3, 2, dtype=torch.int64), torch.full((3, 2), -100)
    expected = torch.cat((prompt.expand(3, -1, -1), torch.nn.functional.embedding(ids, weight)), 1)
    assert torch.equal(result.inputs_embeds, expected)
    assert torch.equal(result.attention_mask, torch.cat((ones, inputs["attention_mask"]), 1))
    assert torch.equal(result.labels, torch.cat((ignored, inputs["labels"]), 1))
    first = torch.arange(2).expand(3, -1)
    assert torch.equal(result.position_ids, torch.cat((first, inputs["position_ids"] + 2), 1))
    one_row = native(**{**inputs, "position_ids": torch.arange(5)[None]}).position_ids
    assert torch.equal(one_row, torch.arange(7).expand(3, -1))


def test_what_is_not_given_is_none(seed: int) -> None:
    inputs = inputs_of()
    for backend in ("cpu", "reference"):
        result = prompt_embedding(*(inputs[n] for n in ("input_ids", "embedding_weight", "prompt")), backend=backend)
        assert result[1:] == (None, None, None) and result.inputs_embeds.shape == (3, 7, FEATURES)


MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64, *DTYPES)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_masks(dtype: torch.dtype, seed: int) -> None:
    for padding in ([[1, 1, 0]], [[0, 1, 1]]):
        inputs = {**inputs_of(1, 3, 2), "attention_mask": torch.tensor(padding).to(dtype)}
        mask = native(**inputs).attention_mask
        assert mask.dtype == dtype and mask.tolist() == [[1, 1, *padding[0]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Strides of every argument and of the gradient."""
    inputs = inputs_of(dtype=dtype, prompts=3)
    wide = torch.randn(2 * VOCABULARY, FEATURES + 5).to(dtype)
    for weight in (wide[::2, 2 : 2 + FEATURES], torch.randn(FEATURES, VOCABULARY).to(dtype).t()):
        check({**inputs, "embedding_weight": weight})
    for name in ("input_ids", "attention_mask", "labels", "position_ids"):
        strided = torch.stack((inputs[name], inputs[name]), 2).transpose(0, 1).contiguous().transpose(0, 1)[..., 1]
        assert not strided.is_contiguous()
        check({**inputs, name: strided})
    check({**inputs, "prompt": torch.randn(FEATURES, 2, 3).permute(2, 1, 0), "input_ids": inputs["input_ids"].int()})
    check({**inputs, "prompt": inputs["prompt"].to(dtype)})
    grad = torch.randn(3, 7, FEATURES).to(dtype)
    for strided in (grad.transpose(1, 2).contiguous().transpose(1, 2), torch.ones(()).to(dtype).expand(3, 7, FEATURES)):
        check(inputs, strided)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    inputs = inputs_of(33, 40, 24, 513, dtype, prompts=3)
    grad = torch.randn(33, 64, 513).to(dtype)
    results = []
    for threads in (1, 1, 2, 3):
        set_threads(threads)
        results.append(run(native, inputs, grad))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_long_sums_stay_fp32(isa: str, seed: int) -> None:
    """4096 gradients of 1 + 2^-7 in bf16: a bf16 sum would stop at 256."""
    inputs = {**inputs_of(4096, 1, 1, 3, torch.bfloat16), "input_ids": torch.zeros(4096, 1, dtype=torch.int64)}
    actual = run(native, inputs, torch.full((4096, 2, 3), 1.0078125).bfloat16())
    assert torch.equal(actual["prompt"], torch.full((1, 3), 4128.0))
    assert torch.equal(actual["embedding_weight"][0], torch.full((3,), 4128.0).bfloat16())


@pytest.mark.parametrize("needs", [("prompt",), ("embedding_weight",), ("prompt", "embedding_weight"), ()])
def test_only_what_is_asked_for_gets_a_gradient(needs: tuple[str, ...], seed: int) -> None:
    inputs = inputs_of(prompts=2)
    expected = run(native, inputs, torch.ones(3, 7, FEATURES))
    leaves = {name: inputs[name].clone().requires_grad_(name in needs) for name in ("prompt", "embedding_weight")}
    embeds = native(**{**inputs, **leaves}).inputs_embeds
    assert embeds.requires_grad == bool(needs)
    if needs:
        embeds.sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needs)
        assert name not in needs or torch.equal(leaf.grad, expected[name])


def test_only_ids_are_saved(seed: int) -> None:
    inputs = inputs_of(prompts=2, places="own")
    leaves = {name: inputs[name].requires_grad_() for name in ("prompt", "embedding_weight")}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        native(**{**inputs, **leaves})
    assert saved and all(tensor.dtype == torch.int64 for tensor in saved)


@pytest.mark.parametrize("prompts", [0, 2])
def test_opcheck(prompts: int, seed: int) -> None:
    full = inputs_of(prompts=prompts, places="own" if prompts else "")
    leaves = {name: full[name].requires_grad_() for name in ("prompt", "embedding_weight")}
    bare = {**full, "attention_mask": None, "labels": None, "position_ids": None}
    for inputs in (full, bare):
        torch.library.opcheck(ops.prompt_embedding, tuple({**inputs, **leaves}.values()))
    grad = torch.randn(3, 7, FEATURES)
    ids = full["input_ids"], full["prompt_ids"], full["prompt_places"]
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (grad, *ids, VOCABULARY, max(1, prompts), torch.float32, *needs)
        torch.library.opcheck(ops.prompt_embedding_backward, arguments)


@pytest.mark.parametrize("prompts", [0, 2])
def test_compile_without_graph_breaks(prompts: int, seed: int) -> None:
    compiled, graphs = compile_counting(prompt_embedding)
    for batch, tokens in ((3, 5), (4, 6), (5, 9)):
        inputs = inputs_of(batch, tokens, prompts=prompts)
        grad = torch.randn(batch, 2 + tokens, FEATURES)
        assert_same_bits(*(run(function, inputs, grad) for function in (compiled, prompt_embedding)))
    assert graph_count(graphs) == 1


def test_autocast_casts_nothing(seed: int) -> None:
    """As with F.embedding."""
    inputs = inputs_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(native(**inputs).inputs_embeds, native(**inputs).inputs_embeds.float())


def test_double_backward(seed: int) -> None:
    inputs = inputs_of()
    prompt = inputs["prompt"].requires_grad_()
    with pytest.raises(RuntimeError, match="prompt_embedding: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).inputs_embeds.square().sum(), prompt, create_graph=True)
        grad.sum().backward()


def test_meta_tensors(seed: int) -> None:
    inputs = {name: None if value is None else value.to("meta") for name, value in inputs_of(prompts=2).items()}
    result = prompt_embedding(**inputs)
    assert result.inputs_embeds.is_meta and result.inputs_embeds.shape == (3, 7, FEATURES)
    assert [value.shape for value in result[1:]] == [(3, 7)] * 3


GOOD = {
    "input_ids": torch.zeros(3, 5, dtype=torch.int64),
    "embedding_weight": torch.ones(VOCABULARY, FEATURES),
    "prompt": torch.ones(2, FEATURES),
}
LONG = torch.ones(3, 5, dtype=torch.int64)
SEVERAL = {"prompt": torch.ones(4, 2, FEATURES), "prompt_ids": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": [1]}, TypeError, "input_ids must be a Tensor, got list"),
        ({"input_ids": torch.ones(3, 5)}, TypeError, "input_ids must be torch.int64 or torch.int32, got torch.float32"),
        ({"input_ids": torch.ones(3).long()}, ValueError, r"input_ids must have shape \[batch, tokens\], got \[3\]"),
        ({"input_ids": LONG.to("meta")}, RuntimeError, "input_ids must be on embedding_weight's device cpu, got meta"),
        ({"input_ids": LONG * 11}, ValueError, "input_ids must be from 0 to 10, got 11"),
        ({"input_ids": -LONG}, ValueError, "input_ids must be from 0 to 10, got -1"),
        ({"embedding_weight": 1}, TypeError, "embedding_weight must be a Tensor, got int"),
        ({"embedding_weight": torch.ones(3, 4).int()}, TypeError, "embedding_weight must be .*, got torch.int32"),
        ({"embedding_weight": torch.ones(3)}, ValueError, r"embedding_weight must have .*features\], got \[3\]"),
        ({"prompt": None}, TypeError, "prompt must be a Tensor, got NoneType"),
        ({"prompt": torch.ones(2, 7).half()}, TypeError, "prompt must be torch.float32, got torch.float16"),
        ({"prompt": torch.ones(2, 6)}, ValueError, r"prompt must have shape \[rows, 7\], got \[2, 6\]"),
        ({"prompt": torch.ones(4, 2, 7)}, ValueError, r"prompt must have shape \[rows, 7\], got \[4, 2, 7\]"),
        ({**SEVERAL, "prompt": torch.ones(2, 7)}, ValueError, r"prompt must have shape \[prompts, rows, 7\], got"),
        ({**SEVERAL, "prompt_ids": torch.zeros(2).long()}, ValueError, r"prompt_ids must have shape \[3\].*got \[2\]"),
        ({**SEVERAL, "prompt_ids": torch.full((3,), 4)}, ValueError, "prompt_ids must be from 0 to 3, got 4"),
        ({"attention_mask": LONG[:, 1:]}, ValueError, r"attention_mask must have shape \[3, 5\], got \[3, 4\]"),
        ({"attention_mask": LONG[None]}, ValueError, r"attention_mask must have shape \[3, 5\], got \[1, 3, 5\]"),
        ({"labels": LONG.int()}, TypeError, "labels must be torch.int64, got torch.int32"),
        ({"labels": LONG[:2]}, ValueError, r"labels must have shape \[3, 5\], got \[2, 5\]"),
        ({"position_ids": LONG[:2]}, ValueError, r"position_ids must have shape \[3, 5\] or \[1, 5\], got \[2, 5\]"),
        (
            {"prompt_places": torch.tensor([1])},
            ValueError,
            r"prompt_places must have shape \[2\] or \[3, 2\], got \[1\]",
        ),
        ({"prompt_places": torch.tensor([1, 7])}, ValueError, "prompt_places must be from 0 to 6, got 7"),
        ({"prompt_places": torch.tensor([1, 1])}, ValueError, r"prompt_places must be ascending, got \[1, 1\]"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
    ],
)
def test_bad_arguments_raise(change: Inputs, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"prompt_embedding: {message}"):
        prompt_embedding(**{**GOOD, "backend": backend, **change})


def test_native_op_checks_its_arguments() -> None:
    good = (*GOOD.values(), None, None, None, None, None)
    for position, value, message in (
        (0, LONG.int(), "input_ids must be int64, got Int"),
        (0, LONG * 11, "input_ids must be from 0 to 10, got 11"),
        (1, torch.ones(11, 7).double(), "embedding_weight must be fp32, bf16 or fp16, got Double"),
        (2, torch.ones(2, 6), r"prompt must have shape \[..., rows, 7\], got \[2, 6\]"),
        (4, LONG[1:], r"attention_mask must have shape \[3, 5\], got \[2, 5\]"),
        (5, LONG.int(), "labels must be int64, got Int"),
        (6, LONG[:1], r"position_ids must have shape \[3, 5\], got \[1, 5\]"),
        (7, torch.tensor([1, 1]), "prompt_places must be ascending, from 0 to 6"),
        (7, torch.tensor([-1, 1]), "prompt_places must be ascending, from 0 to 6"),
        (7, torch.tensor([1, 7]), "prompt_places must be ascending, from 0 to 6"),
    ):
        with pytest.raises(RuntimeError, match=f"prompt_embedding: {message}"):
            ops.prompt_embedding(*good[:position], value, *good[position + 1 :])
    with pytest.raises(RuntimeError, match="prompt_embedding_backward: grad must have shape"):
        ops.prompt_embedding_backward(torch.ones(3, 7), LONG, None, None, 11, 1, torch.float32, True, True)
