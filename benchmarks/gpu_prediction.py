"""What a training step of one adapted layer costs on a GPU, predicted: this library against stock PEFT.

Counted on fake CUDA tensors (benchmarks/fake_cuda.py): launches, bytes moved, operations, bytes saved for backward, and
a roofline's time. Nothing is measured, and no GPU is needed.

    python -m benchmarks.gpu_prediction --output benchmarks/results/gpu_prediction.json --update docs/gpu-prediction.md
"""

from benchmarks import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

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


def counted(
    case: Case, ours: bool, rows: int = ROWS, features: int = FEATURES, route: str = "bitsandbytes"
) -> fake_cuda.Counts:
    """What a step of the case counts, by this library or by stock PEFT (and bitsandbytes, for nf4)."""
    layer = _peft_layer(case, features)
    state = getattr(layer.base_layer.weight, "quant_state", None)
    from peftkern.engines.torch import decode

    with (
        fake_cuda.fake_cuda(),
        # PEFT's DoRA decodes what has bitsandbytes' class, which a fake parameter has not.
        mock.patch("peft.tuners.lora.dora.dequantize_module_weight", _decoded),
        # Both decode by bitsandbytes, or ours by its look-up, whose table is on a device once.
        mock.patch.object(decode, "route_of", lambda device: route),
        mock.patch.object(decode, "pair_table", functools.cache(decode.pair_table)),
    ):
        if route == "gather":
            decode.pair_table(torch.device("cuda", 0), torch.bfloat16)
            decode.pair_table(torch.device("cuda", 0), torch.float32)
        fake_cuda.faked(layer)
        scales = _fake_quant_state(layer, state)
        layer.train()
        x = torch.empty(rows, features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        tensors = [*layer.parameters(), *layer.buffers(), *scales]
        return fake_cuda.counted(_our_call(layer) if ours else layer, x, tensors=tensors, expand=_expansions())


def _peft_layer(case: Case, features: int) -> Any:
    """PEFT's layer of the case, on the CPU."""
    from peft import IA3Config, LoraConfig
    from peft.tuners import ia3, lora

    if case.weight == "nf4":
        import bitsandbytes

        base = bitsandbytes.nn.Linear4bit(
            features, features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
        )
        base.to(torch.bfloat16).to("cpu")  # where it is quantised
    else:
        base = nn.Linear(features, features, bias=False, dtype=torch.bfloat16)
    base.requires_grad_(False)
    if case.method == "(IA)^3":
        kind = ia3.Linear4bit if case.weight == "nf4" else ia3.Linear
        layer = kind(base, "default", config=IA3Config(), is_feedforward=False)
        factors = [layer.ia3_l]
    else:
        kind = lora.Linear4bit if case.weight == "nf4" else lora.Linear
        config = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=case.dropout, use_dora=case.method == "DoRA")
        layer = kind(base, "default", config=config, r=RANK, lora_alpha=32)
        factors = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    for factor in factors:
        factor.to(torch.float32 if case.adapter == "fp32" else torch.bfloat16)
    return layer


def _fake_quant_state(layer: Any, state: Any) -> list[Tensor]:
    """bitsandbytes keeps a weight's scales beside it; they become fake too."""
    if state is None:
        return []
    made = []
    for owner, names in ((state, ("absmax", "code", "offset")), (state.state2, ("absmax", "code"))):
        for name in names:
            made.append(torch.empty_like(getattr(owner, name), device="cuda"))
            setattr(owner, name, made[-1])
    weight = layer.base_layer.weight
    weight.quant_state, weight.quant_type, weight.bnb_quantized = state, "nf4", True
    return made


def _decoded(base: Any) -> Tensor:
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight  # type: ignore[no-any-return]
    from bitsandbytes import functional

    return functional.dequantize_4bit(base.weight.data, state)  # type: ignore[no-any-return]


def _our_call(layer: Any) -> Callable[[Tensor], Tensor]:
    """What `accelerate` runs in the layer's place. Past its look at the call, which takes fake tensors for special."""
    from peftkern.integrations.peft import accelerate

    return accelerate(layer)._fast  # type: ignore[no-any-return]


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
        product = torch.mm(A.flatten(0, -2), dense.t())  # what torch's linear comes to
        return (product if bias is None else product + bias).view(*A.shape[:-1], -1)

    return {library.gemm_4bit.default: gemm_4bit}


def row(case: Case) -> dict[str, Any]:
    """Both sides of a case, and the roofline's time on every chip."""
    sides = {}
    for name, ours in (("peftkern", True), ("peft", False)):
        counts = counted(case, ours)
        sides[name] = {
            "launches": counts.launches,
            "bytes": counts.nbytes,
            "flops": counts.flops,
            "saved": counts.saved,
            "peak": counts.peak,
            "largest_wide": counts.largest_wide,
            "ms": {chip: round(1e3 * counts.seconds(of), 4) for chip, of in fake_cuda.CHIPS.items()},
        }
    return {"case": asdict(case), "name": str(case), **sides}


def table(rows: list[dict[str, Any]]) -> str:
    """In markdown: peftkern's figures and, behind a bar, PEFT's."""
    chips = list(fake_cuda.CHIPS)
    head = ["a step of one layer", "launches", "GB moved", "MB saved", *(f"{chip}, ms" for chip in chips)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in rows:
        ours, theirs = each["peftkern"], each["peft"]
        cells = [f"{ours['launches']} / {theirs['launches']}"]
        cells.append(f"{ours['bytes'] / 1e9:.2f} / {theirs['bytes'] / 1e9:.2f}")
        cells.append(f"{ours['saved'] / 1e6:.0f} / {theirs['saved'] / 1e6:.0f}")
        cells += [f"{ours['ms'][chip]:.2f} / {theirs['ms'][chip]:.2f}" for chip in chips]
        lines.append(f"| {each['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--update", type=Path, help="the document whose table to replace")
    parser.add_argument("--ops", help="show every op of the case of this name")
    options = parser.parse_args()
    if options.ops:
        for ours in (True, False):
            counts = counted(next(case for case in CASES if str(case) == options.ops), ours)
            print("peftkern" if ours else "peft", counts.launches, f"{counts.nbytes / 1e9:.2f} GB")
            for each in counts.rows:
                print(
                    f"  {each.phase[:3]} {each.name:40} {each.nbytes / 1e6:8.1f} MB", *each.inputs, "->", *each.outputs
                )
        return
    rows = [row(case) for case in CASES]
    print(table(rows))
    if options.output:
        settings = {"rows": ROWS, "features": FEATURES, "rank": RANK, "torch": torch.__version__}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if options.update:
        text = options.update.read_text()
        before, rest = text.split(BEGIN)
        options.update.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
