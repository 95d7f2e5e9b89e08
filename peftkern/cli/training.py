"""The training loop of `peftkern finetune`: any model, its trainable parameters, resumable to the last bit."""

import io
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.cli.data import IGNORED, Tokens, window_starts
from peftkern.cli.errors import Diverged, Interrupted, UsageError

MAX_GRADIENT_NORM = 1.0
WARMUP_FRACTION = 0.05
FINAL_LEARNING_RATE_FRACTION = 0.1
# Per forward at least; fewer leave the cores idle.
EVALUATION_TOKENS = 1024
# What a power cut may cost; a checkpoint is the adapter three times over, so it is cheap.
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the losses; a checkpoint of other settings is not resumed.

    Attributes:
        rank, alpha, dropout: None for a method without.
    """

    method: str
    model: str
    train_sha256: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    rank: int | None
    alpha: float | None
    dropout: float | None
    dtype: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """The method's own."""
        own = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass
class Run:
    """How far a training run is: of each step done the loss in nats per token, and the seconds it took."""

    losses: list[float]
    seconds: list[float]

    def tokens_per_second(self, settings: Settings) -> float:
        """Of the median step: the first steps warm up, and other programs disturb some."""
        return settings.tokens_per_step / statistics.median(self.seconds)


class Display(Protocol):
    """Shows a step done."""

    def update(self, step: int, loss: float, tokens_per_second: float) -> None: ...


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_FRACTION * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * warmup * (FINAL_LEARNING_RATE_FRACTION + (1 - FINAL_LEARNING_RATE_FRACTION) * cosine)


def _cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    # A prompt has logits too, before the text's.
    logits = model(input_ids=inputs, use_cache=False).logits[:, -inputs.shape[1] :]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def bits_per_byte(model: nn.Module, tokens: Tokens, text_bytes: int, settings: Settings) -> float:
    """Bits the model needs for the held-out text, per UTF-8 byte of it: comparable between tokenizers.

    Every token is predicted once, from those before it in its window of `sequence_length`.
    """
    length = settings.sequence_length
    rows = max(settings.batch_size, EVALUATION_TOKENS // length)
    whole = len(tokens.targets) // length * length
    inputs = [*tokens.inputs[:whole].view(-1, length).split(rows), tokens.inputs[None, whole:]]
    targets = [*tokens.targets[:whole].view(-1, length).split(rows), tokens.targets[None, whole:]]
    model.eval()
    with torch.no_grad():
        nats = sum(_cross_entropy(model, x, y, "sum").item() for x, y in zip(inputs, targets) if x.numel())
    return nats / math.log(2) / text_bytes


def train(
    model: nn.Module, tokens: Tensor, settings: Settings, checkpoint: Path | None, resume: dict | None, display: Display
) -> Run:
    """Trains the parameters that require grad, in place, and leaves a checkpoint of the end.

    Args:
        model: a causal LM in the way of transformers.
        tokens: the training text, 1-D int64.
        checkpoint: the file to write, at the end, on Ctrl-C and every few minutes; None for none.
        resume: what `load_checkpoint` gave; None starts from the model as it is.

    Raises:
        Interrupted: Ctrl-C. The step was finished and the checkpoint written.
        Diverged: the loss is not finite.
        OSError: the checkpoint cannot be written.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0, fused=True)
    length = settings.sequence_length
    starts = window_starts(len(tokens), settings.steps, settings.batch_size, length, settings.seed)
    torch.manual_seed(settings.seed)
    run = Run([], []) if resume is None else _restore(resume, parameters, optimizer)
    model.train()
    saved_at = time.monotonic()
    with _deferred_interrupt() as interrupted:
        for step in range(len(run.losses), settings.steps):
            started = time.perf_counter()
            windows = tokens[starts[step, :, None] + torch.arange(length + 1)]
            loss = _cross_entropy(model, windows[:, :-1], windows[:, 1:], "mean")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), MAX_GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - started)
            if not math.isfinite(run.losses[-1]):
                raise Diverged(f"the loss is {run.losses[-1]} at step {step + 1}; lower --learning-rate")
            display.update(step + 1, run.losses[-1], run.tokens_per_second(settings))
            if checkpoint and (interrupted.is_set() or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                _save_checkpoint(checkpoint, settings, parameters, optimizer, run)
                saved_at = time.monotonic()
            if interrupted.is_set():
                saved = f", saved in {checkpoint}" if checkpoint else ""
                raise Interrupted(f"interrupted after step {step + 1} of {settings.steps}{saved}")
        if checkpoint:
            _save_checkpoint(checkpoint, settings, parameters, optimizer, run)
    return run


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in two; a second Ctrl-C stops at once."""
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, previous)
        asked.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def write_file(path: Path, content: bytes) -> None:
    """Writes all of a file or nothing: to a temporary name beside it, then a rename."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _save_checkpoint(
    path: Path, settings: Settings, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: Run
) -> None:
    state = {
        "settings": asdict(settings),
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "run": asdict(run),
    }
    # Into memory first: torch.save reports a full disk as a RuntimeError without the file's name.
    content = io.BytesIO()
    torch.save(state, content)
    write_file(path, content.getvalue())


def load_checkpoint(path: Path, settings: Settings) -> dict | None:
    """The state in `path`, None if there is no such file.

    Raises:
        UsageError: it is damaged, or of other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        theirs = state["settings"]
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} is damaged ({reason}); --restart begins anew") from error
    ours = asdict(settings)
    changed = (name for name, value in ours.items() if theirs.get(name) != value)
    different = [f"{name} {theirs.get(name)} (now {ours[name]})" for name in changed]
    if different:
        raise UsageError(
            f"{path} is of another run: {', '.join(different)}; finish that, take another --output, or give --restart"
        )
    return state


def _restore(state: dict, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Run:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return Run(**state["run"])
