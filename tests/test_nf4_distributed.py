"""NF4Linear and LoRALinear under DDP and FSDP2, on two processes and gloo: gradients and state dicts of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from nf4_layers import IN, OUT, assert_entries, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from two_processes import SHARDS_UINT8, WORLD_SIZE, spawn

import peftkern
from peftkern.integrations.bitsandbytes import bnb_state_dict
from peftkern.nn import LoRALinear, NF4Linear

ROWS = 4  # of each process
TRAINABLE = {"2.bias", *(f"{layer}.lora_{factor}.default.weight" for layer in (0, 4) for factor in "AB")}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def model(seed: int = 0) -> nn.Sequential:
    """Nested and flat, with and without bias and adapter; an odd number of bytes of codes in the last layer."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        LoRALinear(NF4Linear(IN, OUT), rank=4),
        nn.Tanh(),
        NF4Linear(OUT, 7, double_quant=False),
        nn.Tanh(),
        LoRALinear(NF4Linear(7, 6, bias=False), rank=3),
    )
    for layer in (layers[0], layers[4]):
        nn.init.normal_(layer.factors("default")[1], std=0.3)
    return layers


def batch() -> Tensor:
    """The rows of both processes."""
    return torch.randn(WORLD_SIZE * ROWS, IN, generator=torch.Generator().manual_seed(1))


def shard(layers: nn.Sequential, ignore_codes: bool = False, **options: object) -> nn.Sequential:
    """FSDP2 on every layer and on the rest; with `ignore_codes` each process keeps all the codes."""
    for layer in (*(layer for layer in layers if list(layer.parameters())), layers):
        codes = {parameter for parameter in layer.parameters() if parameter.dtype == torch.uint8}
        fully_shard(layer, ignored_params=codes if ignore_codes else None, **options)
    return layers


def loss(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x).square().mean()


def gradients(layers: nn.Module) -> dict[str, Tensor]:
    """By parameter, whole."""
    found = {name: parameter.grad for name, parameter in layers.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def assert_gradients(parallel: nn.Module, rank: int) -> None:
    """Those of this process's rows in `parallel`, averaged, are those of the joined batch in one process."""
    reference, x = model(), batch()
    loss(reference, x).backward()
    loss(parallel, x[rank * ROWS : (rank + 1) * ROWS]).backward()
    expected = gradients(reference)
    assert set(expected) == TRAINABLE
    got = {name.removeprefix("module."): grad for name, grad in gradients(parallel).items()}
    torch.testing.assert_close(got, expected)


def assert_refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        action()


# DDP


def ddp(rank: int, directory: Path) -> None:
    # Other values than the reference's on the second process, until DDP broadcasts codes and scales.
    parallel = nn.parallel.DistributedDataParallel(model(seed=rank))
    reference = model()
    assert_entries(parallel.module.state_dict(), snapshot(reference))
    assert_gradients(parallel, rank)
    torch.optim.AdamW(parallel.parameters(), lr=0.1).step()
    loss(reference, batch()).backward()
    torch.optim.AdamW(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(parallel.module.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-4)


def test_ddp(tmp_path):
    spawn(ddp, tmp_path)


# FSDP2


def fsdp(rank: int, directory: Path) -> None:
    sharded, reference = shard(model()), model()
    assert isinstance(sharded[2].weight, DTensor) and sharded[2].weight.dtype == torch.uint8
    assert sharded[2].weight.to_local().numel() < reference[2].weight.numel()
    assert_gradients(sharded, rank)
    for options in ({"reshard_after_forward": False}, {"ignore_codes": True}):
        assert_gradients(shard(model(), **options), rank)


def fsdp_mixed_precision(rank: int, directory: Path) -> None:
    sharded = shard(model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x = batch()
    y = sharded(x)
    assert y.dtype == torch.bfloat16 and sharded[2].weight.dtype == torch.uint8
    torch.testing.assert_close(y.float(), model()(x), rtol=2e-2, atol=2e-2)


def fsdp_ignored_codes(rank: int, directory: Path) -> None:
    sharded = shard(model(), ignore_codes=True)
    assert not isinstance(sharded[2].weight, DTensor) and isinstance(sharded[2].bias, DTensor)
    assert_gradients(sharded, rank)


@SHARDS_UINT8
@pytest.mark.parametrize("worker", [fsdp, fsdp_mixed_precision], ids=["fp32", "mixed precision"])
def test_fsdp_gradients(worker, tmp_path):
    spawn(worker, tmp_path)


def test_fsdp_with_codes_on_every_process(tmp_path):
    spawn(fsdp_ignored_codes, tmp_path)


def fsdp_state_dicts(rank: int, directory: Path) -> None:
    sharded, reference = shard(model()), model()
    whole = snapshot(reference)
    full = get_model_state_dict(sharded, options=FULL)
    if rank == 0:
        assert_entries(full, whole)
        fresh = model(seed=2)
        assert fresh.load_state_dict(full) == ([], [])
        assert_entries(fresh.state_dict(), whole)
        assert_entries(bnb_state_dict(sharded, full), bnb_state_dict(reference))
    else:
        assert not full

    x = batch()
    # torch writes into the dict that it is given.
    sources = {
        "full": (dict(whole), StateDictOptions(full_state_dict=True)),
        "broadcast": (dict(whole) if rank == 0 else {}, FROM_RANK_0),
        "sharded": (get_model_state_dict(sharded), None),
    }
    for name, (entries, options) in sources.items():
        other = shard(model(seed=2))
        assert set_model_state_dict(other, entries, options=options) == ([], []), name
        with torch.no_grad():
            assert torch.equal(other(x), reference(x)), name


def fsdp_files(rank: int, directory: Path) -> None:
    reference, other, x = model(), shard(model(seed=2)), batch()
    dcp.save(get_model_state_dict(shard(model())), checkpoint_id=directory / "checkpoint")
    entries = get_model_state_dict(other)
    dcp.load(entries, checkpoint_id=directory / "checkpoint")
    set_model_state_dict(other, entries)
    with torch.no_grad():
        assert torch.equal(other(x), reference(x))

    with torch.device("meta"):
        empty = shard(nn.Sequential(NF4Linear(IN, OUT), NF4Linear(OUT, 7, double_quant=False)))
    empty.to_empty(device="cpu")
    torch.manual_seed(rank)
    source = nn.Sequential(NF4Linear(IN, OUT), NF4Linear(OUT, 7, double_quant=False))
    set_model_state_dict(empty, source.state_dict() if rank == 0 else {}, options=FROM_RANK_0)
    torch.manual_seed(0)
    source[0].reset_parameters()
    source[1].reset_parameters()
    with torch.no_grad():
        assert torch.equal(empty(x), source(x))


@SHARDS_UINT8
@pytest.mark.parametrize("worker", [fsdp_state_dicts, fsdp_files], ids=["memory", "files and meta"])
def test_fsdp_state_dicts(worker, tmp_path):
    spawn(worker, tmp_path)


def fsdp_refusals(rank: int, directory: Path) -> None:
    dense = fully_shard(nn.Sequential(nn.Linear(8, 8)))
    assert_refused(lambda: NF4Linear.from_linear(dense[0]), "linear.weight is sharded; quantise before sharding")
    assert_refused(lambda: peftkern.quantize(dense), '"0.weight" is sharded; quantize before sharding')
    sharded, whole = shard(model()), model(seed=2)
    assert_refused(sharded[2].reset_parameters, "the weight is sharded; initialise before sharding")
    before = snapshot(whole)
    message = '"2.weight" and the module must both be sharded or both be whole'
    assert_refused(lambda: sharded.load_state_dict(whole.state_dict()), message)
    layer = {name.removeprefix("2."): value for name, value in sharded.state_dict().items() if name.startswith("2.")}
    assert_refused(lambda: whole[2].load_state_dict(layer), message.replace("2.", ""))
    assert_entries(whole.state_dict(), before)
    assert_entries(get_model_state_dict(sharded, options=FULL), snapshot(model()) if rank == 0 else {})


@SHARDS_UINT8
def test_sharded_weights_are_refused_where_they_cannot_be(tmp_path):
    spawn(fsdp_refusals, tmp_path)
