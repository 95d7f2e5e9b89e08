"""LoRALinear's merges: rounded once, undone exactly, and what they lose reported."""

import copy

import pytest
import torch
from lora_layers import BASES, IN, OUT, assert_near, exact_weight, fill, make, make_base
from torch import nn

from peftkern.nn import LoRALinear, NF4Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_merge_rounds_once_and_unmerge_is_exact(kind, dtype, seed):
    layer = make(kind, dtype, rank=6, use_rslora=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(9, IN).to(dtype)
    y = layer(x)
    exact = exact_weight(layer)
    for _ in range(3):
        report = layer.merge()
        assert layer.merged and layer.merge_report is report
        assert_near(layer(x), y)
        assert layer.weight.dtype == dtype and not layer.weight.requires_grad
        # Half a unit in the last place, and what fp32 or float64 sums of 7 terms below 4 are off.
        arithmetic = 1e-14 if dtype == torch.float64 else 4e-6
        assert ((layer.weight.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + arithmetic).all()
        layer.unmerge()
        assert not layer.merged and layer.merge_report is None
        assert torch.equal(layer(x), y)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_merge_report(seed):
    layer = make("dense", torch.bfloat16)
    exact = exact_weight(layer)
    delta = exact - layer.weight.double()
    report = layer.merge()
    error = (layer.weight.double() - exact).norm()
    assert (report.adapter_name, report.to, report.dtype) == ("default", "dense", torch.bfloat16)
    assert report.relative_error == pytest.approx((error / exact.norm()).item(), rel=1e-3)
    assert report.delta_error == pytest.approx((error / delta.norm()).item(), rel=1e-3)
    assert LoRALinear(make_base("dense", torch.bfloat16)).merge().delta_error == 0.0


@pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])
def test_merge_to_nf4_reports_what_it_loses(double_quant, seed):
    base = NF4Linear(IN, OUT, dtype=torch.bfloat16, block_size=32, double_quant=double_quant)
    layer = fill(LoRALinear(base, rank=4))
    x = torch.randn(5, IN).bfloat16()
    y = layer(x)
    exact = exact_weight(layer)
    report = layer.merge(to="nf4")
    merged = layer.merged_layer
    assert isinstance(merged, NF4Linear) and layer.weight is merged.weight and layer.weight.dtype == torch.uint8
    assert (merged.block_size, merged.double_quant, merged.weight_dtype) == (32, double_quant, torch.bfloat16)
    error = (merged.dequantize(torch.float32).double() - exact).norm() / exact.norm()
    assert report.to == "nf4" and report.relative_error == pytest.approx(error.item(), rel=1e-3)
    assert 0.02 < report.relative_error < 0.15
    assert (layer(x).double() - y.double()).norm() / y.double().norm() < 0.2
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_a_small_adapter_drowns_in_nf4_and_survives_dense(seed):
    layer = make("nf4")
    layer.scaling["default"] *= 1e-3
    assert layer.merge(to="nf4").delta_error > 0.9
    layer.unmerge()
    assert layer.merge(to="dense").delta_error < 1e-3


@pytest.mark.parametrize("to", ["dense", "nf4"])
def test_merge_without_the_base(to, seed):
    layer = make("nf4")
    x = torch.randn(3, IN)
    layer.merge(to)
    merged = layer(x)
    layer.unmerge()
    layer.merge(to, keep_base=False)
    assert (
        not layer.settings and not layer.merged and type(layer.base_layer) is {"dense": nn.Linear, "nf4": NF4Linear}[to]
    )
    assert torch.equal(layer(x), merged)
    assert {key.split(".")[0] for key in layer.state_dict()} == {"base_layer"}
    with pytest.raises(RuntimeError, match="keep_base=False"):
        layer.unmerge()
    layer.add_adapter("next")
    layer.set_adapter("next")
    assert_near(layer(x), merged)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.factors("next"))


def test_gradients_of_a_merged_layer_reach_x_alone(seed):
    layer = make()
    layer.merge()
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in layer.parameters())


def test_what_changes_the_adapter_unmerges(seed):
    layer = make()
    layer.add_adapter("other")
    x = torch.randn(2, IN)
    base = layer.base_layer(x)
    layer.merge()
    layer.set_adapter("default")
    assert layer.merged
    layer.set_adapter("other")
    assert not layer.merged
    assert_near(layer(x), base)

    layer.set_adapter("default")
    layer.merge()
    state = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert not layer.merged
    assert_near(layer(x), base)
    fill(layer).merge()
    layer.delete_adapter("default")
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("to", ["dense", "nf4"])
def test_casting_a_merged_layer(to, seed):
    layer = make("nf4")
    layer.merge(to)
    codes = layer.base_layer.weight.clone()
    layer.bfloat16()
    x = torch.randn(2, IN).bfloat16()
    y = layer(x)
    assert y.dtype == layer.bias.dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, codes)
    assert (layer(x).float() - y.float()).norm() / y.float().norm() < (2e-2 if to == "dense" else 0.2)


def test_merge_under_autocast_is_in_fp32(seed):
    layer = make()
    other = copy.deepcopy(layer)
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("weight_dtype, x_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_every_state_takes_x_of_another_dtype(kind, weight_dtype, x_dtype, seed):
    layer = make(kind, weight_dtype)
    x = torch.randn(3, IN).to(x_dtype)
    y = layer(x)
    layer.merge()
    assert_near(layer(x), y, torch.bfloat16)
    layer.disable_adapters()
    base = layer(x)
    assert base.dtype == x_dtype and not torch.equal(base, y)
    layer.enable_adapters()
    with torch.autocast("cpu", torch.bfloat16):
        merged = layer(x)
        layer.unmerge()
        assert merged.dtype == layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_a_merge_that_overflows_changes_nothing(value, keep_base, seed):
    layer = make("dense", torch.float16)
    nn.init.constant_(layer.factors("default")[1], value)
    nn.init.constant_(layer.factors("default")[0], 1.0)
    weight = layer.weight
    with pytest.raises(ValueError, match="'default' added has NaN or infinity"):
        layer.merge(keep_base=keep_base)
    assert layer.weight is weight and not layer.merged and layer.active_adapter == "default"
