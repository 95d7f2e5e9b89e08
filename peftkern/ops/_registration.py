"""Ops in two namespaces, `peftkern` (C++) and `peftkern_triton`, with one schema, one fake and one autograd formula.

Triton and its kernels are imported when an op of the second first runs; torch.compile sees an opaque op either way.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from peftkern import backends
from peftkern._native import ops as _native_ops
from peftkern.ops._autograd import eager

_library = torch.library.Library("peftkern_triton", "DEF")


class Namespace:
    """Ops as attributes, called by position: as `eager` makes them where it can, else as torch.library has them."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)


NATIVE, TRITON = Namespace(_native_ops), Namespace(torch.ops.peftkern_triton)
# Of each implementation; the device of the tensors tells C++ and CUDA apart.
NAMESPACES = {"cpu": NATIVE, "cuda": NATIVE, "triton": TRITON}


def register(
    op: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    *,
    triton: str,
) -> None:
    """Registers what an op has beside its kernels, in both namespaces.

    Args:
        op: its name in `csrc/ops.cpp`, from where the schema is taken.
        fake: the result's shapes.
        backward: the autograd formula, `backward(ops, ctx, *grads)` where `ops` is the namespace that forward was of.
        setup_context: what it saves.
        triton: the module of `peftkern.ops` whose function `op` is the Triton implementation.
    """
    schema = str(getattr(_native_ops, op).default._schema)
    _library.define(schema.removeprefix("peftkern::"))

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"peftkern.ops.{triton}"), op)(*args)

    for device in ("CUDA", "CPU"):  # the CPU under Triton's interpreter; `backends.choose` has checked that
        _library.impl(op, run, device)
    for ops in (NATIVE, TRITON):
        name = f"{ops.library.name}::{op}"
        torch.library.register_fake(name, fake)
        if backward is None:
            continue
        formula = partial(backward, ops)
        torch.library.register_autograd(name, formula, setup_context=setup_context)
        if "Tensor[]" not in schema:
            setattr(ops, op, eager(getattr(ops.library, op).default, formula, setup_context))
    backends.TRITON_OPS.add(op)
