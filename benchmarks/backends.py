"""Times models of HF PEFT and bitsandbytes, stock and on peftkern: `python -m benchmarks.backends --output FILE.json`.

A Llama of about 100 M parameters from random weights; a step is forward, backward and AdamW. Both sides take turns in
one process per number of threads, and have one of their own each for memory. Results are written row by row: the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.run import ROOT, OneLineParser, commit, recorded_command, write_report
from peftkern._native import caps
from peftkern.bench.contenders import bnb_linear, rotate
from peftkern.bench.measure import ROTATED_BYTES, Run, durations, interleaved, machine, summary

MODULE = "benchmarks.backends"
STOCK, OURS = "stock", "peftkern"
RANK = 16
HEAD_DIM = 64
LAYER_ROWS, LAYER_TURNS = 64, 2
# Stock DoRA takes seconds a step.
LEAST_ROUNDS = 3
PROFILED_OPS = 5


class Case(NamedTuple):
    """What is trained, or generates, on both sides."""

    four_bit: bool
    method: str
    options: dict[str, Any]
    autocast: bool = False
    generates: bool = False


_LORA = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
CASES = {
    "QLoRA": Case(True, "LoraConfig", _LORA),
    "QLoRA, dropout 0.1": Case(True, "LoraConfig", _LORA | {"lora_dropout": 0.1}),
    "QDoRA": Case(True, "LoraConfig", _LORA | {"use_dora": True}),
    "LoRA on bf16": Case(False, "LoraConfig", _LORA),
    # Without autocast PEFT's layer turns k and v to fp32, and attention raises.
    "(IA)^3 on 4-bit": Case(True, "IA3Config", {}, autocast=True),
    "generation, QLoRA": Case(True, "LoraConfig", _LORA, generates=True),
}
LAYER = "bitsandbytes layer, forward in training"


class Sizes(NamedTuple):
    """Of the model."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked.

    Raises:
        SystemExit: 2, after one line that names the argument.
    """
    parser = OneLineParser(prog=f"python -m {MODULE}", description=__doc__)
    add = parser.add_argument
    names = [*CASES, LAYER]
    add("--cases", nargs="+", default=names, choices=names, metavar="CASE", help="; ".join(names))
    for name, size in Sizes(768, 2048, 12, 32000)._asdict().items():
        add(f"--{name}", type=int, default=size, help="of the model (default %(default)s)")
    add("--tokens", nargs="+", type=int, default=[128, 512], help="of a step, or of the prompt")
    add("--new-tokens", type=int, default=32, help="that are generated")
    add("--layer", type=int, default=4096, help="features of the layer that is timed alone")
    add("--threads", nargs="+", type=int, default=[1, 2])
    add("--budget", type=float, default=6.0, help="seconds per row")
    add("--output", type=Path, default=None, help="JSON file; printed if absent")
    add("--restart", action="store_true", help="measure anew what the file has")
    add("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in (*Sizes._fields, "tokens", "threads", "new_tokens", "layer"):
        value = getattr(args, name)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {least}")
    if args.hidden % HEAD_DIM:
        parser.error(f"--hidden must be a multiple of {HEAD_DIM}, got {args.hidden}")
    if not args.budget >= 0:
        parser.error(f"--budget must be a number of seconds, got {args.budget:g}")
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f"--output: {args.output.parent} is not a folder")
    return args


def sizes_of(args: argparse.Namespace) -> Sizes:
    """The model's."""
    return Sizes(*(getattr(args, name) for name in Sizes._fields))


@cache
def base(sizes: Sizes, four_bit: bool) -> nn.Module:
    """The model before adapters, in bf16 or of bitsandbytes' layers; to be copied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftkern

    heads = sizes.hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=gcd(heads, 4),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).bfloat16()
    if four_bit:
        peftkern.to_bnb(peftkern.quantize(model))
        model.is_loaded_in_4bit = True  # what PEFT goes by
    return model


def build(case: Case, contender: str, sizes: Sizes) -> nn.Module:
    """A side's model, with what its user writes."""
    import peft

    import peftkern

    model: Any = copy.deepcopy(base(sizes, case.four_bit))
    if contender == OURS and case.four_bit:
        peftkern.from_bnb(model)
        model.is_loaded_in_4bit = False
    model = peft.get_peft_model(model, getattr(peft, case.method)(**case.options))
    if contender == OURS:
        peftkern.accelerate(model)
    return model.train(not case.generates)


def runner(case: Case, model: Any, tokens: int, new_tokens: int) -> Run:
    """A training step, or a generation."""
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    return _generation(model, ids, new_tokens) if case.generates else _training_step(model, ids, case.autocast)


def _training_step(model: Any, ids: Tensor, autocast: bool) -> Run:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def step(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _generation(model: Any, ids: Tensor, new_tokens: int) -> Run:
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return lambda _: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)


def profile(run: Run) -> dict[str, float]:
    """The share of the CPU time that each of the costliest ops has in a run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(0)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    costliest = sorted(times, key=lambda name: -times[name])[:PROFILED_OPS]
    return {name: round(times[name] / total, 3) for name in costliest}


def time_case(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result rows of one case, at each number of tokens."""
    case, sizes = CASES[name], sizes_of(args)
    models = {contender: build(case, contender, sizes) for contender in (STOCK, OURS)}
    for tokens in args.tokens:
        runs = {contender: runner(case, model, tokens, args.new_tokens) for contender, model in models.items()}
        timings = interleaved(runs, args.budget, LEAST_ROUNDS)
        common = {"case": name, "tokens": tokens, "threads": torch.get_num_threads(), "isa": caps.isa()}
        for contender, timing in timings.items():
            row = {**common, "contender": contender, **asdict(timing)}
            yield row | {"profile": profile(runs[contender])}


def measure_memory(name: str, contender: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The peak resident size during a step, and its rise in it, at each number of tokens."""
    torch.set_num_threads(1)
    case = CASES[name]
    model = build(case, contender, sizes_of(args))
    base.cache_clear()
    for tokens in args.tokens:
        run = runner(case, model, tokens, args.new_tokens)
        run(0)  # the optimizer's state, and what is set up once
        memory.reset_peak()
        before = memory.resident_bytes("VmRSS")
        run(1)
        peak = memory.resident_bytes("VmHWM")
        yield {"case": name, "tokens": tokens, "contender": contender, "peak_bytes": peak, "rise_bytes": peak - before}


def time_layer(contender: str, args: argparse.Namespace) -> list[float]:
    """Seconds of forwards of a bitsandbytes layer that trains, on its own kernels or on the backend."""
    import bitsandbytes  # noqa: F401 -- before the backend, which replaces what it has registered

    from peftkern.integrations import bnb_backend

    if contender == OURS:
        os.environ["PEFTKERN_BNB"] = "1"
        warnings.simplefilter("error", UserWarning)
        bnb_backend.register()
    x = torch.randn(LAYER_ROWS, args.layer).bfloat16().requires_grad_()
    rotated = ROTATED_BYTES if args.budget else 0
    run = rotate(lambda: bnb_linear(args.layer, args.layer).train(), lambda layer: layer(x), rotated)
    return durations({contender: run}, args.budget / LAYER_TURNS, LEAST_ROUNDS)[contender]


def child(args: argparse.Namespace) -> None:
    """Measures what `--child` names, and prints lines of JSON."""
    kind, contender = args.child
    # transformers calls what it has deprecated, bitsandbytes misses a package for GPUs.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads[0])
    results: Iterator[Any]
    if kind == "layer":
        results = iter([time_layer(contender, args)])
    elif kind == "memory":
        results = measure_memory(args.cases[0], contender, args)
    else:
        results = (row for name in args.cases for row in time_case(name, args))
    for result in results:
        print(json.dumps(result), flush=True)


def run_child(kind: str, contender: str, cases: list[str], threads: int, args: argparse.Namespace) -> Iterator[Any]:
    """What a process of its own measures, line by line.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", MODULE, "--child", kind, contender, "--cases", *cases, "--threads", str(threads)]
    for name in (*Sizes._fields, "tokens", "new_tokens", "layer", "budget"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    # Bound, since two threads that meet on one core stay there for whole time slices.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "KINETO_LOG_LEVEL": "9"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise SystemExit(f"{MODULE}: the process for {kind} with {threads} threads failed: status {process.returncode}")


class Results:
    """The report, kept in its file as it grows."""

    def __init__(self, args: argparse.Namespace, arguments: list[str]) -> None:
        self.output = args.output
        self.report: dict[str, Any] = {
            "machine": machine(),
            "commit": commit(),
            "model": sizes_of(args)._asdict() | {"parameters": parameters(sizes_of(args))},
            "new_tokens": args.new_tokens,
            "command": recorded_command([argument for argument in arguments if argument != "--restart"], MODULE),
            "rows": [],
            "memory": [],
        }
        if args.output is not None and args.output.exists() and not args.restart:
            self._go_on(json.loads(args.output.read_text()))

    def _go_on(self, found: dict[str, Any]) -> None:
        """Takes what the file has over, if it was measured as this would be."""
        for name in ("machine", "commit", "model", "new_tokens"):
            # The file of results itself may have changed since.
            there, here = (json.dumps(each.get(name)).replace("-dirty", "") for each in (found, self.report))
            if there != here:
                raise SystemExit(f"{MODULE}: {self.output} has another {name}: {there}, not {here}; give --restart")
        commands = dict.fromkeys([*found["command"].split("; "), self.report["command"]])
        self.report |= {"command": "; ".join(commands), "rows": found["rows"], "memory": found["memory"]}

    def has(self, table: str, tokens: list[int], **place: Any) -> bool:
        """Whether both sides, or the contender that `place` names, are there at these numbers of tokens."""
        contenders = [place.pop("contender")] if "contender" in place else [STOCK, OURS]
        found = {(r["tokens"], r["contender"]) for r in self.report[table] if place.items() <= r.items()}
        return set(product(tokens, contenders)) <= found

    def add(self, table: str, result: dict[str, Any]) -> None:
        """Takes a row, in place of an older one, and writes the file."""
        names = ("case", "tokens", "threads", "contender")
        kept = [r for r in self.report[table] if any(r.get(name) != result.get(name) for name in names)]
        self.report[table] = [*kept, result]
        figure = f"{result['median_ms']:.4g} ms" if table == "rows" else f"{result['rise_bytes'] / 1e6:.0f} MB"
        print(", ".join([*(str(result[name]) for name in names if name in result), figure]), file=sys.stderr)
        if self.output is not None:
            write_report(self.report, self.output)


def parameters(sizes: Sizes) -> int:
    """Of the dense model."""
    heads = sizes.hidden // HEAD_DIM
    attention = 2 * sizes.hidden * (sizes.hidden + HEAD_DIM * gcd(heads, 4))
    layer = attention + 3 * sizes.hidden * sizes.intermediate + 2 * sizes.hidden
    return sizes.vocabulary * sizes.hidden + sizes.layers * layer + sizes.hidden


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse(arguments)
    os.environ["PEFTKERN_BNB"] = "0"  # bitsandbytes is a peer here: on its own kernels
    if args.child:
        child(args)
        return 0
    results = Results(args, arguments)
    models = [name for name in args.cases if name in CASES]
    for threads in args.threads:
        missing = [name for name in models if not results.has("rows", args.tokens, case=name, threads=threads)]
        for row in run_child("time", "both", missing, threads, args) if missing else ():
            results.add("rows", row)
        if LAYER in args.cases and not results.has("rows", [LAYER_ROWS], case=LAYER, threads=threads):
            seconds: dict[str, list[float]] = {STOCK: [], OURS: []}
            for contender in [STOCK, OURS] * LAYER_TURNS:
                for measured in run_child("layer", contender, [LAYER], threads, args):
                    seconds[contender] += measured
            for contender, found in seconds.items():
                common = {"case": LAYER, "tokens": LAYER_ROWS, "threads": threads, "isa": caps.isa()}
                results.add("rows", {**common, "contender": contender, **asdict(summary(found))})
    for name, contender in product(models, (STOCK, OURS)):
        if not results.has("memory", args.tokens, case=name, contender=contender):
            for row in run_child("memory", contender, [name], 1, args):
                results.add("memory", row)
    if args.output is None:
        write_report(results.report, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
