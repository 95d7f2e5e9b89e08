"""The entry point that bitsandbytes calls; bnb_backend_cases.py has what it changes, for a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
(ENTRY,) = re.findall(r'\[project\.entry-points\."bitsandbytes\.backends"\]\n(peftkern = "(.+):(.+)")\n', PROJECT)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python in a process where the entry point is installed, in place of what this one has of peftkern."""
    installed = tmp_path / "peftkern-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: peftkern\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[bitsandbytes.backends]\n{ENTRY[0].replace(chr(34), '')}\n")

    def run(*arguments: str, setting: str | None) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        environment.pop("PEFTKERN_BNB", None)
        if setting is not None:
            environment["PEFTKERN_BNB"] = setting
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def test_the_entry_point_is_there():
    assert callable(getattr(import_module(ENTRY[1]), ENTRY[2]))


def test_what_the_backend_changes(run):
    done = run("-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/bnb_backend_cases.py", setting="1")
    assert done.returncode == 0, done.stdout


PROGRAM = """
import bitsandbytes
from peftkern.integrations import bnb_backend
print(bnb_backend._registered, isinstance(vars(bitsandbytes.nn.Linear4bit).get(bnb_backend._REPACKS), property))
"""


@pytest.mark.parametrize(("setting", "on"), [(None, True), ("1", True), ("0", False)])
def test_it_can_be_turned_off(setting, on, run):
    done = run("-W", "error::UserWarning", "-c", PROGRAM, setting=setting)
    assert (done.returncode, done.stdout) == (0, f"{on} {on}\n"), done.stderr
    assert "peftkern" not in done.stderr and "kernel for the same" not in done.stderr


UNKNOWN = """
from peftkern.integrations import bnb_backend
bnb_backend._quantize_4bit = lambda theirs: lambda A, block_size: theirs(A, block_size)
import bitsandbytes, torch
from peftkern._native import caps, ops
layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
layer(torch.ones(2, 64, requires_grad=True)).sum().backward()
print(bnb_backend._registered, ops.cpu_tiles_run(caps.isa()))
"""


def test_an_unknown_bitsandbytes_is_left_alone(run):
    done = run("-c", UNKNOWN, setting="1")
    assert (done.returncode, done.stdout) == (0, "False 0\n"), done.stderr
    said = (
        r"peftkern: bitsandbytes must be >=0\.50, <0\.51, whose ops it knows, got [\d.]+; it stays on its own kernels"
    )
    assert len(re.findall(said, done.stderr)) == 1


BROKEN = """
import sys
sys.modules["peftkern._caps"] = None  # what an import of a native module that does not load comes to
import bitsandbytes, torch
layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
print(tuple(layer(torch.ones(2, 64)).shape), "peftkern" in sys.modules)
"""


@pytest.mark.parametrize("setting", [None, "0"])
def test_a_peftkern_that_cannot_be_imported_does_no_harm(setting, run):
    done = run("-c", BROKEN, setting=setting)
    assert (done.returncode, done.stdout) == (0, "(2, 32) False\n"), done.stderr
    said = re.search("peftkern cannot be imported (.+); bitsandbytes stays on its own kernels", done.stderr)
    assert (said is None) == (setting == "0")


def test_other_settings_are_refused(run):
    done = run("-c", PROGRAM, setting="no")
    assert "failed to load backend peftkern: PEFTKERN_BNB must be 0 or 1, got 'no'" in done.stderr
