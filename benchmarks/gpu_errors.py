"""How far each op on a GPU is from float64, forward and every gradient: `python -m benchmarks.gpu_errors`.

Every op runs on small random inputs of awkward sizes, with memory that was full of NaN before, and twice: the second
run must give the same bits. The errors are ||got - exact|| / ||exact||, of float64 on the CPU from the same rounded
inputs, and that of the worst element beside the root mean square.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peftkern
from benchmarks.run import write_report
from peftkern.nf4 import NF4Weight

BACKENDS = ("triton", "cuda", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANK = 5
# Roundings of inputs, products and results; a wrong index or a lost tile is far above them.
SIZES = ("1,70,64", "5,128,192", "33,96,320", "130,257,448")
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Of one element, in root mean squares of all: a single wrong element hides in the norm of many.
PEAK = 10
POISON_BYTES, POISONED_TWICE = 64 * 2**20, 8

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """One op on some shape. `call` takes named leaves, a weight maker and the backend, and gives the outputs."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Tensors, Callable[[int, int], Any], str], Any]
    fp32: tuple[str, ...] = ()  # leaves that stay fp32: adapters, scales


def random_sizes(count: int, seed: int) -> list[str]:
    """Rows of x from 1 to 513; weights odd and even, of whole blocks of 64 in a row and not, long either way."""
    draw = random.Random(seed)
    sizes = []
    for i in range(count):
        rows = draw.randint(1, 8), draw.randint(9, 40), draw.randint(41, 128), draw.randint(129, 513)
        shapes = (
            (8 * draw.randint(1, 40), 64 * draw.randint(1, 16)),
            (draw.randint(1, 320), draw.randint(1, 1024)),
            (draw.randint(1, 320), 64 * draw.randint(64, 192)),
            (8 * draw.randint(128, 256), 64 * draw.randint(1, 16)),
        )
        sizes.append(",".join(map(str, (rows[i % 4], *shapes[i // 4 % 4]))))
    return sizes


def cases(rows: int, out: int, columns: int, nf4: bool) -> list[Case]:
    """Every op with these sizes; `nf4` says what the weights are."""
    linear = {"x": (rows, columns), "bias": (out,)}
    factors = {"a": (RANK, columns), "b": (out, RANK)}
    found = [
        Case("ia3_linear", linear | {"scale": (out,)}, _ia3(out, columns), ("scale",)),
        Case("lora_linear", linear | factors, _lora(out, columns), ("a", "b")),
        Case("dora_linear", linear | factors | {"m": (out,)}, _dora(out, columns), ("a", "b", "m")),
        _qkv(rows, out, columns),
        _mlp(rows, out, columns),
    ]
    if nf4:
        found.append(Case("nf4_dequantize", {}, _dequantize(out, columns)))
        found.append(Case("nf4_linear", linear, _nf4(out, columns)))
        return found
    found.append(Case("nf4_quantize", {}, _quantize(out, columns)))
    heads, width = 4, 24
    found.append(
        Case(
            "bottleneck_adapter",
            {"x": (rows, columns), "dw": (7, columns), "db": (7,), "uw": (columns, 7), "ub": (columns,)},
            lambda t, _, name: peftkern.bottleneck_adapter(t["x"], t["dw"], t["db"], t["uw"], t["ub"], backend=name),
        )
    )
    found.append(
        Case("prompt_embedding", {"prompt": (3, columns)}, _prompt(rows, out, columns), ("prompt",)),
    )
    found.append(
        Case(
            "prefix_attention",
            {"q": (2, heads, rows, width), "k": (2, 2, rows, width), "v": (2, 2, rows, width)}
            | {"pk": (2, 5, width), "pv": (2, 5, width)},
            lambda t, _, name: peftkern.prefix_attention(
                t["q"], t["k"], t["v"], t["pk"], t["pv"], is_causal=True, enable_gqa=True, backend=name
            ),
            ("pk", "pv"),
        )
    )
    return found


def _quantize(out: int, columns: int) -> Callable:
    def call(_: Tensors, weight: Callable, name: str) -> Any:
        dense = weight(out, columns)
        dense = dense.float() if dense.dtype == torch.float64 else dense  # the same bytes are wanted, not nearer ones
        q = peftkern.nf4_quantize(dense, double_quant=False, backend=name)
        return q.codes.float(), q.absmax

    return call


def _dequantize(out: int, columns: int) -> Callable:
    return lambda _, w, name: peftkern.nf4_dequantize(w(out, columns), backend=name)


def _nf4(out: int, columns: int) -> Callable:
    return lambda t, w, name: peftkern.nf4_linear(t["x"], w(out, columns), t["bias"], backend=name)


def _ia3(out: int, columns: int) -> Callable:
    return lambda t, w, name: peftkern.ia3_linear(t["x"], w(out, columns), t["scale"], t["bias"], backend=name)


def _lora(out: int, columns: int) -> Callable:
    return lambda t, w, name: peftkern.lora_linear(
        t["x"], w(out, columns), t["a"], t["b"], 0.7, t["bias"], backend=name
    )


def _dora(out: int, columns: int) -> Callable:
    return lambda t, w, name: peftkern.dora_linear(
        t["x"], w(out, columns), t["a"], t["b"], t["m"], 0.7, t["bias"], backend=name
    )


def _qkv(rows: int, out: int, columns: int) -> Case:
    outs = (out, max(1, out // 2), max(1, out // 2))
    shapes: dict[str, tuple[int, ...]] = {"x": (rows, columns)}
    shapes |= {f"a{i}": (RANK, columns) for i in range(3)} | {f"b{i}": (n, RANK) for i, n in enumerate(outs)}

    def call(t: Tensors, weight: Callable, name: str) -> Any:
        factors = [t[f"a{i}"] for i in range(3)], [t[f"b{i}"] for i in range(3)]
        return peftkern.lora_qkv(t["x"], [weight(n, columns) for n in outs], *factors, [0.7, 0.5, 1.1], backend=name)

    return Case("lora_qkv", shapes, call, tuple(name for name in shapes if name != "x"))


def _mlp(rows: int, middle: int, columns: int) -> Case:
    sizes = {"gate": (middle, columns), "up": (middle, columns), "down": (columns, middle)}
    shapes: dict[str, tuple[int, ...]] = {"x": (rows, columns)}
    for name, (n, k) in sizes.items():
        shapes |= {f"{name}_a": (RANK, k), f"{name}_b": (n, RANK)}

    def call(t: Tensors, weight: Callable, name: str) -> Any:
        adapters = {each: (t[f"{each}_a"], t[f"{each}_b"], 0.7) for each in sizes}
        return peftkern.lora_mlp(t["x"], *(weight(*size) for size in sizes.values()), adapters, backend=name)

    return Case("lora_mlp", shapes, call, tuple(name for name in shapes if name != "x"))


def _prompt(rows: int, vocabulary: int, columns: int) -> Callable:
    def call(t: Tensors, weight: Callable, name: str) -> Any:
        ids = torch.arange(2 * rows, device=t["prompt"].device).view(2, rows) % vocabulary
        return peftkern.prompt_embedding(ids, weight(vocabulary, columns), t["prompt"], backend=name)[0]

    return call


def weights(nf4: bool, seed: int) -> Callable[[int, int], Callable[[torch.dtype, str], Any]]:
    """(out, in) -> (dtype, device) -> the weight, the same values for the same sizes."""

    def sized(out: int, columns: int) -> Callable[[torch.dtype, str], Any]:
        generator = torch.Generator().manual_seed(seed + 1000 * out + columns)
        dense = torch.randn(out, columns, generator=generator) * columns**-0.5
        quantised = peftkern.nf4_quantize(dense) if nf4 else None

        def on(dtype: torch.dtype, device: str) -> Any:
            if quantised is None:
                return dense.to(torch.bfloat16).to(dtype).to(device)
            parts = (part if part is None else part.to(device) for part in quantised.tensors)
            return NF4Weight(*parts, quantised.shape, dtype, quantised.block_size)

        return on

    return sized


def run(case: Case, leaves: Tensors, weight: Callable[[int, int], Any], backend: str) -> Tensors:
    """Outputs and gradients by name."""
    grown = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    result = case.call(grown, weight, backend)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    found = {f"y{i}": output.detach() for i, output in enumerate(outputs)}
    if grown:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype).to(y.device) for y in outputs]
        torch.autograd.backward(outputs, grads)
        found |= {f"grad {name}": leaf.grad for name, leaf in grown.items() if leaf.grad is not None}
    return found


def poison(device: str) -> None:
    """Leaves NaN in the memory that the next tensors get."""
    if device == "cuda":
        sizes = (POISON_BYTES, *(2**12, 2**16, 2**20) * POISONED_TWICE)
        _held = [torch.full((size // 4,), torch.nan, device=device) for size in sizes]  # so that they lie apart


def check(case: Case, dtype: torch.dtype, backend: str, device: str, nf4: bool, seed: int) -> dict[str, Any]:
    """The worst error, where it is, and whether two runs gave the same bits."""
    generator = torch.Generator().manual_seed(seed)
    weight = weights(nf4, seed)
    exact_leaves = {
        # Adapters small, so that fp16 holds an MLP's products.
        name: (torch.randn(shape, generator=generator) + 0.1).mul_(0.1 if name in case.fp32 else 1).bfloat16().double()
        for name, shape in case.shapes.items()
    }
    exact = run(case, exact_leaves, lambda *size: weight(*size)(torch.float64, "cpu"), "reference")
    leaves = {
        name: leaf.to(torch.float32 if name in case.fp32 else dtype).to(device) for name, leaf in exact_leaves.items()
    }

    def once() -> Tensors:
        poison(device)
        return run(case, leaves, lambda *size: weight(*size)(dtype, device), backend)

    got, again = once(), once()
    errors = {name: _error(got[name], exact[name]) for name in exact}
    peaks = {name: _peak(got[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: max(errors[name], peaks[name] / PEAK))
    return {
        "error": errors[worst],
        "peak": peaks[worst],
        "worst": worst,
        "right": max(errors.values()) <= LIMITS[dtype] and max(peaks.values()) <= PEAK * LIMITS[dtype],
        "repeats": all(torch.equal(got[name], again[name]) for name in got),
    }


def _error(got: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.norm(got.double().cpu() - exact.double())
    error = (difference / torch.linalg.norm(exact.double()).clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _peak(got: Tensor, exact: Tensor) -> float:
    """The largest error of an element, in root mean squares."""
    if exact.numel() == 0:
        return 0.0
    largest = (got.double().cpu() - exact.double()).abs().max()
    peak = (largest / exact.double().square().mean().sqrt().clamp(min=1e-30)).item()
    return peak if peak == peak else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_errors", description=__doc__)
    parser.add_argument("--ops", nargs="+", default=None, help="default all")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="M,N,K")
    parser.add_argument(
        "--random", type=int, default=0, metavar="COUNT", help="as many sizes drawn by the seed, instead"
    )
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON file; printed if absent")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for text in random_sizes(args.random, args.seed) if args.random else args.sizes:
        sizes = tuple(int(part) for part in text.split(","))
        for nf4 in (True, False):
            for case in cases(*sizes, nf4):
                if args.ops is not None and case.op not in args.ops:
                    continue
                for dtype in DTYPES:
                    for backend in args.backends:
                        row = {"op": case.op, "backend": backend, "dtype": str(dtype)[6:], "nf4": nf4, "sizes": sizes}
                        try:
                            row |= check(case, dtype, backend, args.device, nf4, args.seed)
                        except (RuntimeError, NotImplementedError) as error:
                            row |= {"refused": str(error).splitlines()[0]}
                        rows.append(row)
                        if row.get("right") is False or row.get("repeats") is False:
                            print(row, file=sys.stderr, flush=True)
    write_report({"seed": args.seed, "rows": rows}, args.output)
    return any(row.get("right") is False or row.get("repeats") is False for row in rows)


if __name__ == "__main__":
    sys.exit(main())
