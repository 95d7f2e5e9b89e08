"""LoRALinear against HF PEFT's lora.Linear, and what its adapters and copies promise."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_layers import BASES, IN, OUT, assert_near, exact_weight, fill, make, make_base
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.nn import LoRALinear, NF4Linear
from peftkern.nn._low_rank_linear import LoRASettings

# Parity with HF PEFT


def peft_layer(base: nn.Linear, **config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **config))
    return model[0]


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients_are_peft_s(dtype, bias, use_rslora, seed):
    ours = fill(LoRALinear(make_base("dense", dtype, bias), 5, 12.0, use_rslora=use_rslora))
    theirs = peft_layer(make_base("dense", dtype, bias), r=5, lora_alpha=12, use_rslora=use_rslora)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    assert ours.scaling == theirs.scaling
    x = torch.randn(2, 7, IN).to(dtype)
    grad = torch.randn(2, 7, OUT).to(dtype)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.backward(grad)
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": own.grad, **grads})
    assert set(results[0]) == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert_near(value, results[1][name], dtype)


def test_peft_state_dict_loads(seed):
    theirs = peft_layer(make_base("dense"), r=8)
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = LoRALinear(make_base("dense"))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, IN)
    assert_near(ours(x), theirs(x))


def test_defaults_are_peft_s():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig()
    ours = LoRALinear(make_base("dense")).settings["default"]
    assert ours == LoRASettings(config.r, config.lora_alpha, config.lora_dropout, config.use_rslora)


# One layer


@pytest.mark.parametrize("kind", BASES)
def test_a_new_adapter_changes_nothing(kind, seed):
    base = make_base(kind)
    x = torch.randn(4, IN)
    expected = base(x)
    layer = LoRALinear(base, dropout=0.5)
    assert_near(layer(x), expected)
    a, b = layer.factors("default")
    assert not b.any() and a.std() > 0 and a.abs().max() <= 1 / math.sqrt(IN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_forward_is_the_formula(kind, dtype, seed):
    layer = make(kind, dtype, rank=3, alpha=6.0)
    x = torch.randn(2, 5, IN).to(dtype)
    expected = F.linear(x.double(), exact_weight(layer), layer.bias.double()).to(dtype)
    # float64 x on fp32 adapters and codes: those fix the values, the arithmetic is float64.
    assert_near(layer(x), expected)


def test_only_the_adapter_trains(seed):
    base = make_base("dense")
    layer = LoRALinear(base)
    assert layer.base_layer is base
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
    assert all(p.dtype == torch.float32 for p in LoRALinear(make_base("dense", torch.bfloat16)).factors("default"))
    assert all(p.dtype == torch.bfloat16 for p in LoRALinear(base, dtype=torch.bfloat16).factors("default"))


@pytest.mark.parametrize("kind", BASES)
def test_properties(kind):
    base = make_base(kind).eval()
    layer = LoRALinear(base, rank=2)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not layer.training and not layer.merged and layer.enabled and layer.active_adapter == "default"
    assert "rank=2" in repr(layer) and "active=default" in repr(layer)


def test_dropout_is_on_the_low_rank_path_in_training_only(seed):
    layer = make(dropout=0.5)
    x = torch.randn(64, IN)
    base = layer.base_layer(x)
    torch.manual_seed(seed + 1)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(seed + 1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    average = torch.stack([layer(x) - base for _ in range(200)]).mean(0)
    layer.eval()
    delta = layer(x) - base
    assert torch.equal(layer(x), layer(x))
    assert (average - delta).norm() / delta.norm() < 0.2
    nn.init.zeros_(layer.train().factors("default")[1])
    assert_near(layer(x), base)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_checkpointing_recomputes_the_same_dropout(kind, use_reentrant, seed):
    layer = make(kind, dropout=0.3)
    x = torch.randn(6, IN, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x.grad = None
        layer.zero_grad()
        torch.manual_seed(seed)
        run(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.factors("default"))])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))


def test_scaling_is_read_at_every_call(seed):
    layer = make(rank=4, alpha=8.0)
    x = torch.randn(3, IN)
    base, once = layer.base_layer(x), layer(x)
    layer.scaling["default"] = 6.0
    assert_near(layer(x) - base, 3 * (once - base))
    layer.scaling["default"] = torch.tensor(6.0)
    assert_near(layer(x) - base, 3 * (once - base))


def test_compute_dtype_of_the_base_is_kept(seed):
    base = NF4Linear(IN, OUT, compute_dtype=torch.float32)
    layer = fill(LoRALinear(base))
    x = torch.randn(3, IN).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_reset_parameters_draws_adapters_alone(seed):
    layer = make()
    base = layer.weight.clone()
    before = layer.factors("default")[0].clone()
    layer.reset_parameters()
    a, b = layer.factors("default")
    assert torch.equal(layer.weight, base) and not torch.equal(a, before) and not b.any()


def test_hooks_of_the_base_run_once_on_the_layer(seed):
    base = make_base("dense")
    seen = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append((module, output)))
    layer = fill(LoRALinear(base))
    x = torch.randn(2, IN)
    for run in (layer.enable_adapters, layer.disable_adapters):
        run()
        y = layer(x)
        assert len(seen) == 1 and seen[0][0] is layer and seen.pop()[1] is y
    handle.remove()
    layer(x)
    assert not seen


# Adapters


@pytest.mark.parametrize("kind", BASES)
def test_several_adapters(kind, seed):
    layer = make(kind, rank=4, alpha=4.0)
    layer.add_adapter("other", rank=7, alpha=14.0)
    fill(layer, "other")
    x = torch.randn(3, IN)
    outputs = {name: F.linear(x, exact_weight(layer, name).float(), layer.bias) for name in ("default", "other")}
    assert layer.active_adapter == "default"
    for name in ("other", "default"):
        layer.set_adapter(name)
        assert_near(layer(x), outputs[name])
        trained = {n for n, p in layer.named_parameters() if p.requires_grad}
        assert trained == {f"lora_A.{name}.weight", f"lora_B.{name}.weight"}
    layer.delete_adapter("other")
    assert layer.active_adapter == "default" and list(layer.settings) == list(layer.scaling) == ["default"]
    assert not any("other" in key for key in layer.state_dict())
    layer.delete_adapter("default")
    assert layer.active_adapter is None
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_is_the_base_bit_for_bit(kind, dtype, seed):
    base = make_base(kind, dtype)
    x = torch.randn(3, IN).to(dtype)
    expected = base(x)
    layer = fill(LoRALinear(base))
    active = layer(x)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)
    layer.merge()
    assert torch.equal(layer(x), expected)
    layer.enable_adapters()
    assert layer.merged and not torch.equal(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer(x), active)


# Copies


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("kind", BASES)
def test_deepcopy_pickle_and_save(kind, merged, seed):
    layer = make(kind)
    layer.add_adapter("other", rank=2)
    if merged:
        layer.merge()
    x = torch.randn(3, IN)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    layer.delete_adapter("default")
    for twin in copies:
        assert twin.merged is merged and twin.settings.keys() == {"default", "other"}
        assert torch.equal(twin(x), y)
        if merged:
            twin.unmerge()


@pytest.mark.parametrize("kind", BASES)
def test_state_dict_round_trip(kind, seed):
    layer = make(kind)
    layer.add_adapter("other", rank=3)
    layer.merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LoRALinear(make_base(kind))
    other.add_adapter("other", rank=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    layer.unmerge()
    x = torch.randn(3, IN)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_meta_then_assign(kind, seed):
    layer = make(kind)
    with torch.device("meta"):
        empty = LoRALinear(make_base(kind))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, IN)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_compiles_without_graph_breaks(kind, seed):
    layer = make(kind, rank=3, dropout=0.1).eval()
    layer.add_adapter("other", rank=5)
    fill(layer, "other")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN, requires_grad=True)
    for change in (layer.eval, lambda: layer.set_adapter("other"), layer.merge, layer.disable_adapters):
        change()
        torch.testing.assert_close(compiled(x), layer(x))
    layer.enable_adapters()
    layer.unmerge()
    gradients = []
    for model in (layer, compiled):
        x.grad = None
        layer.zero_grad()
        model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.factors("other"))])
    torch.testing.assert_close(*gradients)


# Bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank must be positive, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": "8"}, TypeError, "alpha must be a number"),
        ({"dropout": 1.5}, ValueError, "dropout must be from 0 to 1"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be a bool"),
        ({"adapter_name": "a.b"}, ValueError, "adapter_name"),
        ({"adapter_name": ""}, ValueError, "adapter_name"),
        ({"adapter_name": "keys"}, ValueError, "adapter_name"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of"),
    ],
)
def test_bad_settings(options, error, message):
    base = make_base("dense")
    with pytest.raises(error, match=message):
        LoRALinear(base, **options)
    assert base.weight.requires_grad


def test_bad_bases():
    class Special(nn.Linear):
        pass

    for base in (Special(4, 4), nn.Conv1d(4, 4, 1), LoRALinear(make_base("dense")), None):
        with pytest.raises(TypeError, match=r"base must be an nn\.Linear or NF4Linear"):
            LoRALinear(base)
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"base.weight must be .*int8"):
        LoRALinear(linear)


def test_bad_adapter_calls(seed):
    layer = make()
    with pytest.raises(ValueError, match="'default' exists already"):
        layer.add_adapter("default")
    for method in (layer.set_adapter, layer.delete_adapter, layer.factors):
        with pytest.raises(ValueError, match="no adapter 'nobody'; there is 'default'"):
            method("nobody")
    with pytest.raises(RuntimeError, match="no merged adapter"):
        layer.unmerge()
    with pytest.raises(ValueError, match="'dense' or 'nf4', got 'int8'"):
        layer.merge("int8")
    with pytest.raises(ValueError, match="needs an NF4Linear base"):
        layer.merge("nf4")
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    layer.disable_adapters()
    with pytest.raises(RuntimeError, match="disabled"):
        layer.merge(keep_base=False)
    layer.enable_adapters()
    layer.set_adapter(None)
    with pytest.raises(RuntimeError, match="no adapter is active"):
        layer.merge()
    with pytest.raises(RuntimeError, match="meta"):
        LoRALinear(make_base("dense").to("meta")).merge()


def test_wrong_input_names_the_op():
    with pytest.raises(ValueError, match=r"lora_linear: x must have shape \[\.\.\., 48\]"):
        make()(torch.zeros(2, IN + 1))
