"""Tests of the GPU kernels: on a GPU, and the Triton ones on the CPU by Triton's interpreter (TRITON_INTERPRET=1).

Without either nothing here is collected; `tests/test_triton.py` runs each Triton file in a process that interprets.
"""

import pytest
import torch

from peftkern.backends import interpreting

RUNS = interpreting() or torch.cuda.is_available()
collect_ignore_glob = [] if RUNS else ["test_*.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if interpreting() else "cuda"
