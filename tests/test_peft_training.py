"""Training with PEFT, accelerated against stock: 200 steps of a small Llama on the help texts give the same losses."""

import math
import statistics
from typing import Any

import pytest
import torch
from tiny_models import transformers

import peftkern
from peftkern.cli import data
from peftkern.cli.finetune import EMBEDDED_MODEL
from peftkern.integrations.peft import calls

peft = pytest.importorskip("peft")

STEPS, ROWS, LENGTH = 200, 4, 32
LEARNING_RATE = 2e-3
DROPOUT_STEPS, DROPOUT_SEEDS = 40, 6


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """The bytes, which are the embedded model's tokens."""
    return torch.frombuffer(bytearray("".join(data.topics()).encode()), dtype=torch.uint8).long()


@pytest.fixture(autouse=True)
def one_thread(set_threads) -> None:
    set_threads(1)


def model(dtype: torch.dtype, four_bit: bool, layers: int, **options: Any) -> Any:
    """The first of the embedded model's six layers, with adapters on all that is linear."""
    base = transformers.LlamaForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=dtype)
    base.model.layers = base.model.layers[:layers]
    if four_bit:
        peftkern.to_bnb(peftkern.quantize(base))
        base.is_loaded_in_4bit = True
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
    return peft.get_peft_model(base, config).train()


def losses(
    model: Any, text: torch.Tensor, steps: int = STEPS, seed: int = 0, order: tuple[int, ...] = (0, 1, 2, 3)
) -> list[float]:
    """Of each step; always on the same windows. `order` is that of a batch's rows, `seed` is dropout's."""
    starts = data.window_starts(len(text), steps, ROWS, LENGTH, seed=0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE)
    torch.manual_seed(seed)
    found = []
    for start in starts:
        ids = text[start[list(order), None] + torch.arange(LENGTH)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def accelerated(model: Any, text: torch.Tensor, *args: int) -> list[float]:
    """The losses of an accelerated model, every forward on an op."""
    found = losses(peftkern.accelerate(model), text, *args)
    assert calls(model) and all(count == (len(found), {}) for count in calls(model).values())
    return found


def differences(actual: list[float], expected: list[float]) -> list[float]:
    """Relative, step by step."""
    return [a / e - 1 for a, e in zip(actual, expected, strict=True)]


def rms(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


@pytest.mark.parametrize(("four_bit", "options"), [(False, {}), (True, {"use_dora": True})], ids=["LoRA", "QDoRA"])
def test_fp32_losses_are_stock_s(four_bit, options, text):
    stock = losses(model(torch.float32, four_bit, layers=2, **options), text)
    ours = accelerated(model(torch.float32, four_bit, layers=2, **options), text)
    assert statistics.fmean(stock[-20:]) < 0.9 * stock[0]
    # What is wanted is 1e-3. The roundings of 200 steps, 1e-7 each, came to 1.4e-5 where this was written.
    assert max(map(abs, differences(ours, stock))) < 1e-4


def test_bf16_losses_are_stock_s_within_its_own_noise(text):
    """The noise is what stock differs by from itself when the rows of each batch change places.

    The mathematics is the same then, only sums over rows run in another order, as they do on another number of threads.
    """
    stock, ours = (train(model(torch.bfloat16, True, layers=1), text) for train in (losses, accelerated))
    # One order alone may agree with the first for long, and another leaves it early.
    orders = [(1, 0, 3, 2), (3, 2, 1, 0), (2, 3, 0, 1)]
    others = [losses(model(torch.bfloat16, True, layers=1), text, order=order) for order in orders]
    noise = max(rms(differences(other, stock)) for other in others)
    assert 1e-4 < noise < 3e-3
    # Ours rounds elsewhere from the first step on.
    assert rms(differences(ours, stock)) < 1.5 * noise
    assert abs(statistics.fmean(differences(ours, stock))) < noise / 2


def test_losses_with_dropout_are_stock_s_in_distribution(text):
    """Means over seeds, by Welch's t: masks differ, so single losses do."""

    def means(train: Any, dropout: float, first_seed: int) -> list[float]:
        seeds = range(first_seed, first_seed + DROPOUT_SEEDS)
        runs = [
            train(model(torch.float32, False, layers=1, lora_dropout=dropout), text, DROPOUT_STEPS, seed)
            for seed in seeds
        ]
        return [statistics.fmean(run) for run in runs]

    def t(a: list[float], b: list[float]) -> float:
        error = math.sqrt((statistics.variance(a) + statistics.variance(b)) / DROPOUT_SEEDS)
        return (statistics.fmean(a) - statistics.fmean(b)) / error

    stock, ours = means(losses, 0.5, 0), means(accelerated, 0.5, 100)
    # With 10 degrees of freedom, one pair of equal distributions in 400 gets here.
    assert abs(t(ours, stock)) < 4
    # And a wrong probability would be seen.
    assert t(stock, means(losses, 0.3, 200)) > 4
