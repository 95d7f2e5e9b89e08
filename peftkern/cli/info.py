"""`peftkern info`: what this build, this machine and this environment offer."""

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

import peftkern
from peftkern._native import caps
from peftkern.backends import BACKENDS, choose
from peftkern.cli.errors import UsageError

OPTIONAL_PACKAGES = (
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "matplotlib",
    "rich",
    "triton",
)
ENVIRONMENT = ("PEFTKERN_BACKEND", "PEFTKERN_ISA")


def versions() -> dict[str, str | None]:
    """Version of every package that plays a part; None: not installed."""
    found: dict[str, str | None] = {
        "peftkern": peftkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in OPTIONAL_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def isa() -> str:
    """The instruction set level that the CPU kernels run on.

    Raises:
        UsageError: PEFTKERN_ISA asks for one that does not exist or that this CPU lacks.
    """
    try:
        return caps.isa()
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def backend(dtype: torch.dtype = torch.float32) -> str:
    """The implementation that ops take for CPU tensors of this dtype.

    Raises:
        UsageError: PEFTKERN_BACKEND asks for one that does not exist or cannot run.
    """
    try:
        return choose("ops", torch.empty(0, dtype=dtype)).implementation
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"PEFTKERN_BACKEND: {error}") from error


def _backend_state(name: str) -> str:
    try:
        choose("nf4_linear", torch.empty(0), name)
    except RuntimeError as error:
        return str(error).removeprefix("nf4_linear: ")
    return "available"


def collect() -> dict[str, Any]:
    """Everything `peftkern info` shows, in JSON types.

    Raises:
        UsageError: as `isa` and `backend`.
    """
    return {
        "versions": versions(),
        "isa": isa(),
        "isa_levels": caps.isas(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "backend": backend(),
        "backends": {name: _backend_state(name) for name in BACKENDS if name != "auto"},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "cuda_archs": [name for name in caps.cuda_archs().split(",") if name],
        "build": caps.build_info(),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    levels = ", ".join(name for name, has in found["isa_levels"].items() if has)
    rows = [
        ("instruction set", f"{found['isa']} (here: {levels})"),
        ("threads", f"{found['threads']} of {found['cpus']} CPUs, {found['machine']}"),
        ("ops run on", f"backend {found['backend']}"),
        *((f"backend {name}", state) for name, state in found["backends"].items()),
        ("CUDA kernels", ", ".join(found["cuda_archs"]) or "not part of this build"),
        *((name, value) for name, value in found["environment"].items() if value),
        *((name, value or "not installed") for name, value in found["versions"].items()),
        ("build", ", ".join(f"{key} {value}" for key, value in found["build"].items())),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="instruction set, threads, backends and versions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0
