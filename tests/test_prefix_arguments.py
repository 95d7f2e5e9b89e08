"""What prefix_attention takes and refuses: an error for each wrong argument, before any work."""

from typing import Any

import pytest
import torch
from prefix_cases import SMALL, inputs_of

from peftkern import explain, prefix_attention
from peftkern._native import ops

GOOD = inputs_of(SMALL)  # [2, 4, 6, 8], two key-value heads, a prefix of 3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
        ({"query": GOOD["query"].int()}, TypeError, "query must be .*, got torch.int32"),
        ({"query": GOOD["query"][0]}, ValueError, r"query must have shape \[batch, heads, .*, got \[4, 6, 8\]"),
        ({"query": GOOD["query"][..., :0]}, ValueError, r"query must have shape .*, got \[2, 4, 6, 0\]"),
        ({"query": GOOD["query"][:, :3]}, ValueError, "query's heads must be a multiple of key's 2, got 3"),
        ({"enable_gqa": False}, ValueError, r"query's heads must be key's 2 \(or set enable_gqa\), got 4"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa must be a bool, got int"),
        ({"key": 1.0}, TypeError, "key must be a Tensor, got float"),
        ({"key": GOOD["key"].bfloat16()}, TypeError, "key must be torch.float32, got torch.bfloat16"),
        ({"key": GOOD["key"][:1]}, ValueError, r"key must have shape \[2, kv_heads, keys, 8\] .*, got \[1, 2, 6, 8\]"),
        ({"key": GOOD["key"][..., :7]}, ValueError, r"key must have shape .*, got \[2, 2, 6, 7\]"),
        ({"key": GOOD["key"].to("meta")}, RuntimeError, "key must be on x's device cpu, got meta"),
        ({"value": GOOD["value"][:, :, :5]}, ValueError, r"value must have key's shape .*, got \[2, 2, 5, 8\]"),
        ({"value": None}, TypeError, "value must be a Tensor, got NoneType"),
        ({"prefix_key": GOOD["prefix_key"][0]}, ValueError, r"prefix_key must have shape \[2, length, 8\] or \[2, 2,"),
        ({"prefix_key": GOOD["prefix_key"][:1]}, ValueError, r"prefix_key must have shape .*, got \[1, 3, 8\]"),
        ({"prefix_key": GOOD["prefix_key"][..., :4]}, ValueError, r"prefix_key must have shape .*, got \[2, 3, 4\]"),
        ({"prefix_key": GOOD["prefix_key"].expand(3, 2, 3, 8)}, ValueError, r"prefix_key .*, got \[3, 2, 3, 8\]"),
        ({"prefix_key": GOOD["prefix_key"].half()}, TypeError, "prefix_key must be torch.float32, got torch.float16"),
        ({"prefix_value": GOOD["prefix_value"][:, :2]}, ValueError, r"prefix_value must have prefix_key's shape"),
        ({"prefix_value": GOOD["prefix_value"].to("meta")}, RuntimeError, "prefix_value must be on .* cpu, got meta"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
        ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
        ({"attn_mask": 1}, TypeError, "attn_mask must be a Tensor, got int"),
        ({"attn_mask": torch.ones(6, 6).int()}, TypeError, "attn_mask must be .*, got torch.int32"),
        ({"attn_mask": torch.ones(6, 9)}, ValueError, r"attn_mask must be broad.* \[2, 4, 6, 6\], got \[6, 9\]"),
        ({"attn_mask": torch.ones(6)}, ValueError, r"attn_mask must be broadcastable .*, got \[6\]"),
        ({"attn_mask": torch.ones(1, 2, 4, 6, 6)}, ValueError, "attn_mask must be broadcastable"),
        ({"attn_mask": torch.ones(6, 6), "is_causal": True}, ValueError, "attn_mask must be None with is_causal"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' needs (tensors on a GPU|triton)"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"prefix_attention: .*{message}"):
        prefix_attention(**{**GOOD, "backend": backend, **change})


def test_float64_needs_the_reference() -> None:
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in GOOD.items()}
    assert prefix_attention(**wide).dtype == torch.float64
    with pytest.raises(RuntimeError, match="takes fp32, bf16 or fp16 on the CPU, got"):
        prefix_attention(**wide, backend="cpu")


def test_meta_tensors() -> None:
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in GOOD.items()}
    assert prefix_attention(**meta).shape == (2, 4, 6, 8)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(2, 4, 6), "query must have shape"),
        (1, torch.ones(2, 2, 6, 7), "key must have shape"),
        (2, torch.ones(2, 2, 5, 8), "value must have shape"),
        (3, torch.ones(2, 3, 7), "prefix_key must have shape .* with key's sizes"),
        (4, torch.ones(2, 4, 8), "prefix_value must have shape"),
        (5, torch.ones(6, 6), "attn_mask must have shape"),
    ],
)
def test_the_native_op_checks_for_itself(index: int, value: torch.Tensor, message: str) -> None:
    arguments: list[Any] = [*list(GOOD.values())[:5], None, False, 0.5]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=f"prefix_attention: {message}"):
        ops.prefix_attention(*arguments)


def test_explain() -> None:
    (record,) = explain(prefix_attention, **GOOD)
    assert (record.op, record.implementation) == ("prefix_attention", "cpu")
