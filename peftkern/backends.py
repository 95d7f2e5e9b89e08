"""Which implementation of an op runs: the `backend` argument, then PEFTKERN_BACKEND, then a written rule ("auto").

A backend asked for by name runs or raises; only auto chooses. The rule for auto:

- `cpu` (C++): x on the CPU in fp32, bf16 or fp16.
- `reference` (plain torch): everything else, which is float64 and other devices.

No GPU has run the `cuda` kernels on record yet, so auto leaves them alone: they run where they are asked for.
"""

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from peftkern._native import caps

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = CPU_DTYPES
CUDA_OPS = ("nf4_quantize", "nf4_dequantize", "nf4_linear")


class Choice(NamedTuple):
    """An implementation's name and why it was taken."""

    implementation: str
    reason: str


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


def choose(op: str, x: torch.Tensor, backend: str | None = None) -> Choice:
    """The implementation of `op` for input `x`.

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: the backend asked for cannot run this input.
    """
    choice = _choose(op, x, backend)
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


def _choose(op: str, x: torch.Tensor, backend: str | None) -> Choice:
    name, why = _requested(backend)
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    runs_on_cpu = x.device.type == "cpu" and x.dtype in CPU_DTYPES
    if name == "auto":
        if runs_on_cpu:
            return Choice("cpu", f"auto: x is {x.dtype} on the CPU")
        return Choice("reference", f"auto: no kernel for {x.dtype} on {x.device.type}")
    if name == "cpu" and not runs_on_cpu:
        raise RuntimeError(
            f"{op}: backend 'cpu' takes fp32, bf16 or fp16 on the CPU, got {x.dtype} on {x.device}; "
            "use backend='reference' or move x"
        )
    if name == "cuda" and (problem := _cuda_problem(op, x)):
        raise RuntimeError(f"{op}: backend 'cuda' {problem}")
    if name == "triton":
        raise RuntimeError(f"{op}: backend {name!r} is not part of this build")
    return Choice(name, why)


def _cuda_problem(op: str, x: torch.Tensor) -> str | None:
    """Why the CUDA kernels cannot run `op` on x; None if they can."""
    if not caps.cuda_archs():
        return "is not part of this build, which found no nvcc"
    if x.device.type != "cuda":
        return f"needs tensors on a CUDA device, got x on {x.device}"
    if x.dtype not in CUDA_DTYPES:
        return f"takes fp32, bf16 or fp16, got {x.dtype}; use backend='reference'"
    if op not in CUDA_OPS:
        return "has no kernel for this op"
    return None
