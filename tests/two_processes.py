"""Runs a test's worker in two processes of one gloo group."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
SHARDS_UINT8 = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="FSDP2 shards uint8 parameters from torch 2.13 on"
)

Worker = Callable[[int, Path], None]


def spawn(worker: Worker, directory: Path) -> None:
    """Runs `worker(rank, directory)` in two processes; an error in either is raised here."""
    mp.spawn(_start, args=(worker, directory), nprocs=WORLD_SIZE)


def _start(rank: int, worker: Worker, directory: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    worker(rank, directory)
    dist.barrier()
    dist.destroy_process_group()
    # Without the interpreter's end: threads of torch's that are still there then abort the process now and then.
    os._exit(0)
