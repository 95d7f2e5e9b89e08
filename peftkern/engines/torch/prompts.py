"""prompt_embedding: a prompt in front is concatenation; other places are gathered, as the reference does."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


def prompt_in_front(
    input_ids: Tensor,
    embedding_weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """inputs_embeds, attention_mask, labels and position_ids, each with the prompt's rows before its own."""
    batch, rows = input_ids.shape[0], prompt.shape[-2]
    # Rounded after it is expanded, so that its gradient is widened before it is summed.
    own = prompt.expand(batch, -1, -1) if prompt_ids is None else prompt[prompt_ids]
    embeds = torch.cat((own.to(embedding_weight.dtype), F.embedding(input_ids, embedding_weight)), 1)
    attention_mask = None if attention_mask is None else F.pad(attention_mask, (rows, 0), value=1)
    labels = None if labels is None else F.pad(labels, (rows, 0), value=IGNORED_LABEL)
    if position_ids is not None:
        first = torch.arange(rows, device=input_ids.device, dtype=position_ids.dtype).expand(batch, rows)
        position_ids = torch.cat((first, position_ids + rows), 1)
    return embeds, attention_mask, labels, position_ids
