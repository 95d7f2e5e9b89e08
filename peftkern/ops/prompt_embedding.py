"""prompt_embedding: token embeddings behind a trained prompt (prompt tuning, arXiv 2104.08691, section 2; P-tuning).

Formula, for sample b with prompt rows P (its own among several where prompt_ids chooses) at the output's places q:
    inputs_embeds[b, q_i] = P_i                 the other places, in order: E[input_ids[b, t]]
    attention_mask: 1 and labels: -100 at q     position_ids: counted on through q, so given ids move by the rows before
    dP = sum over the batch of dinputs_embeds at q, fp32       dE[v] = sum of it over the places of token v, fp32
q is 0..p-1, the prefix, unless `prompt_places` says otherwise (P-tuning's templates, arXiv 2103.10385, section 3).
Saved for backward: ids and shapes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import backends
from peftkern.engines.torch.prompts import IGNORED_LABEL, prompt_in_front
from peftkern.ops._linear import FLOATING
from peftkern.ops._op import NAMESPACES, Op

OP = "prompt_embedding"
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.int64, torch.int32, torch.uint8, torch.bool, *FLOATING)


class PromptedInputs(NamedTuple):
    """What a model is given in place of its input_ids; None where the function was given None."""

    inputs_embeds: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None


def prompt_embedding_reference(
    input_ids: Tensor,
    embedding_weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    prompt_places: Tensor | None = None,
) -> PromptedInputs:
    """`prompt_embedding` in plain torch, differentiable; sums the prompt's gradient in the prompt's own dtype."""
    batch, tokens = input_ids.shape
    rows = prompt.shape[-2]
    # Rounded after it is expanded, so that its gradient is widened before it is summed.
    own = (prompt.expand(batch, -1, -1) if prompt_ids is None else prompt[prompt_ids.long()]).to(embedding_weight.dtype)
    both = torch.cat((own, F.embedding(input_ids, embedding_weight)), dim=1)
    places = torch.arange(rows, device=input_ids.device) if prompt_places is None else prompt_places.long()
    is_prompt = torch.zeros(batch, rows + tokens, dtype=torch.int64, device=input_ids.device)
    is_prompt = is_prompt.scatter(1, places.expand(batch, rows), 1)
    is_token = 1 - is_prompt
    # How many of each kind stand before a place.
    rows_before = is_prompt.cumsum(1) - is_prompt
    tokens_before = is_token.cumsum(1) - is_token
    source = torch.where(is_prompt.bool(), rows_before, rows + tokens_before)

    def extended(values: Tensor | None, fill: int) -> Tensor | None:
        if values is None:
            return None
        return torch.cat((values.new_full((batch, rows), fill), values), dim=1).gather(1, source)

    if position_ids is not None:
        # starts[t]: the position after token t - 1, where a prompt row goes on.
        starts = F.pad(position_ids.expand(batch, tokens) + 1, (1, 0))
        position_ids = starts.gather(1, tokens_before + is_token) - is_token + rows_before
    return PromptedInputs(
        both.gather(1, source.unsqueeze(2).expand(-1, -1, both.shape[2])),
        extended(attention_mask, 1),
        extended(labels, IGNORED_LABEL),
        position_ids,
    )


def prompt_embedding(
    input_ids: Tensor,
    embedding_weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    prompt_places: Tensor | None = None,
    *,
    backend: str | None = None,
) -> PromptedInputs:
    """Token embeddings with a prompt before them, mask, labels and positions to match (prompt tuning, 2104.08691).

    Args:
        input_ids: [batch, tokens], int64 or int32. Padding may be on either side; the mask alone says where.
        embedding_weight: [vocabulary, features], fp32, bf16, fp16 on the kernels; float64 on the reference.
        prompt: [rows, features] for the whole batch, or [prompts, rows, features] of which prompt_ids chooses. fp32 or
            embedding_weight's dtype, to which it is rounded once. No rows are allowed.
        prompt_ids: [batch], int64 or int32: which prompt each sample gets.
        attention_mask: [batch, tokens] of any real dtype; ones for the prompt are put in.
        labels: [batch, tokens], int64; -100, which cross entropy ignores, is put in.
        position_ids: [batch, tokens] or [1, tokens], int64, as without the prompt. Its rows are counted in: a prefix
            gets 0 to rows - 1, and the given ones move by rows.
        prompt_places: [rows] or [batch, rows], int64 or int32, ascending: where in the output the prompt's rows go (the
            templates of P-tuning, arXiv 2103.10385); by default first.
        backend: "reference", "torch", "cpu" or "triton"; by default the fastest that runs.

    Returns:
        PromptedInputs(inputs_embeds, attention_mask, labels, position_ids), each [batch, rows + tokens, ...];
        inputs_embeds in embedding_weight's dtype, differentiable in prompt and embedding_weight, the others in their
        own dtypes, or None where none were given.

    Raises:
        TypeError, ValueError, RuntimeError: wrong types, shapes, ids or devices, or a backend that cannot run them.
            Under torch.compile an id out of range is a RuntimeError, as it is found later.
    """
    _check(input_ids, embedding_weight, prompt, prompt_ids, attention_mask, labels, position_ids, prompt_places)
    batch = input_ids.shape[0]
    input_ids = input_ids.long()
    prompt_ids = None if prompt_ids is None else prompt_ids.long()
    prompt_places = None if prompt_places is None else prompt_places.long()
    position_ids = None if position_ids is None else position_ids.expand(batch, -1)
    inputs = input_ids, embedding_weight, prompt, prompt_ids, attention_mask, labels, position_ids, prompt_places
    implementation = backends.choose(OP, embedding_weight, backend).implementation
    if implementation == "torch" and prompt_places is None:
        return PromptedInputs(*prompt_in_front(*inputs[:-1]))
    if implementation in ("reference", "torch"):  # other places: the reference gathers, in the embedding's dtype
        return prompt_embedding_reference(*inputs)
    embeds, mask, targets, positions = NAMESPACES[implementation].prompt_embedding(*inputs)
    return PromptedInputs(
        embeds,
        None if attention_mask is None else mask,
        None if labels is None else targets,
        None if position_ids is None else positions,
    )


def _check(
    input_ids: Any,
    embedding_weight: Any,
    prompt: Any,
    prompt_ids: Any,
    attention_mask: Any,
    labels: Any,
    position_ids: Any,
    prompt_places: Any,
) -> None:
    """Raises unless the arguments fit together."""
    if not isinstance(embedding_weight, Tensor):
        raise TypeError(f"{OP}: embedding_weight must be a Tensor, got {type(embedding_weight).__name__}")
    device, dtype = embedding_weight.device, embedding_weight.dtype
    _check_tensor("embedding_weight", embedding_weight, FLOATING, device, ("vocabulary", "features"))
    _check_tensor("input_ids", input_ids, INTEGERS, device, ("batch", "tokens"))
    (batch, tokens), (vocabulary, features) = input_ids.shape, embedding_weight.shape
    prompt_dtypes = (torch.float32,) if dtype == torch.float32 else (torch.float32, dtype)
    if prompt_ids is None:
        _check_tensor("prompt", prompt, prompt_dtypes, device, ("rows", features))
    else:
        _check_tensor("prompt", prompt, prompt_dtypes, device, ("prompts", "rows", features))
        _check_tensor("prompt_ids", prompt_ids, INTEGERS, device, (batch,))
        _check_range("prompt_ids", prompt_ids, prompt.shape[0])
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, MASKS, device, (batch, tokens))
    if labels is not None:
        _check_tensor("labels", labels, (torch.int64,), device, (batch, tokens))
    if position_ids is not None:
        _check_tensor("position_ids", position_ids, (torch.int64,), device, (batch, tokens), (1, tokens))
    _check_range("input_ids", input_ids, vocabulary)
    if prompt_places is not None:
        rows = prompt.shape[-2]
        _check_tensor("prompt_places", prompt_places, INTEGERS, device, (rows,), (batch, rows))
        _check_range("prompt_places", prompt_places, rows + tokens)
        if _has_values(prompt_places) and not (prompt_places.diff(dim=-1) > 0).all():
            raise ValueError(f"{OP}: prompt_places must be ascending, got {prompt_places.tolist()}")


def _check_tensor(
    name: str, value: Any, dtypes: tuple[torch.dtype, ...], device: torch.device, *shapes: tuple[int | str, ...]
) -> None:
    """`value` is a tensor of one of `dtypes` and `shapes`, in which a word stands for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{OP}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{OP}: {name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.device != device:
        raise RuntimeError(f"{OP}: {name} must be on embedding_weight's device {device}, got {value.device}")
    # Size by size, and text for the error alone: a trace would take both as a reason to fix the sizes.
    if not any(
        len(shape) == value.dim() and all(isinstance(b, str) or a == b for a, b in zip(value.shape, shape))
        for shape in shapes
    ):
        wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"{OP}: {name} must have shape {wanted}, got {list(value.shape)}")


def _has_values(ids: Tensor) -> bool:
    """Whether reading them costs nothing: neither traced, nor on a device that would have to be waited for."""
    return not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel() > 0


def _check_range(name: str, ids: Tensor, count: int) -> None:
    if _has_values(ids):
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= count:
            raise ValueError(f"{OP}: {name} must be from 0 to {count - 1}, got {low if low < 0 else high}")


def _fake(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, weight = call.input_ids, call.embedding_weight
    batch, length = ids.shape[0], call.prompt.shape[-2] + ids.shape[1]
    mask, targets, positions = (
        ids.new_empty(0) if values is None else values.new_empty((batch, length))
        for values in (call.attention_mask, call.labels, call.position_ids)
    )
    return weight.new_empty((batch, length, weight.shape[1])), mask, targets, positions


def _fake_backward(call: Any) -> tuple[Tensor, Tensor]:
    grad = call.grad
    features, rows = grad.shape[2], grad.shape[1] - call.input_ids.shape[1]
    return (
        grad.new_empty((call.vocabulary, features) if call.need_weight else (0,)),
        grad.new_empty((call.prompts, rows, features) if call.need_prompt else (0,), dtype=call.prompt_dtype),
    )


def _backward(run: Any, call: Any, needs: Any, grad: Tensor) -> dict[str, Any]:
    need_weight, need_prompt = needs.embedding_weight, needs.prompt
    grad_weight, grad_prompt = run(
        grad=grad,
        vocabulary=call.embedding_weight.shape[0],
        prompts=1 if call.prompt_ids is None else call.prompt.shape[0],
        prompt_dtype=call.prompt.dtype,
        need_weight=need_weight,
        need_prompt=need_prompt,
    )
    return {"embedding_weight": grad_weight, "prompt": grad_prompt.view(call.prompt.shape) if need_prompt else None}


Op(
    OP,
    _fake,
    _backward,
    ("input_ids", "prompt_ids", "prompt_places"),
    _fake_backward,
    triton="prompt_embedding_triton",
)
