"""How the CPU engine shares out its work: enough tiles for all threads, the same bits on any number, and its memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from linear_cases import random_nf4
from torch import Tensor

from peftkern._native import caps, ops
from peftkern.ops._linear import native_weight

DEPTH = 64


def cut(rows: int, columns: int) -> int:
    """Into how many tiles the engine cuts a product [rows, columns]."""
    weight = random_nf4((columns, DEPTH))
    before = ops.cpu_tiles_run(caps.isa())
    ops.nf4_linear(torch.zeros(rows, DEPTH), *native_weight(weight), None)
    return int(ops.cpu_tiles_run(caps.isa()) - before)


# Ranks, a few columns, beside a tile's width, and wide.
@pytest.mark.parametrize("columns", [1, 16, 64, 65, 130, 200, 512, 513, 1088])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 64])
def test_every_thread_gets_a_tile(threads: int, columns: int, set_threads: Any, seed: int) -> None:
    """As long as it gets 32 rows or 64 columns."""
    set_threads(threads)
    for rows in (1, 31, 63, 64, 96, 100, 127, 128, 129, 192, 255, 256, 257, 320, 384, 512, 600, 768, 1000, 1024, 2048):
        most = max(1, rows // 32) * -(-columns // 64)
        assert cut(rows, columns) >= min(threads, most), rows


def test_the_low_rank_products_are_shared(set_threads: Any, seed: int) -> None:
    set_threads(2)
    a, b = torch.randn(16, DEPTH), torch.randn(512, 16)
    for rows in (64, 128, 256, 512):
        before = ops.cpu_tiles_run(caps.isa())
        weight = native_weight(torch.randn(512, DEPTH))
        ops.lora_linear(torch.randn(rows, DEPTH), *weight, a, b, 1.0, None, 0.0, None)
        assert ops.cpu_tiles_run(caps.isa()) - before >= 4, rows


THREADS = (1, 2, 3, 8, 50, 64, 192)


def on_threads(set_threads: Any, compute: Any) -> list[Tensor]:
    results = []
    for threads in THREADS:
        set_threads(threads)
        results.append(compute())
    return results


# Those whose last tile of rows was short on few threads and not on many, then such as lie beside a border.
@pytest.mark.parametrize("rows", [10082, 10086, 24, 25, 63, 64, 259, 280, 516, 520])
@pytest.mark.parametrize("columns", [64, 200, 256])
def test_threads_change_nothing(isa: str, rows: int, columns: int, set_threads: Any, seed: int) -> None:
    if rows > 10000 and isa == "scalar":
        pytest.skip("has no kernel for few rows, and is slow")
    x, weight = torch.randn(rows, 128).bfloat16(), random_nf4((columns, 128))
    arguments = (*native_weight(weight), None)
    first, *others = on_threads(set_threads, lambda: ops.nf4_linear(x, *arguments))
    for threads, other in zip(THREADS[1:], others):
        assert torch.equal(first, other), threads


@pytest.mark.parametrize("rows", [64, 300, 520])
def test_threads_change_nothing_in_a_batch_of_adapters(isa: str, rows: int, set_threads: Any, seed: int) -> None:
    """A border of tiles may leave an adapter few rows."""
    x, weight = torch.randn(rows, 128).bfloat16(), random_nf4((200, 128))
    a, b = [torch.randn(rank, 128) for rank in (3, 16)], [torch.randn(200, rank) for rank in (3, 16)]
    indices = torch.arange(rows) * 7 % 3 - 1
    arguments = (*native_weight(weight), a, b, [0.5, 2.0], indices, None, 0.0, None)
    first, *others = on_threads(set_threads, lambda: torch.cat(ops.multi_lora_linear(x, *arguments), dim=1))
    for threads, other in zip(THREADS[1:], others):
        assert torch.equal(first, other), threads


def test_no_memory_for_a_workspace() -> None:
    """An error that says how much was wanted, as often as it happens; then calls work again."""
    pytest.importorskip("resource")
    code = """
import resource, torch
from peftkern._native import ops
torch.set_num_threads(1)
x, weight, query = torch.ones(2, 8), torch.eye(8), torch.ones(1, 1, 2, 512)
linear = lambda: ops.ia3_linear(x, [weight], [0, 0, 8, 8, 1], torch.ones(8), None, False)
attention = lambda: ops.prefix_attention(query, query, query, query[0], query[0], None, False, 1.0)[0]
torch.ones(1) + 1
limit = resource.getrlimit(resource.RLIMIT_AS)
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 17), limit[1]))
texts = []
for call in (linear, linear, attention):
    try:
        call()
    except RuntimeError as error:
        texts.append(str(error))
resource.setrlimit(resource.RLIMIT_AS, limit)
assert torch.equal(linear(), x) and attention().isfinite().all()
print(texts)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    texts = eval(ran.stdout)
    assert len(texts) == 3, texts
    for text in texts[:2]:
        assert "ia3_linear: no memory for a workspace of " in text and " bytes" in text
