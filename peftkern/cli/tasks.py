"""What `peftkern compare` trains every method on: a base model, training, a measure, and an old task to keep."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.cli import data, loading, presets, training
from peftkern.cli.errors import Diverged, UsageError
from peftkern.cli.training import Display, Settings

LATENCY_TOKENS = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IMAGE_SIDE, CLASSES, TEST_IMAGES = 8, 10, 360
BASE_STEPS, BASE_LEARNING_RATE, DIGITS_BATCH = 400, 3e-3, 64
DIGITS_BITFIT_LEARNING_RATE = 1e-2

VISION_TRANSFORMER: dict[str, Any] = {
    "image_size": IMAGE_SIDE,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": CLASSES,
}


class Task(Protocol):
    """One comparison's model and data; pickled to the process that measures a method.

    Attributes:
        quality_name: what `quality` gives.
        higher_is_better: of it.
        unit: what a step has many of.
        steps: optimizer steps.
    """

    quality_name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    unit: ClassVar[str]

    @property
    def steps(self) -> int: ...

    def options(self, method: str) -> dict[str, Any]:
        """What the method is installed with."""

    def learning_rate(self, method: str) -> float:
        """The peak."""

    def load(self) -> nn.Module:
        """The base model."""

    def train(self, model: nn.Module, method: str, display: Display) -> float:
        """Trains what requires grad, in place; gives the median step's seconds."""

    def quality(self, model: nn.Module) -> float:
        """On the new task's held-out part."""

    def old_task(self, model: nn.Module) -> Tensor:
        """The model's outputs on what it knew before."""

    def run_once(self, model: nn.Module) -> None:
        """One small inference, for timing."""


@dataclass(frozen=True)
class Text:
    """A causal LM on text: bits per byte of the held-out part."""

    quality_name: ClassVar[str] = "bits per byte"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"

    folder: Path
    embedded: bool
    data_file: Path | None
    steps: int
    batch_size: int
    sequence_length: int
    dtype: str
    seed: int

    def options(self, method: str) -> dict[str, Any]:
        return presets.default_sizes(method)

    def learning_rate(self, method: str) -> float:
        return presets.learning_rate(method, self.embedded)

    def read(self) -> tuple[data.Split, data.Tokens]:
        """Text and tokens, checked against the batch.

        Raises:
            UsageError: a file or folder that cannot be used.
        """
        text = data.split(data.topics() if self.data_file is None else data.read_documents(self.data_file))
        tokens = data.tokenize(text, loading.load_tokenizer(self.folder))
        data.check_length(tokens, self.batch_size, self.sequence_length)
        return text, tokens

    def load(self) -> nn.Module:
        return loading.load_model(self.folder, DTYPES[self.dtype])

    def train(self, model: nn.Module, method: str, display: Display) -> float:
        run = training.train(model, self.read()[1].train, self._settings(method), None, None, display)
        return statistics.median(run.seconds)

    def quality(self, model: nn.Module) -> float:
        text, tokens = self.read()
        return training.bits_per_byte(model, tokens, text.held_out_bytes, self._settings())

    @torch.no_grad()
    def old_task(self, model: nn.Module) -> Tensor:
        return model.eval()(input_ids=self._ids(), use_cache=False).logits

    @torch.no_grad()
    def run_once(self, model: nn.Module) -> None:
        model(input_ids=self._ids(), use_cache=False)

    def _ids(self) -> Tensor:
        """As many tokens as fit, the same ones always."""
        generator = torch.Generator().manual_seed(self.seed)
        # The embedded model's vocabulary is bytes; any other is larger.
        return torch.randint(0, 256, (1, min(LATENCY_TOKENS, self.sequence_length)), generator=generator)

    def _settings(self, method: str = "") -> Settings:
        return Settings(
            method=method,
            model=str(self.folder),
            train_sha256="",
            steps=self.steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            learning_rate=self.learning_rate(method),
            rank=None,
            alpha=None,
            dropout=None,
            dtype=self.dtype,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits with a small vision transformer: a domain shift to turned and inverted ones.

    The base learns the upright ones on the spot; a method then has to read the shifted ones. `old_task` are the upright
    ones: with the adapter off, their logits must not change by one bit.
    """

    quality_name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "images"

    folder: Path
    steps: int
    seed: int

    def options(self, method: str) -> dict[str, Any]:
        ours: dict[str, dict[str, Any]] = {
            "ia3": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
        }
        return presets.default_sizes(method) | ours.get(method, {})

    def learning_rate(self, method: str) -> float:
        # At the language model's 4e-2 the accuracy stays at chance (0.12), at 1e-2 it is 0.23.
        return DIGITS_BITFIT_LEARNING_RATE if method == "bitfit" else presets.learning_rate(method, embedded=True)

    def train_base(self, display: Display) -> None:
        """Trains the base from nothing and saves it in `folder`."""
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(self.seed)
        model = ViTForImageClassification(ViTConfig(**VISION_TRANSFORMER))
        self._fit(model, _digits(self.seed, shifted=False)[:2], BASE_STEPS, BASE_LEARNING_RATE, display)
        model.save_pretrained(self.folder)

    def load(self) -> nn.Module:
        from transformers import ViTForImageClassification

        return ViTForImageClassification.from_pretrained(self.folder, local_files_only=True)

    def train(self, model: nn.Module, method: str, display: Display) -> float:
        images = _digits(self.seed, shifted=True)[:2]
        return self._fit(model, images, self.steps, self.learning_rate(method), display)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        _, _, images, labels = _digits(self.seed, shifted=True)
        return accuracy(model.eval()(pixel_values=images).logits, labels)

    @torch.no_grad()
    def old_task(self, model: nn.Module) -> Tensor:
        return model.eval()(pixel_values=_digits(self.seed, shifted=False)[2]).logits

    def old_accuracy(self, logits: Tensor) -> float:
        """Of what `old_task` gave."""
        return accuracy(logits, _digits(self.seed, shifted=False)[3])

    @torch.no_grad()
    def run_once(self, model: nn.Module) -> None:
        model(pixel_values=torch.zeros(DIGITS_BATCH, 1, IMAGE_SIDE, IMAGE_SIDE))

    def _fit(
        self, model: nn.Module, examples: tuple[Tensor, Tensor], steps: int, peak: float, display: Display
    ) -> float:
        images, labels = examples
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        seconds = []
        model.train()
        for step in range(steps):
            started = time.perf_counter()
            chosen = torch.randint(0, len(images), (DIGITS_BATCH,), generator=generator)
            loss = F.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.MAX_GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate(step, steps, peak)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            if not math.isfinite(loss.item()):
                raise Diverged(f"the loss is {loss.item()} at step {step + 1}")
            display.update(step + 1, loss.item(), DIGITS_BATCH / statistics.median(seconds))
        return statistics.median(seconds)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def check_digits() -> None:
    """Raises UsageError if scikit-learn is missing."""
    if find_spec("sklearn") is None:
        raise UsageError("--task digits needs scikit-learn: pip install 'peftkern[bench]'")


def _digits(seed: int, shifted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels) to train on and (images, labels) to test on: images [n, 1, 8, 8] from 0 to 1."""
    from sklearn.datasets import load_digits

    found = cast(Any, load_digits())
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    if shifted:
        images = 1 - images.rot90(1, (2, 3))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    return images[train], labels[train], images[test], labels[test]
