"""What a training step of one adapted layer costs on a GPU, predicted: this library against stock PEFT.

Counted on fake CUDA tensors (benchmarks/fake_cuda.py): launches, bytes moved, operations, bytes saved for backward, and
a roofline's time. Nothing is measured, and no GPU is needed.

    python -m benchmarks.gpu_prediction --output benchmarks/results/gpu/predicted.json --update docs/gpu-prediction.md
"""

from benchmarks import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import argparse  # noqa: E402 -- torch comes after the fake device
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROWS, FEATURES, RANK = 8192, 4096, 16
BEGIN, END = "<!-- predicted: begin -->", "<!-- predicted: end -->"


@dataclass(frozen=True)
class Case:
    """A layer of FEATURES by FEATURES under ROWS rows of bf16.

    Attributes:
        method: "LoRA", "DoRA" or "(IA)^3".
        weight: "bf16" or "nf4".
        adapter: dtype of the factors, "fp32" (PEFT's default) or "bf16".
        dropout: on the low-rank path.
    """

    method: str
    weight: str
    adapter: str
    dropout: float

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.method} on {self.weight}, {self.adapter} factors{dropout}"


CASES = [
    Case(method, weight, adapter, dropout)
    for method in ("LoRA", "DoRA", "(IA)^3")
    for weight in ("bf16", "nf4")
    for adapter in ("fp32", "bf16")
    for dropout in ((0.0,) if method == "(IA)^3" else (0.0, 0.1))
]


def counted(case: Case, ours: bool, rows: int = ROWS, features: int = FEATURES) -> fake_cuda.Counts:
    """What a step of the case counts, by this library or by stock PEFT (and bitsandbytes, for nf4)."""
    layer = _peft_layer(case, features)
    with fake_cuda.fake_cuda():
        fake_cuda.faked(layer)
        _fake_quant_state(layer)
        layer.train()
        x = torch.empty(rows, features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        run, tensors = (_our_call(case, layer), _tensors(layer)) if ours else (layer, _tensors(layer))
        return fake_cuda.counted(run, x, tensors=tensors, expand=_expansions())


def _peft_layer(case: Case, features: int) -> Any:
    """PEFT's layer of the case, on the CPU."""
    from peft import IA3Config, LoraConfig
    from peft.tuners import ia3, lora

    if case.weight == "nf4":
        import bitsandbytes

        base = bitsandbytes.nn.Linear4bit(features, features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
        base.to("cpu")
    else:
        base = nn.Linear(features, features, bias=False, dtype=torch.bfloat16)
    base.requires_grad_(False)
    if case.method == "(IA)^3":
        kind = ia3.Linear4bit if case.weight == "nf4" else ia3.Linear
        layer = kind(base, "default", is_feedforward=False, **_of(kind, IA3Config()))
        factors = [layer.ia3_l]
    else:
        kind = lora.Linear4bit if case.weight == "nf4" else lora.Linear
        config = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=case.dropout, use_dora=case.method == "DoRA")
        layer = kind(base, "default", config=config, r=RANK, lora_alpha=32)
        factors = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    for factor in factors:
        factor.to(torch.float32 if case.adapter == "fp32" else torch.bfloat16)
    return layer


def _of(kind: Any, config: Any) -> dict[str, Any]:
    import inspect

    return {"config": config} if "config" in inspect.signature(kind.__init__).parameters else {}


def _fake_quant_state(layer: Any) -> None:
    """bitsandbytes keeps a weight's scales beside it."""
    weight = layer.base_layer.weight
    state = getattr(layer, "_quant_state", None)
    if state is None:
        return
    for owner, names in ((state, ("absmax", "code", "offset")), (state.state2, ("absmax", "code"))):
        for name in names:
            tensor = getattr(owner, name)
            setattr(owner, name, torch.empty_like(tensor, device="cuda"))
    weight.quant_state, weight.quant_type = state, "nf4"


def _tensors(layer: Any) -> list[Tensor]:
    state = getattr(layer, "_quant_state", None)
    own = [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return [*layer.parameters(), *layer.buffers(), *own]


def _our_call(case: Case, layer: Any) -> Callable[[Tensor], Tensor]:
    """The op on the same tensors, as `accelerate` calls it."""
    raise NotImplementedError


def _expansions() -> dict[Any, Callable[..., Tensor]]:
    """bitsandbytes' 4-bit product for many rows: its own source decodes the weight and calls torch."""
    import bitsandbytes  # noqa: F401

    library = torch.ops.bitsandbytes

    def gemm_4bit(
        A: Tensor,
        B: Tensor,
        shapeB: Any,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        scale = absmax
        if absmax_8bit is not None:
            nested = (absmax_8bit, absmax, absmax_code, 256, torch.float32)
            scale = library.dequantize_blockwise.default(*nested) + absmax_offset
        dense = library.dequantize_4bit.default(B, scale, blocksize, quant_type, shapeB, A.dtype)
        return nn.functional.linear(A, dense, bias)

    return {library.gemm_4bit.default: gemm_4bit}
