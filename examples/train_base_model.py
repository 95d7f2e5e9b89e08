"""Train the byte-level Llama that ships in peftkern/data/base_model.

The corpus is the Python standard library's own sources (every .py file below the stdlib folder, without tests,
third-party packages and pydoc_data, whose topics.py is the fine-tuning text). The result is an ordinary Hugging Face
folder: config.json, model.safetensors (bf16) and a tokenizer whose token ids are the byte values.

    python examples/train_base_model.py --output peftkern/data/base_model          # about an hour on two cores
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "__pycache__", "lib2to3"}


def stdlib_bytes() -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return b"\n".join(path.read_bytes() for path in files)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value. The vocabulary names bytes as GPT-2's byte-level alphabet does: printable Latin-1
    characters stand for themselves, the other 68 bytes for the code points from 256 on, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    vocab = {chr(byte) if byte in printable else chr(next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warmup = min(1.0, (step + 1) / 100)
    return peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    corpus = stdlib_bytes()
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
    held_out, train = data[-len(data) // 50 :], data[: -len(data) // 50]
    model = build_model()
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes of corpus", flush=True)

    window = torch.arange(args.sequence_length)
    started = time.perf_counter()
    smooth = None
    for step in range(args.steps):
        starts = torch.randint(len(train) - args.sequence_length, (args.batch_size, 1))
        batch = train[starts + window].long()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        bits = loss.item() / math.log(2)
        smooth = bits if smooth is None else 0.98 * smooth + 0.02 * bits
        if step % 20 == 0:
            rate = (step + 1) * batch.numel() / (time.perf_counter() - started)
            print(f"step {step:5d}  {smooth:.3f} bits per byte  {rate:,.0f} tokens/s", flush=True)

    with torch.no_grad():
        pieces = held_out[: len(held_out) // args.sequence_length * args.sequence_length]
        batches = pieces.view(-1, args.sequence_length).long().split(args.batch_size)
        losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() for b in batches]
    bits_per_byte = sum(losses) / len(losses) / math.log(2)
    print(f"held-out bits per byte {bits_per_byte:.4f}", flush=True)

    model.to(torch.bfloat16).save_pretrained(args.output)
    byte_tokenizer().save_pretrained(args.output)
    record = {
        "corpus": "Python standard library sources",
        "python": platform.python_version(),
        "corpus_bytes": len(corpus),
        "corpus_sha256": hashlib.sha256(corpus).hexdigest(),
        "steps": args.steps,
        "tokens": args.steps * args.batch_size * args.sequence_length,
        "held_out_bits_per_byte": round(bits_per_byte, 4),
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
