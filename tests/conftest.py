"""Fixtures that every test may use."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import slow_tests
import torch

from peftkern._native import caps
from peftkern.engines.torch import decode
from peftkern.integrations import _peft_small

# bitsandbytes is what tests compare with, so it must not run our kernels. Those of the backend turn it on.
os.environ.setdefault("PEFTKERN_BNB", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if slow_tests.is_slow(item.path.name, getattr(item, "originalname", item.name)):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512bf16"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An instruction set level, in force for the test; memory that is not written is NaN in it."""
    if not caps.isas()[request.param]:
        pytest.skip(f"this {'CPU' if request.param in caps.built_isas() else 'build'} lacks {request.param}")
    monkeypatch.setenv("PEFTKERN_ISA", request.param)
    with poisoned_memory():
        yield request.param


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty, and the native ops' memory with it, comes full of NaN, or of the largest integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def small_layers_on_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layers of tests are small; their ops are to be tested nevertheless."""
    monkeypatch.setattr(_peft_small, "LEAST", {})


@pytest.fixture
def seed() -> int:
    """torch's seed for the test, printed so that a failure can be repeated; PEFTKERN_TEST_SEED sets another."""
    value = int(os.environ.get("PEFTKERN_TEST_SEED", "0"))
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["our kernel", "gather"])
def decoded_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What decodes NF4: the CPU's kernel, or the look-up that other devices use."""
    if request.param == "gather":
        monkeypatch.setattr(decode, "route_of", lambda device: "gather")
    return str(request.param)
