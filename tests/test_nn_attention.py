"""LoRAAttention's forward is the block's own, on the block itself: what it writes, calls and looks up is there."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.nn import LoRAAttention, LoRALinear


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x)


class Block(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.last: Any = None

    def forward(self, x: Tensor, depth: int = 0, fail: bool = False) -> Tensor:
        y = super().forward(x)
        if fail:
            raise ValueError("of the block")
        if depth:
            y = y + self(y, depth - 1)
        self.last = y.detach()
        self.count = self.count + 1
        self.features = self.q_proj.in_features
        return y


def make(kind: type[nn.Module] = Block) -> Any:
    block: Any = kind()
    peftkern.add_lora(block, rank=2)
    for module in block.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.factors("default")[1], std=0.3)
    return block


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each fused call."""
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return peftkern.lora_qkv(*args, **kwargs)

    monkeypatch.setattr("peftkern.nn.attention.lora_qkv", counting)
    return calls


def test_what_it_writes_stays_written(fused: list[int], seed: int) -> None:
    block, x = make(), torch.randn(3, 8)
    expected = block(x)
    LoRAAttention.from_block(block)
    y = block(x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(block.last, y) and block.count == 2 and block.features == 8 and fused == [1]
    block.undo()
    assert torch.equal(block(x), expected)


def test_the_forward_s_self_is_the_block(seed: int) -> None:
    seen = []

    class Looking(Base):
        def forward(self, x: Tensor) -> Tensor:
            handle = self.q_proj.register_forward_hook(lambda *_: seen.append("hook"))
            seen.extend((weakref.ref(self)(), isinstance(self, Looking), dict(self.named_children())))
            y = super().forward(x)
            handle.remove()
            return y

    block = LoRAAttention.from_block(make(Looking))
    block(torch.randn(3, 8))
    itself, is_one, children = seen[:3]
    assert (
        itself is block and is_one and children == {n: block.get_submodule(n) for n in ("q_proj", "k_proj", "v_proj")}
    )
    assert seen[3:] == ["hook"]


def test_a_forward_that_calls_itself(fused: list[int], seed: int) -> None:
    block, x = make(), torch.randn(3, 8)
    expected = block(x, 2)
    LoRAAttention.from_block(block)
    torch.testing.assert_close(block(x, 2), expected)
    assert len(fused) == 3


def test_a_forward_that_raises(fused: list[int], seed: int) -> None:
    block, x = LoRAAttention.from_block(make()), torch.randn(3, 8)
    expected = block(x)
    with pytest.raises(ValueError, match="of the block"):
        block(x, fail=True)
    assert all(isinstance(getattr(block, name), LoRALinear) for name in block.projections)
    assert torch.equal(block(x), expected) and len(fused) == 3


def test_threads(fused: list[int], seed: int) -> None:
    block, xs = LoRAAttention.from_block(make()), torch.randn(64, 3, 8)
    expected = [block(x, 1) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        ys = list(pool.map(lambda x: block(x, 1), xs))
    assert all(map(torch.equal, ys, expected)) and len(fused) == 4 * len(xs)
    assert all(isinstance(getattr(block, name), LoRALinear) for name in block.projections)


def test_compile_without_graph_breaks(seed: int) -> None:
    block, x = LoRAAttention.from_block(make()), torch.randn(3, 8)
    expected = block(x)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        assert torch.equal(block.last, y.detach())
    assert block.count == 3
