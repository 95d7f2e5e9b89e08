"""NF4Linear through casts, moves, copies, files, compilation and export: no byte changes."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from nf4_layers import IN, OUT, assert_entries, make, snapshot
from torch import Tensor, nn

from peftkern.nn import NF4Linear

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])


def quantised(layer: NF4Linear) -> dict[str, Tensor]:
    """The entries of the weight, without the bias."""
    return {name: value for name, value in snapshot(layer).items() if name != "bias"}


# Casts and moves

CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
    "to and back": lambda module: module.half().float().double(),
}


@NESTED
@pytest.mark.parametrize("nested_module", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_bytes(cast, nested_module, double_quant, seed):
    layer = make(double_quant=double_quant)
    before, weight = quantised(layer), layer.dequantize()
    CASTS[cast](nn.Sequential(nn.LayerNorm(IN), layer) if nested_module else layer)
    assert layer.bias.dtype in (torch.bfloat16, torch.float16, torch.float64)
    assert_entries(quantised(layer), before)
    assert layer.weight_dtype == torch.float32 and torch.equal(layer.dequantize(), weight)
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert layer(torch.randn(2, IN, dtype=layer.bias.dtype)).dtype == layer.bias.dtype


@NESTED
def test_to_meta_and_back(double_quant, seed):
    layer = make(double_quant=double_quant)
    before = snapshot(layer)
    layer.to("meta")
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {n: v.dtype for n, v in before.items()}
    with pytest.raises(NotImplementedError, match="to_empty"):
        layer.to("cpu")
    layer.to_empty(device="cpu")
    assert torch.equal(layer.nf4_format, before["nf4_format"])
    layer.load_state_dict(before)
    assert_entries(snapshot(layer), before)


def test_the_meta_device_as_context(seed):
    with torch.device("meta"):
        layer = make()
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
    source = make()
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_entries(snapshot(layer), snapshot(source))


def test_accelerate_s_empty_weights(seed):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        layer = make()
    assert layer.weight.is_meta
    source = make()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, IN)
    assert torch.equal(layer(x), source(x))


def test_share_memory_reaches_every_part(seed):
    layer = make()
    before = snapshot(layer)
    layer.share_memory()
    assert all(value.is_shared() for value in layer.state_dict().values())
    assert_entries(snapshot(layer), before)


def test_freezing_and_zero_grad():
    layer = make().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.zero_grad()


# Copies and files


def by_torch_save(value: object, weights_only: bool) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: by_torch_save(layer, weights_only=False),
}


@NESTED
@pytest.mark.parametrize("how", COPIES)
def test_copies(how, double_quant, seed):
    layer = make(torch.bfloat16, double_quant=double_quant, compute_dtype=torch.float32).eval()
    layer.bias.requires_grad_(False)
    copied = COPIES[how](layer)
    assert type(copied) is NF4Linear and repr(copied) == repr(layer) and not copied.training
    assert_entries(snapshot(copied), snapshot(layer))
    assert not copied.weight.requires_grad and not copied.bias.requires_grad
    x = torch.randn(2, IN)
    assert torch.equal(copied(x), layer(x))
    storages = {value.untyped_storage().data_ptr() for value in layer.state_dict().values()}
    assert storages.isdisjoint(value.untyped_storage().data_ptr() for value in copied.state_dict().values())


@NESTED
def test_torch_save_of_the_state_dict(double_quant, seed):
    layer, fresh = make(double_quant=double_quant), make(double_quant=double_quant)
    fresh.load_state_dict(by_torch_save(layer.state_dict(), weights_only=True))
    assert_entries(snapshot(fresh), snapshot(layer))


@NESTED
def test_safetensors(double_quant, seed, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.ModuleList(make(double_quant=double_quant) for _ in range(2))
    fresh = nn.ModuleList(make(double_quant=double_quant) for _ in range(2))
    # Both refuse or drop tensors that share storage, as two layers' quant maps must not.
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert_entries(snapshot(fresh), snapshot(model))
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(fresh, tmp_path / "model.safetensors")
    assert_entries(snapshot(fresh), snapshot(model))


# Compilation


@NESTED
def test_compile_without_graph_breaks(double_quant, seed):
    layer = make(double_quant=double_quant)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (3, 4):
        results = []
        x = torch.randn(rows, IN)
        for module in (layer, compiled):
            layer.bias.grad = None
            own = x.clone().requires_grad_()
            y = module(own)
            y.square().sum().backward()
            results.append((y.detach(), own.grad, layer.bias.grad))
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected)


@NESTED
def test_export(double_quant, seed):
    model = nn.Sequential(make(double_quant=double_quant), nn.ReLU(), NF4Linear(OUT, 8, double_quant=double_quant))
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (torch.randn(4, IN),), dynamic_shapes=({0: rows},))
    assert sum(node.target is torch.ops.peftkern.nf4_linear.default for node in program.graph.nodes) == 2
    x = torch.randn(7, IN)
    assert torch.equal(program.module()(x), model(x))

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x), model(x))


def test_functional_call(seed):
    layer, other, x = make(), make(), torch.randn(2, IN)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), (x,)), other(x))
