"""PEFT's own tests of the layers that the ops know, accelerated: those that the whole of `make peft-suite` turns on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
LEAST_TESTS = 3_000
LEAST_SHARE = 0.6


def test_peft_s_tests_pass_on_the_ops(capsys):
    """The source archive comes from the package index; without it this fails, for a skipped proof is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/peft_suite.py", "--linear"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "could not download" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    _, _, summary = done.stdout.partition("share of the forwards of PEFT's layers")
    with capsys.disabled():
        print(f"\npeftkern's share{summary.rstrip()}")
    (passed,) = re.findall(r"^(\d+) passed", summary, re.M)
    assert int(passed) >= LEAST_TESTS and "failed" not in summary
    rows = {
        name: (int(fast), int(total)) for name, fast, total in re.findall(r"^(.+?) +(\d+) of +(\d+) ", summary, re.M)
    }
    fast, total = rows["all"]
    assert fast / total >= LEAST_SHARE, rows
