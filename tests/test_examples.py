"""The training examples run, accelerated to the losses of stock."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


def run(example: str, *options: str) -> list[float]:
    """The mean losses, stock's and ours, that an example prints."""
    command = [sys.executable, f"examples/{example}", "--steps", "3", "--batch-size", "2", "--length", "32", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(stock|accelerated) +[\d,]+ tokens/s, mean loss (\d\.\d+)$", done.stdout, re.M)
    assert [name for name, _ in lines] == ["stock", "accelerated"], done.stdout
    assert re.search(r"^\d+\.\d\d times as fast$", done.stdout, re.M)
    return [float(loss) for _, loss in lines]


# bf16: 3 significant digits.
def test_trainer():
    stock, ours = run("trainer_lora.py", "--dropout", "0")
    assert ours == pytest.approx(stock, rel=3e-3)


def test_sft_trainer():
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    stock, ours = run("sft_trl.py", "--dropout", "0")
    assert ours == pytest.approx(stock, rel=3e-3)
