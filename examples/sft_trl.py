"""QLoRA with TRL's SFTTrainer: the usual script, and the one line that accelerates it. Prints both speeds.

    python examples/sft_trl.py

trains the embedded byte-level Llama on the help texts of the Python standard library, first as it is, then accelerated.
It needs the extras hf, bench and examples.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

# Else bitsandbytes, once peftkern is installed, would run on our kernels in the run that is to be stock.
os.environ.setdefault("PEFTKERN_BNB", "0")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

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


def train(dataset: Dataset, args: argparse.Namespace, accelerated: bool) -> tuple[float, float]:
    """Tokens per second, by the median step, and the mean loss of a run."""
    times = StepTimes()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    # The model knows no token that ends a text; a newline, as its vocabulary spells it, will do.
    tokenizer = AutoTokenizer.from_pretrained(MODEL, eos_token="Ċ", pad_token="Ċ")
    with tempfile.TemporaryDirectory() as output:
        settings = SFTConfig(
            output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.length,
            packing=True,
            packing_strategy="wrapped",
            gradient_checkpointing=False,
            bf16=False,
            learning_rate=2e-3,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=dataset,
            callbacks=[times],
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules="all-linear"),
        )
        if accelerated:
            peftkern.accelerate(trainer.model)  # this line is all
        result = trainer.train()
    return args.batch_size * args.length / statistics.median(times.seconds), result.training_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()

    dataset = Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})
    speeds = []
    for name, accelerated in (("stock", False), ("accelerated", True)):
        speed, loss = train(dataset, args, accelerated)
        speeds.append(speed)
        print(f"{name:12} {speed:8,.0f} tokens/s, mean loss {loss:.4f}", flush=True)
    print(f"{speeds[1] / speeds[0]:.2f} times as fast")


if __name__ == "__main__":
    main()
