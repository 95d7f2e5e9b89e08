"""prompt_embedding in Triton: embeddings, mask, labels and positions in one launch, the prompt's gradient in another.

Each program counts the prompt's rows before its place, so that nothing is sorted or sized by data. An id out of range
is found on the device (`torch._assert_async`), without waiting for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.ops._triton import launch, rounded

IGNORED_LABEL = tl.constexpr(-100)
COLUMNS, PLACES, BATCH = 1024, 128, 16
GRAD_COLUMNS = 128
# The bytes of a mask are copied, whatever they mean: integers of their size, and 1 as one of them.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ONES = {torch.float32: 0x3F800000, torch.float64: 0x3FF0000000000000, torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


@triton.jit
def _embed(
    out,
    input_ids,
    weight,
    prompt,
    prompt_ids,
    places,
    mask,
    labels,
    positions,
    out_mask,
    out_labels,
    out_positions,
    one,
    tokens,
    rows,
    features,
    weight_stride,
    places_stride,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
):
    length = rows + tokens
    batch = (tl.program_id(0) // length).to(tl.int64)
    at = tl.program_id(0) % length
    if places is None:
        before = tl.minimum(at, rows)
        is_prompt = at < rows
    else:
        before, here = at * 0, at * 0
        for start in range(0, rows, PLACES):
            index = start + tl.arange(0, PLACES)
            place = tl.load(places + batch * places_stride + index, mask=index < rows, other=length)
            before += tl.sum((place < at).to(tl.int32), 0)
            here += tl.sum((place == at).to(tl.int32), 0)
        is_prompt = here > 0
    token = batch * tokens + at - before
    is_token = at < tl.where(is_prompt, 0, length)
    identity = tl.load(input_ids + token, mask=is_token, other=0)
    row = before.to(tl.int64)
    if prompt_ids is not None:
        row += tl.load(prompt_ids + batch) * rows
    to = tl.program_id(0).to(tl.int64)
    for start in range(0, features, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        own_end, token_end = tl.where(is_prompt, features, 0), tl.where(is_prompt, 0, features)
        own = tl.load(prompt + row * features + column, mask=column < own_end, other=0.0).to(tl.float32)
        embedding = tl.load(weight + identity * weight_stride + column, mask=column < token_end, other=0.0)
        value = tl.where(column < own_end, own, embedding.to(tl.float32))
        tl.store(out + to * features + column, rounded(value, out), mask=column < features)
    if mask is not None:
        tl.store(out_mask + to, tl.where(is_prompt, one, tl.load(mask + token, mask=is_token, other=0).to(tl.int64)))
    if labels is not None:
        tl.store(out_labels + to, tl.where(is_prompt, IGNORED_LABEL, tl.load(labels + token, mask=is_token, other=0)))
    if positions is not None:
        # A prompt's row goes on from the token before it; there is none before the first token.
        source = token - tl.where(is_prompt, 1, 0)
        has_source = source >= batch * tokens
        given = tl.load(positions + source, mask=has_source, other=-1)
        tl.store(out_positions + to, given + tl.where(is_prompt, 1, 0) + before)


@triton.jit
def _grad_prompt(
    out,
    grad,
    prompt_ids,
    places,
    batch,
    length,
    rows,
    features,
    batch_stride,
    row_stride,
    column_stride,
    places_stride,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own, row = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    in_columns = column < features
    total = tl.zeros([BATCH, COLUMNS], tl.float32)
    for start in range(0, batch, BATCH):
        sample = start + tl.arange(0, BATCH).to(tl.int64)
        takes_part = sample < batch
        if prompt_ids is not None:
            takes_part = takes_part & (tl.load(prompt_ids + sample, mask=takes_part, other=-1) == own)
        place = row + tl.zeros([BATCH], tl.int64)
        if places is not None:
            place = tl.load(places + sample * places_stride + row, mask=takes_part, other=0)
        address = grad + (sample * batch_stride + place * row_stride)[:, None] + (column * column_stride)[None, :]
        total += tl.load(address, mask=takes_part[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * features + column
    tl.store(out + at, rounded(tl.sum(total, 0), out), mask=in_columns)


def _check_range(name: str, ids: Tensor, count: int) -> None:
    """Raises on the CPU; on a GPU the device does, later, before anything else may be read from it."""
    if ids.numel():
        torch._assert_async(
            ((ids >= 0) & (ids < count)).all(), f"prompt_embedding: {name} must be from 0 to {count - 1}"
        )


def prompt_embedding(
    input_ids: Tensor,
    embedding_weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    prompt_places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    (batch, tokens), (vocabulary, features) = input_ids.shape, embedding_weight.shape
    rows = prompt.shape[-2]
    length = rows + tokens
    _check_range("input_ids", input_ids, vocabulary)
    if prompt_ids is not None:
        _check_range("prompt_ids", prompt_ids, prompt.shape[0])
    if prompt_places is not None:
        _check_range("prompt_places", prompt_places, length)
    weight = embedding_weight if embedding_weight.stride(1) == 1 else embedding_weight.contiguous()
    out = weight.new_empty((batch, length, features))
    given = [None if t is None else t.contiguous() for t in (attention_mask, labels, position_ids)]
    extended = [input_ids.new_empty(0) if t is None else t.new_empty((batch, length)) for t in given]
    bits: Any = [None, None]
    if attention_mask is not None:
        integer = INTEGERS[attention_mask.element_size()]
        bits = [given[0].view(integer), extended[0].view(integer)]  # type: ignore[union-attr]
    launch(
        _embed,
        (batch * length,),
        out,
        input_ids.contiguous(),
        weight,
        prompt.contiguous(),
        None if prompt_ids is None else prompt_ids.contiguous(),
        None if prompt_places is None else prompt_places.contiguous(),
        bits[0],
        *given[1:],
        bits[1],
        *(None if t is None else new for t, new in zip(given[1:], extended[1:])),
        1 if attention_mask is None else ONES.get(attention_mask.dtype, 1),
        tokens,
        rows,
        features,
        weight.stride(0),
        rows if prompt_places is not None and prompt_places.dim() == 2 else 0,
        COLUMNS=COLUMNS,
        PLACES=PLACES,
    )
    return out, *extended  # type: ignore[return-value]


def prompt_embedding_backward(
    grad: Tensor,
    input_ids: Tensor,
    prompt_ids: Tensor | None,
    prompt_places: Tensor | None,
    vocabulary: int,
    prompts: int,
    prompt_dtype: torch.dtype,
    need_weight: bool,
    need_prompt: bool,
) -> tuple[Tensor, Tensor]:
    """The op of this name, see `csrc/ops.cpp`."""
    (batch, length, features), tokens = grad.shape, input_ids.shape[1]
    rows = length - tokens
    places = None if prompt_places is None else prompt_places.contiguous()
    grad_weight = grad.new_empty(0)
    grad_prompt = grad.new_empty((prompts, rows, features) if need_prompt else (0,), dtype=prompt_dtype)
    if need_prompt:
        launch(
            _grad_prompt,
            (prompts * rows, triton.cdiv(features, GRAD_COLUMNS)),
            grad_prompt,
            grad,
            None if prompt_ids is None else prompt_ids.contiguous(),
            places,
            batch,
            length,
            rows,
            features,
            *grad.stride(),
            rows if places is not None and places.dim() == 2 else 0,
            BATCH=BATCH,
            COLUMNS=GRAD_COLUMNS,
        )
    if need_weight:
        # torch's sum over equal ids: sorted, fp32, in an order of its own that is the same every time.
        of_tokens = grad[:, rows:] if places is None else _at_tokens(grad, places, tokens)
        grad_weight = torch.ops.aten.embedding_dense_backward(of_tokens.float(), input_ids, vocabulary, -1, False)
    return grad_weight.to(grad.dtype), grad_prompt


def _at_tokens(grad: Tensor, places: Tensor, tokens: int) -> Tensor:
    """The rows of `grad` [batch, length, features] at the tokens, in order."""
    batch, rows = grad.shape[0], places.shape[-1]
    token = torch.arange(tokens, device=grad.device)
    # Row i, at place q_i, has q_i - i tokens before it.
    before = (places - torch.arange(rows, device=grad.device)).expand(batch, rows).contiguous()
    at = token + torch.searchsorted(before, token.expand(batch, tokens).contiguous(), right=True)
    return grad.gather(1, at.unsqueeze(2).expand(-1, -1, grad.shape[2]))


def configurations() -> None:
    """Every kernel at the tiles and types it ships with; see `recording`."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, prompt_ids = empty(8, 512), empty(8)
    for dtype, features, places in ((torch.bfloat16, 4096, None), (torch.float32, 4095, empty(8, 20))):
        weight, prompt = empty(32000, features, dtype=dtype), empty(3, 20, features, dtype=torch.float32)
        out, *_ = prompt_embedding(ids, weight, prompt, prompt_ids, ids, ids, ids, places)
        prompt_embedding(ids, weight, prompt[0], None, None, None, None, places)
        for own in (prompt_ids, None):
            prompt_embedding_backward(out, ids, own, places, 32000, 3, torch.float32, True, True)
