"""LoRA with transformers' Trainer: the usual script, and the one line that accelerates it. Prints both speeds.

    python examples/trainer_lora.py

trains the embedded byte-level Llama on the help texts of the Python standard library, first as it is, then accelerated.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

import peftkern

MODEL = Path(peftkern.__file__).parent / "data" / "base_model"


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def windows(length: int) -> list[dict[str, list[int]]]:
    """The text in pieces of `length` tokens."""
    tokens = AutoTokenizer.from_pretrained(MODEL)("\n".join(topics[name] for name in sorted(topics))).input_ids
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - length, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def train(dataset: list[dict[str, list[int]]], args: argparse.Namespace, accelerated: bool) -> tuple[float, float]:
    """Tokens per second, by the median step, and the mean loss of a run."""
    times = StepTimes()
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules="all-linear")
    model = get_peft_model(model, config)
    if accelerated:
        peftkern.accelerate(model)  # this line is all
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=2e-3,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        result = Trainer(model, settings, train_dataset=dataset, callbacks=[times]).train()
    return args.batch_size * args.length / statistics.median(times.seconds), result.training_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()

    dataset = windows(args.length)
    speeds = []
    for name, accelerated in (("stock", False), ("accelerated", True)):
        speed, loss = train(dataset, args, accelerated)
        speeds.append(speed)
        print(f"{name:12} {speed:8,.0f} tokens/s, mean loss {loss:.4f}", flush=True)
    print(f"{speeds[1] / speeds[0]:.2f} times as fast")


if __name__ == "__main__":
    main()
