"""`peftkern finetune`: any method, of a causal LM on a text file, measured on held-out text."""

import argparse
import json
import resource
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkern
from peftkern.cli import arguments, data, info, loading, output, peers, presets, report
from peftkern.cli.errors import UsageError
from peftkern.cli.tasks import DTYPES
from peftkern.cli.training import Settings, bits_per_byte, load_checkpoint, train
from peftkern.methods import METHODS
from peftkern.tuning import save, tune

EMBEDDED_MODEL = Path(peftkern.__file__).parent / "data" / "base_model"
FINAL_STEPS = 10
CHECKPOINT, PEER_CHECKPOINT = "checkpoint.pt", "checkpoint-peer.pt"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a causal LM on a text file",
        description="Fine-tune a Hugging Face causal LM on a text file and measure it on held-out text. Without "
        "arguments: a small embedded model, by QLoRA, on the help texts of the Python standard library. After Ctrl-C "
        "the same command goes on where it stopped.",
    )
    shown = "(default %(default)s)"
    embedded, real = presets.LEARNING_RATES["lora"]
    rates = f"by method, for LoRA {real:g}, or {embedded:g} for the embedded model"
    rank, alpha, dropout = presets.SIZES.values()
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face model folder (default: the embedded model)")
    add("--data", type=Path, metavar="FILE", help='.txt, or .jsonl with "text" (default: the Python help texts)')
    add("--output", type=Path, default=Path("runs/finetune"), metavar="DIR", help=f"adapter and metrics {shown}")
    add("--method", choices=tuple(METHODS), default="qlora", help=f"what is trained {shown}")
    add("--steps", type=arguments.count, default=120, help=f"optimizer steps {shown}")
    add("--batch-size", type=arguments.count, default=8, help=f"sequences per step {shown}")
    add("--sequence-length", type=arguments.count, default=256, help=f"tokens per sequence {shown}")
    add("--learning-rate", type=arguments.positive, help=f"peak, after warm-up; then a cosine (default {rates})")
    add("--rank", type=arguments.count, help=f"rank of the adapters, for methods that have one (default {rank})")
    add("--alpha", type=arguments.positive, help=f"low-rank adapters are scaled by alpha / rank (default {alpha:g})")
    add("--dropout", type=arguments.probability, help=f"dropout before the adapters (default {dropout:g})")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help=f"weights and activations; adapters are fp32 {shown}")
    add("--seed", type=arguments.seed, default=0, help=f"of the first adapter, the data order and dropout {shown}")
    add("--threads", type=arguments.count, help="CPU threads (default: torch's choice)")
    add("--compare", action="store_true", help="run the same steps through HF PEFT + bitsandbytes too")
    add("--restart", action="store_true", help="discard an unfinished run in the output folder")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Task:
    """What our run and the peer's have in common."""

    settings: Settings
    folder: Path
    text: data.Split
    tokens: data.Tokens
    output: Path

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.dtype]

    def bits_per_byte(self, model: nn.Module) -> float:
        return bits_per_byte(model, self.tokens, self.text.held_out_bytes, self.settings)

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        save(model, folder, base_model_name_or_path=str(self.folder.resolve()))

    def train(self, name: str, model: nn.Module, checkpoint: str, resume: dict | None) -> dict[str, Any]:
        """Trains and gives a run's figures: speed without evaluation, losses, bits per byte after."""
        with report.progress(name, self.settings.steps) as display:
            run = train(model, self.tokens.train, self.settings, self.output / checkpoint, resume, display)
        print(f"{name}: measuring the held-out text again", flush=True)
        last = run.losses[-FINAL_STEPS:]
        return {
            "bits_per_byte_after": self.bits_per_byte(model),
            "tokens_per_second": run.tokens_per_second(self.settings),
            "final_loss": sum(last) / len(last),
            "losses": run.losses,
        }


def _settings(args: argparse.Namespace, text: data.Split) -> Settings:
    return Settings(
        method=args.method,
        model="embedded" if args.model is None else str(args.model.resolve()),
        train_sha256=text.train_sha256,
        steps=args.steps,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        learning_rate=args.learning_rate or presets.learning_rate(args.method, args.model is None),
        dtype=args.dtype,
        seed=args.seed,
        **presets.sizes(args),
    )


def _read_task(args: argparse.Namespace) -> _Task:
    """Everything but the model, checked."""
    folder = EMBEDDED_MODEL if args.model is None else args.model
    loading.check_folder(folder)
    text = data.split(data.topics() if args.data is None else data.read_documents(args.data))
    tokens = data.tokenize(text, loading.load_tokenizer(folder))
    data.check_length(tokens, args.batch_size, args.sequence_length)
    return _Task(_settings(args, text), folder, text, tokens, args.output)


def _load_adapted(task: _Task) -> nn.Module:
    """The base model with a fresh adapter that the seed decides."""
    settings = task.settings
    model = loading.load_model(task.folder, task.dtype)
    loading.check_fits(model, task.tokens, settings.sequence_length)
    torch.manual_seed(settings.seed)
    try:
        return tune(model, settings.method, **settings.options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model: {task.folder}: {loading.first_line(error)}") from error


def _train_peer(task: _Task, first_adapter: Path, resume: dict | None) -> dict[str, Any]:
    name = peers.NAMES[task.settings.method]
    print(f"the same steps by {name}, loading the model", flush=True)
    model = peers.load(task.settings.method, task.folder, first_adapter, task.dtype)
    return {"name": name, **task.train(name, model, PEER_CHECKPOINT, resume)}


def _peak_memory_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _save_results(task: _Task, model: nn.Module, metrics: dict[str, Any]) -> None:
    """Adapter, metrics and loss curve in place of the checkpoints."""
    peer = metrics["peer"]
    curve = report.loss_curve({"peftkern": metrics["losses"]} | ({peer["name"]: peer["losses"]} if peer else {}))
    with output.all_or_nothing(task.output) as staging:
        task.save_adapter(model, staging)
        (staging / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        if curve is None:
            print("no loss.png: matplotlib is not installed (pip install 'peftkern[bench]')")
        else:
            (staging / "loss.png").write_bytes(curve)
    for name in (CHECKPOINT, PEER_CHECKPOINT):
        (task.output / name).unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    """Trains, measures, compares if asked, and only then writes the results.

    Raises:
        UsageError, OSError, Diverged, Interrupted: as `peftkern.cli.main` reports them.
    """
    loading.check_installed()
    # Importing transformers takes seconds.
    print(f"peftkern finetune: {args.steps} steps of {args.method}, loading the model and the text", flush=True)
    if args.compare:
        peers.check_installed(args.method)
    if args.threads:
        torch.set_num_threads(args.threads)
    running_on = {"isa": info.isa(), "backend": info.backend(DTYPES[args.dtype])}
    task = _read_task(args)
    resume, peer_resume = (
        None if args.restart else load_checkpoint(task.output / name, task.settings)
        for name in (CHECKPOINT, PEER_CHECKPOINT)
    )
    model = _load_adapted(task)
    output.prepare(task.output)

    with tempfile.TemporaryDirectory() as first_adapter:
        if args.compare:
            task.save_adapter(model, Path(first_adapter))
        print(f"measuring the model on {task.text.held_out_bytes:,} bytes of held-out text", flush=True)
        before = task.bits_per_byte(model)
        print(f"{before:.4f} bits per byte before", flush=True)
        if task.tokens.unknown:
            print(f"the tokenizer cannot write {task.tokens.unknown} held-out tokens: bits per byte is a lower bound")
        ours = task.train("peftkern", model, CHECKPOINT, resume)
        peak_memory = _peak_memory_bytes()
        peer = _train_peer(task, Path(first_adapter), peer_resume) if args.compare else None

    environment = {
        "data": "pydoc_data.topics" if args.data is None else str(args.data),
        "threads": torch.get_num_threads(),
        **running_on,
    }
    metrics = {
        "bits_per_byte_before": before,
        **ours,
        "peak_memory_bytes": peak_memory,
        "held_out_bytes": task.text.held_out_bytes,
        "held_out_sha256": task.text.held_out_sha256,
        "configuration": asdict(task.settings) | environment,
        "versions": info.versions(),
        "peer": peer,
    }
    _save_results(task, model, metrics)
    if peer:
        report.print_comparison(ours, peer)
    after = ours["bits_per_byte_after"]
    print(
        f"bits per byte {before:.4f} -> {after:.4f} ({after / before - 1:+.1%}), {ours['tokens_per_second']:,.0f} "
        f"tokens/s, peak memory {peak_memory / 2**20:,.0f} MiB; saved in {task.output}"
    )
    return 0
