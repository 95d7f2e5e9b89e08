"""What is timed for one shape and number of rows: op and pass -> contenders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peftkern.bench import contenders as c
from peftkern.bench import losses, mixed, prefixes, prompts
from peftkern.bench.measure import ROTATED_BYTES, Run
from peftkern.ops.nf4_quantize import nf4_quantize

CASES = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_linear forward",
    "nf4_linear forward+backward",
    "nf4_linear forward fp32",
    "lora_linear nf4 forward",
    "lora_linear nf4 forward+backward",
    "lora_linear nf4 forward+backward dropout 0.1",
    "lora_linear dense forward+backward",
    "lora_linear dense forward+backward dropout 0.1",
    "multi_lora_linear nf4 forward",
    "multi_lora_linear dense forward",
    "lora_qkv nf4 forward+backward",
    "lora_qkv dense forward+backward",
    "lora_mlp nf4 forward+backward",
    "lora_mlp dense forward+backward",
    "dora_linear nf4 forward+backward",
    "dora_linear dense forward+backward",
    "dora_norm nf4",
    "ia3_linear nf4 forward+backward",
    "prompt_embedding forward+backward",
    "bottleneck_adapter forward+backward",
    "prefix_attention forward",
    "prefix_attention forward+backward",
    "prefix_attention forward+backward fp32",
    "prefix_attention encoder forward",
    "prefix_attention encoder forward+backward",
    "cross_entropy forward+backward",
)

# Those that do not depend on the number of rows.
ROWLESS = ("nf4_quantize", "nf4_dequantize", "dora_norm nf4", "prompt_embedding forward+backward")


def contenders(
    case: str, out_features: int, in_features: int, rows: int, rotated: int = ROTATED_BYTES
) -> dict[str, Run]:
    """Name -> run(i) for one case; "peftkern" is first. Peers that are not installed, or cannot run it, are left out.

    Everything is made on torch's default device, so `with torch.device("cuda")` around it is all that a GPU needs.

    Raises:
        ValueError: there is no such case.
    """
    shape = out_features, in_features
    if case in ("nf4_quantize", "nf4_dequantize"):
        return _conversions(case, shape, rotated)
    if case.startswith(("lora_qkv", "lora_mlp")):
        return _blocks(case, shape, rows, rotated)
    if case.startswith("multi_lora"):
        return mixed.contenders(case, shape, rows, rotated)
    if case.startswith("prompt_embedding"):
        return prompts.contenders(*shape, rotated)
    if case.startswith("prefix_attention"):
        return prefixes.contenders(case, *shape, rows)
    if case.startswith("cross_entropy"):
        return losses.contenders(out_features, rows)
    dtype = torch.float32 if case.endswith("fp32") else torch.bfloat16
    generator = torch.Generator().manual_seed(rows)
    x = c.normal(generator, rows, in_features).to(dtype)
    step = c.forward_backward(x, c.normal(generator, rows, out_features).to(dtype))
    nf4, dense = partial(c.nf4_linear, *shape), partial(c.dense_linear, *shape, dtype)
    rotate = partial(c.rotate, rotated=rotated)

    if case in ("nf4_linear forward", "nf4_linear forward fp32"):
        runs = {"peftkern": rotate(nf4, c.forward(x)), f"torch dense {str(dtype)[6:]}": rotate(dense, c.dense_call(x))}
        # bitsandbytes' fused path takes whole blocks and 32 rows of the weight at a time.
        if dtype == torch.bfloat16 and c.has("bitsandbytes") and in_features % 64 == out_features % 32 == 0:
            runs["bitsandbytes eval"] = rotate(lambda: c.bnb_linear(*shape).eval(), c.forward(x))
        return runs
    if case == "nf4_linear forward+backward":
        runs = {"peftkern": rotate(nf4, step)}
        if c.has("bitsandbytes"):
            runs["bitsandbytes train"] = rotate(lambda: c.bnb_linear(*shape).train(), step)
        return runs
    if case.startswith(("dora", "ia3")):
        return _scaled(case, shape, step, rotate)
    dropout = 0.1 if "dropout" in case else 0.0
    if case.startswith("lora_linear nf4"):
        call = step if "backward" in case else c.forward(x)
        runs = {"peftkern": rotate(lambda: c.lora(nf4(), dropout), call), "peftkern nf4_linear": rotate(nf4, call)}
        if c.has("bitsandbytes") and c.has("peft"):
            runs["PEFT + bitsandbytes"] = rotate(lambda: c.peft_lora(c.bnb_linear(*shape), dropout), call)
        return runs
    if case.startswith("lora_linear dense forward+backward"):
        runs = {"peftkern": rotate(lambda: c.lora(dense(), dropout), step)}
        if c.has("peft"):
            runs["PEFT"] = rotate(lambda: c.peft_lora(dense(), dropout), step)
        return runs
    if case == "bottleneck_adapter forward+backward":
        square = c.forward_backward(x, x.flip(0))
        ours, eager = partial(c.adapter, in_features), partial(c.EagerAdapter, in_features)
        return {"peftkern": rotate(ours, square), "torch eager": rotate(eager, square)}
    raise ValueError(f"case must be one of {', '.join(CASES)}, got {case!r}")


def _scaled(case: str, shape: tuple[int, int], step: Callable, rotate: Callable[..., Run]) -> dict[str, Run]:
    """DoRA, whose factors change in every step so that its norms do, and (IA)^3 on the output."""
    on_nf4 = "nf4" in case
    base = partial(c.nf4_linear, *shape) if on_nf4 else partial(c.dense_linear, *shape, torch.bfloat16)
    peer_base = partial(c.bnb_linear, *shape) if on_nf4 else base
    peer_name = "PEFT + bitsandbytes" if on_nf4 else "PEFT"
    has_peer = c.has("peft") and (not on_nf4 or c.has("bitsandbytes"))
    if case == "dora_norm nf4":
        calls: dict[str, Callable[..., Tensor]] = {"peftkern": c.dora_norm, "torch dense bfloat16": c.dense_dora_norm}
        return {name: rotate(lambda: c.dora(base()), call) for name, call in calls.items()}
    if case.startswith("dora_linear"):
        runs = {"peftkern": rotate(lambda: c.dora(base()), c.changing(step))}
        runs["peftkern lora_linear"] = rotate(lambda: c.lora(base(), 0.0), c.changing(step))
        if has_peer:
            runs[peer_name] = rotate(lambda: c.peft_lora(peer_base(), 0.0, use_dora=True), c.changing(step))
        return runs
    runs = {"peftkern": rotate(lambda: c.ia3(base()), step), "peftkern nf4_linear": rotate(base, step)}
    if has_peer:
        runs[peer_name] = rotate(lambda: c.peft_ia3(peer_base()), step)
    return runs


def _conversions(case: str, shape: tuple[int, int], rotated: int) -> dict[str, Run]:
    """Dense bf16 to NF4 (double quantisation) and back."""
    if case == "nf4_quantize":
        build = partial(c.dense_linear, *shape, torch.bfloat16)
        runs = {"peftkern": c.rotate(build, lambda layer: nf4_quantize(layer.weight), rotated)}
        if c.has("bitsandbytes"):
            runs["bitsandbytes"] = c.rotate(build, lambda layer: c.bnb_quantize(layer.weight), rotated)
        return runs
    runs = {"peftkern": c.rotate(partial(c.nf4_linear, *shape), lambda layer: layer.dequantize(), rotated)}
    if c.has("bitsandbytes"):
        runs["bitsandbytes"] = c.rotate(partial(c.bnb_linear, *shape), c.bnb_dequantize, rotated)
    return runs


def _blocks(case: str, shape: tuple[int, int], rows: int, rotated: int) -> dict[str, Run]:
    """q, k and v [out, in], or an MLP of `out` features between `in` and `in`: in one op, and layer by layer."""
    out_features, in_features = shape
    block = c.Qkv if case.startswith("lora_qkv") else c.Mlp
    outs = c.Qkv.sizes(out_features) if block is c.Qkv else (in_features,)
    generator = torch.Generator().manual_seed(rows)
    x, *grads = (c.normal(generator, rows, n).bfloat16() for n in (in_features, *outs))
    step, rotate = c.forward_backward(x, *grads), partial(c.rotate, rotated=rotated)
    nf4 = "nf4" in case
    base = c.nf4_linear if nf4 else partial(c.dense_linear, dtype=torch.bfloat16)

    def build(layer: Callable[[int, int], nn.Module]) -> c.Qkv | c.Mlp:
        return block(layer, *shape)

    def ours(*sizes: int) -> nn.Module:
        return c.lora(base(*sizes), 0.0)

    runs = {
        "peftkern": rotate(lambda: build(ours).fused(), step),
        "peftkern lora_linear": rotate(lambda: build(ours), step),
    }
    if c.has("peft") and (c.has("bitsandbytes") or not nf4):
        peer = c.bnb_linear if nf4 else base
        theirs = rotate(lambda: build(lambda *sizes: c.peft_lora(peer(*sizes), 0.0)), step)
        runs["PEFT + bitsandbytes" if nf4 else "PEFT"] = theirs
    return runs


def work(case: str, out_features: int, in_features: int, rows: int) -> tuple[float, float]:
    """(bytes that must be moved at least once, floating-point operations) of one case.

    Each pass reads the weight once (NF4: 4.127 bits an element with double quantisation) and its activations once.
    """
    if case in ("nf4_quantize", "nf4_dequantize"):
        return out_features * in_features * (2 + 4.127 / 8), 0.0
    if case.startswith("prompt_embedding"):
        return prompts.work(in_features)
    if case.startswith("bottleneck_adapter"):
        # Weights read twice and their gradients written; x twice, y, dy and dx once.
        weights, wide = 2 * c.BOTTLENECK * in_features, rows * in_features
        return 2.0 * (3 * weights + 5 * wide), 6 * 2.0 * c.BOTTLENECK * wide
    if case.startswith("prefix_attention"):
        return prefixes.work(case, out_features, in_features, rows)
    if case.startswith("cross_entropy"):
        return losses.work(out_features, rows)
    element = 4 if case.endswith("fp32") else 2
    layers = [(out_features, in_features)]
    if case.startswith("lora_qkv"):
        layers = [(out, in_features) for out in c.Qkv.sizes(out_features)]
    elif case.startswith("lora_mlp"):
        layers = [(out_features, in_features)] * 2 + [(in_features, out_features)]
    elements = sum(out * columns for out, columns in layers)
    weight = elements * (2 if "dense" in case else 4.127 / 8)
    activations = rows * (in_features + sum(out for out, _ in layers)) * element
    if case.startswith("dora_norm"):
        return weight, 2.0 * c.RANK * elements
    passes = 2 if "backward" in case else 1
    lora = 0.0
    if case.startswith(("lora", "multi_lora", "dora")):
        lora = (6 if passes == 2 else 2) * 2 * rows * c.RANK * sum(out + columns for out, columns in layers) / 2
    if case.startswith("dora"):
        lora += 2.0 * c.RANK * elements
    return passes * (weight + activations), passes * 2.0 * rows * elements + lora
