"""Which implementation of an op runs: the `backend` argument, then PEFTKERN_BACKEND, then a written rule ("auto").

A backend asked for by name runs or raises; only auto chooses. The rule for auto:

- `cpu` (C++): x on the CPU in fp32, bf16 or fp16.
- `cuda` (C++) or `triton`: x on a GPU in these dtypes, and a committed record says that the op's kernels are right
  there and not slower than `torch`. There is no record yet.
- `torch` (composed of torch's ops, in x's dtype): in these dtypes on every other device.
- `reference` (the formula in fp32 or float64, the tests' oracle): float64.
"""

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from peftkern._native import caps

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "cuda")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = CUDA_DTYPES = TORCH_DTYPES = CPU_DTYPES
OLDEST_TRITON = (3, 6)
# Ops with Triton kernels; each adds itself.
TRITON_OPS: set[str] = set()
CUDA_OPS = ("nf4_quantize", "nf4_dequantize", "nf4_linear", "lora_linear")
# Of ops whose CUDA kernels take some calls only: a function of what `choose` is given of the call, x first, that says
# what they do not take, None where they take it. Each op adds its own.
CUDA_LIMITS: dict[str, Callable[..., str | None]] = {}
# Op to its backend on a GPU, and the file in benchmarks/results/gpu/ that says that its kernels are right and not
# slower than torch's ops.
GPU_RECORDS: dict[str, tuple[str, str]] = {}


class Choice(NamedTuple):
    """An implementation's name, why it was taken, and whether it was asked for by name."""

    implementation: str
    reason: str
    asked: bool = False


# Made once: every call of every op asks.
_CPU_CHOICES = {dtype: Choice("cpu", f"auto: x is {dtype} on the CPU") for dtype in CPU_DTYPES}


class _Chosen(Exception):
    """Carries a choice out of a call that must not run."""

    def __init__(self, op: str, choice: Choice) -> None:
        super().__init__(op, choice)
        self.op = op
        self.choice = choice


_stop_at_choice: ContextVar[bool] = ContextVar("peftkern_stop_at_choice", default=False)


def _requested(backend: str | None) -> tuple[str, str]:
    if backend is not None:
        return backend, f"backend={backend!r} was asked for"
    from_environment = os.environ.get("PEFTKERN_BACKEND")
    if from_environment:
        return from_environment, f"PEFTKERN_BACKEND={from_environment} is set"
    return "auto", ""


def check_environment(op: str) -> None:
    """For calls that need not choose: raises ValueError if PEFTKERN_BACKEND is set to no backend's name."""
    _check_name(op, os.environ.get("PEFTKERN_BACKEND") or "auto")


def _check_name(op: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def choose(op: str, x: torch.Tensor, backend: str | None = None, *call: Any) -> Choice:
    """The implementation of `op` for input `x`; `call` is what else its CUDA_LIMITS look at, if that is known.

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: the backend asked for cannot run this input.
    """
    choice = _choose(op, x, backend, call)
    if not torch.compiler.is_compiling() and _stop_at_choice.get():
        raise _Chosen(op, choice)
    return choice


def choice_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Choice] | None:
    """The op and implementation that a call would choose first; the call ends there. None if it chooses nothing."""
    token = _stop_at_choice.set(True)
    try:
        function(*args, **kwargs)
    except _Chosen as chosen:
        return chosen.op, chosen.choice
    finally:
        _stop_at_choice.reset(token)
    return None


def _choose(op: str, x: torch.Tensor, backend: str | None, call: tuple[Any, ...]) -> Choice:
    name, why = _requested(backend)
    _check_name(op, name)
    runs_on_cpu = x.device.type == "cpu" and x.dtype in CPU_DTYPES
    if name == "auto":
        if runs_on_cpu:
            return _CPU_CHOICES[x.dtype]
        if x.dtype not in TORCH_DTYPES:
            return Choice("reference", f"auto: no kernel for {x.dtype} on {x.device.type}")
        if x.device.type == "cuda":
            return _auto_on_gpu(op, x, call)
        return Choice("torch", f"auto: torch's ops on {x.device.type}, for which there are no kernels")
    if name == "torch" and x.dtype not in TORCH_DTYPES:
        raise RuntimeError(f"{op}: backend 'torch' takes fp32, bf16 or fp16, got {x.dtype}; use backend='reference'")
    if name == "cpu" and not runs_on_cpu:
        raise RuntimeError(
            f"{op}: backend 'cpu' takes fp32, bf16 or fp16 on the CPU, got {x.dtype} on {x.device}; "
            f"use backend={'torch' if x.dtype in TORCH_DTYPES else 'reference'!r} or move x"
        )
    if name == "triton" and (problem := _triton_problem(op, x)):
        raise RuntimeError(f"{op}: backend 'triton' {problem}")
    if name == "cuda" and (problem := _cuda_problem(op, x)):
        raise RuntimeError(f"{op}: backend 'cuda' {problem}")
    if name == "cuda" and (limit := _cuda_limit(op, x, call)):
        raise RuntimeError(f"{op}: backend 'cuda' {limit}; use backend='triton' or 'torch'")
    return Choice(name, why, asked=True)


def _auto_on_gpu(op: str, x: torch.Tensor, call: tuple[Any, ...]) -> Choice:
    """The kernels where a record vouches for them and they take the call, else torch's ops."""
    if op in GPU_RECORDS:
        backend, record = GPU_RECORDS[op]
        if backend == "cuda" and (limit := _cuda_limit(op, x, call)):
            return Choice("torch", f"auto: backend 'cuda' {limit}")
        return Choice(backend, f"auto: right and not slower than torch's ops by {record}")
    return Choice("torch", "auto: torch's ops; no record of a GPU says that a kernel is right and not slower")


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU. Triton reads the variable as this does."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _triton_problem(op: str, x: torch.Tensor) -> str | None:
    """Why Triton cannot run `op` on x; None if it can."""
    if x.dtype not in TRITON_DTYPES:
        return f"takes fp32, bf16 or fp16, got {x.dtype}; use backend='reference'"
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        import triton
    except ImportError:
        return f"needs triton {oldest} or newer, which is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"needs triton {oldest} or newer, got {triton.__version__}"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        has_gpu = torch.cuda.is_available()
        return f"needs tensors on a GPU{'' if has_gpu else ' (torch finds none here)'}, got x on {x.device}"
    if op not in TRITON_OPS:
        return "has no kernel for this op"
    return None


def _cuda_problem(op: str, x: torch.Tensor) -> str | None:
    """Why the CUDA kernels cannot run `op` on x; None if they can."""
    if not caps.cuda_archs():
        return "is not part of this build (where no GPU is visible, cmake builds it with -DPEFTKERN_CUDA=ON)"
    if x.device.type != "cuda":
        return f"needs tensors on a CUDA device, got x on {x.device}"
    if x.dtype not in CUDA_DTYPES:
        return f"takes fp32, bf16 or fp16, got {x.dtype}; use backend='reference'"
    if op not in CUDA_OPS:
        return "has no kernel for this op"
    return None


def _cuda_limit(op: str, x: torch.Tensor, call: tuple[Any, ...]) -> str | None:
    """What of this call the op's CUDA kernels do not take; None if all, or if nothing is known of the call."""
    return CUDA_LIMITS[op](x, *call) if call and op in CUDA_LIMITS else None
