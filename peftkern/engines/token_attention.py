"""torch's attention over the tokens of prefix_attention, forward with its log-sum-exp and backward by a joint one.

Flash attention where it runs, else the memory-efficient one, which takes masks and fp32; both give natural logarithms.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
# Their rows begin at multiples of 16 bytes, and log-sum-exps of the memory-efficient attention at multiples of 32 rows.
HEAD_STEP, MASK_STEP, LSE_STEP = 8, 16, 32
# No score makes up for these, and scores that they are added to, times log2(e), are still finite.
HIDDEN = {torch.float32: -1e30, torch.bfloat16: -1e30, torch.float16: -6e4}


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """Which attention of torch's runs: "cpu", "flash" or "efficient"."""
    kind = query.device.type
    if kind == "cpu":
        return "cpu"
    if kind == "meta":  # whose launches are recorded, not run
        return "flash" if mask is None and query.dtype != torch.float32 else "efficient"
    params = torch.backends.cuda.SDPAParams(query, key, value, mask, 0.0, is_causal, query.shape[1] != key.shape[1])
    if mask is None and torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "efficient"


class TokenAttention:
    """The arguments as torch's kernels take them: aligned heads, and keys for each head where none share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> None:
        self.head_dim = query.shape[3]
        aligned = (self._aligned(t) for t in (query, key, value))
        self.query, self.key, self.value = aligned
        self.kernel = _kernel(self.query, self.key, self.value, mask, is_causal)
        self.group = 1
        if self.kernel != "flash":
            self.group = query.shape[1] // key.shape[1]
            self.key, self.value = (t.repeat_interleave(self.group, 1) for t in (self.key, self.value))
        self.mask = None if mask is None else self._addend(mask)
        self.is_causal = is_causal
        self.scale = scale

    def _aligned(self, heads: Tensor) -> Tensor:
        """With zeros where the heads are too short for torch's kernels, and the last dimension dense."""
        if missing := -heads.shape[3] % HEAD_STEP:
            return F.pad(heads, (0, missing))
        return heads if heads.stride(3) == 1 else heads.contiguous()

    def _addend(self, mask: Tensor) -> Tensor:
        """Clamped where it is broadcast from, and with rows that begin where the kernels want them."""
        if self.kernel == "cpu":
            return mask
        dtype = self.query.dtype
        small = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride()[:3])]
        small = small.to(dtype).clamp(min=HIDDEN[dtype])
        keys = small.shape[3]
        return F.pad(small, (0, -keys % MASK_STEP))[..., :keys].expand(mask.shape)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output and its log-sum-exp [batch, heads, queries]."""
        inputs = self.query, self.key, self.value
        if self.kernel == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, 0.0, self.is_causal, attn_mask=self.mask, scale=self.scale
            )
        elif self.kernel == "flash":
            out, lse, *_ = aten._scaled_dot_product_flash_attention(*inputs, 0.0, self.is_causal, scale=self.scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(
                *inputs, self.mask, True, 0.0, self.is_causal, scale=self.scale
            )
        return out[..., : self.head_dim], lse[..., : self.query.shape[2]]

    def backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens' part of the gradients of query, key and value, by the joint output and log-sum-exp."""
        inputs: Any = (self._aligned(grad_out), self.query, self.key, self.value)
        out = self._aligned(out)
        if self.kernel == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *inputs, out, lse, 0.0, self.is_causal, attn_mask=self.mask, scale=self.scale
            )
        elif self.kernel == "flash":
            random = torch.zeros(2, dtype=torch.int64, device=out.device)  # of dropout, which there is none of
            sizes = (None, None, self.query.shape[2], self.key.shape[2])
            grads = aten._scaled_dot_product_flash_attention_backward(
                *inputs, out, lse, *sizes, 0.0, self.is_causal, random, random, scale=self.scale
            )
        else:
            random = torch.zeros((), dtype=torch.int64, device=out.device)
            lse = F.pad(lse, (0, -lse.shape[2] % LSE_STEP), value=torch.inf)
            needs = [True, True, True, False]
            *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
                *inputs, self.mask, out, lse, random, random, 0.0, needs, self.is_causal, scale=self.scale
            )
        grad_query, *others = (grad[..., : self.head_dim] for grad in grads)
        grad_key, grad_value = (
            grad.unflatten(1, (-1, self.group)).sum(2) if self.group > 1 else grad for grad in others
        )
        return grad_query, grad_key, grad_value
