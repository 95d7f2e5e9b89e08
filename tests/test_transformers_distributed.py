"""Models that the quantizer has loaded, under FSDP2 by accelerate: two processes and gloo, against one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nf4_layers import assert_entries
from tiny_models import llama, logits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from two_processes import SHARDS_UINT8, WORLD_SIZE, spawn

import peftkern
from peftkern.integrations.bitsandbytes import bnb_state_dict
from peftkern.integrations.peft import calls
from peftkern.nn import NF4Linear

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import PartialState  # noqa: E402

STEPS = 3
IDS = torch.arange(24).view(4, 6) % 32
"""Of both processes; each takes two rows."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    return tmp_path


def base(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=peftkern.NF4Config())


def adapted(folder: Path) -> nn.Module:
    model = base(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def fsdp_accelerator(rank: int, **options: Any) -> Any:
    """An Accelerator with FSDP2 on.

    accelerate 1.15 turns it on for every kind of process but those on a CPU: AcceleratorState makes FSDP of MULTI_GPU,
    MULTI_XPU and the like, and leaves MULTI_CPU as it is. The kind is all that differs.
    """
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "LOCAL_WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in places.items()})
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, **options)
    # A new AcceleratorState, which prepare makes, copies PartialState's.
    PartialState._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> list[Tensor]:
    """The losses."""
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train_sharded(accelerator: Any, model: nn.Module, rank: int) -> tuple[nn.Module, Tensor]:
    """The model as accelerate gives it back, and the losses over both processes."""
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    losses = torch.stack(train(prepared, optimizer, IDS[2 * rank : 2 * rank + 2]))
    dist.all_reduce(losses)
    return prepared, losses / WORLD_SIZE


def trains_as_one_process(accelerator: Any, model: nn.Module, rank: int, folder: Path) -> nn.Module:
    """Trains, saves and reloads; returns the sharded model."""
    sharded, losses = train_sharded(accelerator, model, rank)
    layer = sharded.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    assert isinstance(layer, NF4Linear) and isinstance(layer.weight, DTensor) and layer.weight.dtype == torch.uint8
    # Half the codes here; scales are buffers, whole on every process.
    assert layer.weight.to_local().numel() * WORLD_SIZE == layer.weight.numel()
    assert not isinstance(layer.absmax, DTensor)

    reference = adapted(folder)
    expected = train(reference, optimizer_of(reference), IDS)
    torch.testing.assert_close(losses, torch.stack(expected))
    entries, whole = accelerator.get_state_dict(sharded), reference.state_dict()
    if rank == 0:
        frozen = {name: value for name, value in whole.items() if "lora_" not in name}
        assert len(frozen) > 50
        assert_entries({name: value for name, value in entries.items() if name in frozen}, frozen)
        # Steps of AdamW: where a gradient is next to nothing its rounding moves the step.
        torch.testing.assert_close(entries, dict(whole), rtol=1e-4, atol=1e-4)

    unwrapped = accelerator.unwrap_model(sharded)
    unwrapped.save_pretrained(folder / "adapter", state_dict=entries, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    again = peft.PeftModel.from_pretrained(base(folder), folder / "adapter")
    if calls(sharded):
        peftkern.accelerate(again)
    assert torch.equal(logits(again), logits(sharded.eval()))
    return sharded


def stock(rank: int, folder: Path) -> None:
    trains_as_one_process(fsdp_accelerator(rank), adapted(folder), rank, folder)


def accelerated(rank: int, folder: Path) -> None:
    model = peftkern.accelerate(adapted(folder))
    sharded = trains_as_one_process(fsdp_accelerator(rank), model, rank, folder)
    counts = calls(sharded)
    assert len(counts) == 14 and all(counted == (STEPS + 1, {}) for counted in counts.values())
    reasons = {record.reason for record in peftkern.explain(sharded) if record.op == "lora_linear"}
    assert reasons == {
        "PEFT's own forward: base_layer is sharded, unless FSDP2 gathers it for the call; "
        f"ran {STEPS + 1} times, PEFT's own 0 times"
    }


@SHARDS_UINT8
@pytest.mark.parametrize("worker", [stock, accelerated], ids=["stock", "accelerated"])
def test_fsdp2_trains_saves_and_reloads(worker, folder):
    spawn(worker, folder)


def bf16(rank: int, folder: Path) -> None:
    accelerator = fsdp_accelerator(rank, mixed_precision="bf16")
    _, losses = train_sharded(accelerator, peftkern.accelerate(adapted(folder)), rank)
    reference = adapted(folder)
    torch.testing.assert_close(losses, torch.stack(train(reference, optimizer_of(reference), IDS)), rtol=2e-2, atol=0)


def whole_models(rank: int, folder: Path) -> None:
    accelerator = fsdp_accelerator(rank)
    model = base(folder)
    expected, before = bnb_state_dict(model), logits(model)
    model.lm_head.weight.requires_grad_()
    sharded, _ = accelerator.prepare(model, torch.optim.SGD([model.lm_head.weight]))
    sharded.save_pretrained(folder / "nf4", is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "nf4")
    assert_entries(bnb_state_dict(again), expected)
    assert torch.equal(logits(again), before)

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    with pytest.raises(ValueError, match="FSDP must have cpu_ram_efficient_loading=False"):
        base(folder)


@SHARDS_UINT8
@pytest.mark.parametrize("worker", [bf16, whole_models], ids=["bf16", "whole models"])
def test_fsdp2(worker, folder):
    spawn(worker, folder)
