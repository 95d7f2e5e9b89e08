"""prompt_embedding beside the concatenations of plain torch: one batch, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.bench.contenders import normal, rotate
from peftkern.bench.measure import Run
from peftkern.ops.prompt_embedding import IGNORED_LABEL, prompt_embedding

BATCH, TOKENS, PROMPT_ROWS = 8, 512, 20


def contenders(vocabulary: int, features: int, rotated: int) -> dict[str, Run]:
    """Name -> run(i): embeddings, mask and labels behind a prompt in fp32, and the prompt's gradient."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (BATCH, TOKENS), generator=generator, device="cpu").to(torch.get_default_device())
    mask, labels = torch.ones_like(ids), ids.clone()
    prompt = normal(generator, PROMPT_ROWS, features).requires_grad_()
    grad = normal(generator, BATCH, PROMPT_ROWS + TOKENS, features).bfloat16()

    def build() -> nn.Module:
        table = nn.Embedding(vocabulary, features, device="meta", dtype=torch.bfloat16).to_empty(
            device=torch.get_default_device()
        )
        nn.init.uniform_(table.weight)
        return table.requires_grad_(False)

    def step(forward: Callable[[nn.Embedding], tuple[Any, ...]]) -> Callable[[Any], None]:
        def call(table: nn.Embedding) -> None:
            forward(table)[0].backward(grad)
            prompt.grad = None

        return call

    def ours(table: nn.Embedding) -> tuple[Any, ...]:
        return prompt_embedding(ids, table.weight, prompt, None, mask, labels)

    def theirs(table: nn.Embedding) -> tuple[Tensor, ...]:
        own = prompt.to(table.weight.dtype).expand(BATCH, -1, -1)
        embeds = torch.cat((own, F.embedding(ids, table.weight)), 1)
        longer_mask = torch.cat((mask.new_ones(BATCH, PROMPT_ROWS), mask), 1)
        longer_labels = torch.cat((labels.new_full((BATCH, PROMPT_ROWS), IGNORED_LABEL), labels), 1)
        return embeds, longer_mask, longer_labels

    return {"peftkern": rotate(build, step(ours), rotated), "torch": rotate(build, step(theirs), rotated)}


def work(features: int) -> tuple[float, float]:
    """(bytes, operations): embeddings read and written once, the prompt's part of the gradient read once, in bf16."""
    rows = BATCH * (2 * TOKENS + 2 * PROMPT_ROWS)
    return rows * features * 2.0, float(BATCH * PROMPT_ROWS * features)
