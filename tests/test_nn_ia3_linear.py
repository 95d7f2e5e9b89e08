"""IA3Linear against HF PEFT's, its merges on every base, and where it deviates from PEFT on purpose."""

import copy
from typing import Any

import pytest
import torch
from lora_layers import BASES, IN, OUT, assert_near, make_base
from torch import nn

from peftkern.nn import IA3Linear, NF4Linear

SIDES = pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])


def peft_layer(base: nn.Linear, is_feedforward: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(base)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if is_feedforward else [])
    peft.get_peft_model(model, config)
    return model[0]


def make(kind: str = "dense", dtype: torch.dtype = torch.float32, **options: Any) -> IA3Linear:
    """A layer whose adapter does something."""
    layer = IA3Linear(make_base(kind, dtype), **options)
    for name in layer.settings:
        nn.init.normal_(layer.scale(name), 1, 0.3)
    return layer


@SIDES
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_forward_and_gradients_are_peft_s(bias, is_feedforward, seed):
    ours = IA3Linear(make_base("dense", bias=bias), is_feedforward)
    nn.init.normal_(ours.scale("default"), 1, 0.3)
    theirs = peft_layer(make_base("dense", bias=bias), is_feedforward)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.backward(grad)
        results.append((y.detach(), own.grad, layer.ia3_l["default"].grad))
    for actual, expected in zip(*results):
        assert_near(actual, expected)


@SIDES
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_keeps_the_dtype(dtype, kind, is_feedforward, seed):
    """PEFT's layer on a 4-bit base returns fp32."""
    layer = make(kind, dtype, is_feedforward=is_feedforward)
    x = torch.randn(3, IN).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and layer.scale("default").grad.dtype == torch.float32


@pytest.mark.parametrize("kind", BASES)
@SIDES
def test_a_new_adapter_changes_nothing(is_feedforward, kind, seed):
    base, x = make_base(kind), torch.randn(4, IN)
    expected = base(x)
    layer = IA3Linear(base, is_feedforward)
    assert_near(layer(x), expected)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_merge_and_exact_unmerge(kind, dtype, is_feedforward, seed):
    """4-bit bases too, which PEFT cannot merge; its unmerge divides, ours keeps the base."""
    layer = make(kind, dtype, is_feedforward=is_feedforward)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(9, IN).to(dtype)
    y = layer(x)
    for _ in range(2):
        layer.merge()
        assert_near(layer(x), y)
        layer.disable_adapters()
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters()
        layer.unmerge()
        assert torch.equal(layer(x), y)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_merging_scales_the_bias_with_the_output_only(seed):
    layer = make()
    layer.merge()
    expected = layer.base_layer.bias * layer.scale("default").flatten()
    assert torch.equal(layer.bias, expected)
    layer = make(is_feedforward=True)
    layer.merge()
    assert layer.bias is layer.base_layer.bias


def test_merge_to_nf4_without_the_base(seed):
    layer = make("nf4", torch.bfloat16)
    report = layer.merge(to="nf4", keep_base=False)
    assert isinstance(layer.base_layer, NF4Linear) and not layer.settings and 0 < report.relative_error < 0.2


def test_several_adapters_of_both_sides(seed):
    layer, x = make(), torch.randn(3, IN)
    first = layer(x)
    layer.add_adapter("second", is_feedforward=True)
    nn.init.normal_(layer.scale("second"), 1, 0.3)
    layer.set_adapter("second")
    assert layer.scale("second").shape == (1, IN) and layer.scale("second").requires_grad
    assert not layer.scale("default").requires_grad and not torch.allclose(layer(x), first)
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("second")
    assert list(layer.ia3_l) == list(layer.settings) == ["default"]


def test_a_checkpointed_step_is_the_same(seed):
    layer = make("nf4", torch.bfloat16)
    x = torch.randn(3, IN).bfloat16()
    layer(x).sum().backward()
    expected = layer.scale("default").grad.clone()
    layer.scale("default").grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(layer.scale("default").grad, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"is_feedforward": 1}, TypeError, "IA3: is_feedforward must be a bool, got 1"),
        ({"adapter_name": "a.b"}, ValueError, "IA3Linear: adapter_name must be a name without '.'"),
        ({"dtype": torch.int8}, TypeError, "IA3Linear: dtype must be one of"),
    ],
)
def test_bad_arguments(options, error, message):
    base = make_base("dense")
    with pytest.raises(error, match=message):
        IA3Linear(base, **options)
    assert base.weight.requires_grad
