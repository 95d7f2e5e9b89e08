"""The Triton backend: tests/gpu by Triton's interpreter, each file in a process of its own, and what cannot run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftkern
from peftkern import backends
from peftkern.backends import Choice, interpreting
from peftkern.ops._op import NATIVE, TRITON

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests/gpu").glob("test_*_triton.py"))


@pytest.mark.skipif(interpreting(), reason="pytest runs them by itself")
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_interpreted(file: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 pytest {file.relative_to(ROOT)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_files_are_found() -> None:
    """One for every file of kernels."""
    kernels = {file.stem for file in (ROOT / "peftkern/ops").glob("[a-z]*_triton.py")}
    assert kernels and {f"test_{name}" for name in kernels} <= {file.stem for file in FILES}


# dora_norm is the public name of dora_linear_norm.
@pytest.mark.parametrize("op", sorted(backends.TRITON_OPS - {"dora_norm"}))
def test_schemas_are_the_native_ones(op: str) -> None:
    native, triton = (str(getattr(ops.library, op).default._schema).partition("::")[2] for ops in (NATIVE, TRITON))
    assert native == triton


OP = "nf4_dequantize"


def choice(device: str, dtype: torch.dtype = torch.bfloat16, backend: str | None = None, op: str = OP) -> Choice:
    with FakeTensorMode():
        return backends.choose(op, torch.empty(1, dtype=dtype, device=device), backend)


def test_auto_takes_triton_only_where_a_record_vouches_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice("cuda").implementation == "torch" and "no record of a GPU" in choice("cuda").reason
    monkeypatch.setattr(backends, "GPU_RECORDS", {OP: ("triton", "chip.json")})
    assert choice("cuda") == Choice("triton", "auto: right and not slower than torch's ops by chip.json")
    assert choice("cuda", torch.float64).implementation == "reference"
    assert choice("cpu").implementation == "cpu"


def test_records_exist() -> None:
    assert all((ROOT / "benchmarks/results/gpu" / record).is_file() for _, record in backends.GPU_RECORDS.values())


def test_asked_for_by_name() -> None:
    pytest.importorskip("triton")
    assert choice("cuda", backend="triton") == Choice("triton", "backend='triton' was asked for", asked=True)


class OldTriton:
    __version__ = "3.5.1"


@pytest.mark.parametrize(
    ("module", "device", "dtype", "op", "message"),
    [
        (None, "cuda", torch.float32, OP, "needs triton 3.6 or newer, which is not installed"),
        (OldTriton, "cuda", torch.float32, OP, "needs triton 3.6 or newer, got 3.5.1"),
        ("triton", "cuda", torch.float64, OP, "takes fp32, bf16 or fp16, got torch.float64"),
        ("triton", "meta", torch.float32, OP, "needs tensors on a GPU.*, got x on meta"),
        ("triton", "cuda", torch.float32, "nf4_quantize", "has no kernel for this op"),
    ],
)
def test_what_cannot_run(
    monkeypatch: pytest.MonkeyPatch, module: Any, device: str, dtype: torch.dtype, op: str, message: str
) -> None:
    if module == "triton":
        pytest.importorskip("triton")
    else:
        monkeypatch.setitem(sys.modules, "triton", module)
    with pytest.raises(RuntimeError, match=f"{op}: backend 'triton' {message}"):
        choice(device, dtype, "triton", op)


@pytest.mark.skipif(interpreting(), reason="the interpreter takes tensors on the CPU")
def test_tensors_on_the_cpu() -> None:
    pytest.importorskip("triton")
    where = "needs tensors on a GPU" + ("" if torch.cuda.is_available() else r" \(torch finds none here\)")
    with pytest.raises(RuntimeError, match=f"nf4_dequantize: backend 'triton' {where}, got x on cpu"):
        peftkern.nf4_dequantize(peftkern.nf4_quantize(torch.randn(4, 64)), backend="triton")
