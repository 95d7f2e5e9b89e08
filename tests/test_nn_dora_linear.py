"""DoRALinear against HF PEFT's DoRA, its merges, and when it computes its norms again."""

import copy
from typing import Any

import pytest
import torch
from lora_layers import BASES, IN, OUT, assert_near, make_base
from torch import Tensor, nn

from peftkern.nn import DoRALinear, LoRALinear, NF4Linear
from peftkern.nn.dora_linear import DoRASettings
from peftkern.ops import dora_linear as op
from peftkern.ops._dropout import draw_seed, keep_mask, keep_scale


def peft_layer(base: nn.Linear, **config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], use_dora=True, **config))
    return model[0]


def make(kind: str = "dense", dtype: torch.dtype = torch.float32, **options: Any) -> DoRALinear:
    """A layer whose adapter does something."""
    layer = DoRALinear(make_base(kind, dtype), **options)
    for name in layer.settings:
        nn.init.normal_(layer.factors(name)[1], std=0.3)
        with torch.no_grad():
            layer.magnitude(name).mul_(1 + 0.2 * torch.randn(OUT))
    return layer


def results_of(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    own = x.clone().requires_grad_()
    y = layer(own)
    y.backward(grad)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": own.grad, **grads}


TRAINED = {"lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients_are_peft_s(dtype, dropout, bias, seed):
    """With dropout, under the same mask."""
    ours = DoRALinear(make_base("dense", dtype, bias), 5, 12.0, dropout)
    nn.init.normal_(ours.factors("default")[1], std=0.3)
    theirs = peft_layer(make_base("dense", dtype, bias), r=5, lora_alpha=12, lora_dropout=dropout)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(14, IN).to(dtype), torch.randn(14, OUT).to(dtype)
    torch.manual_seed(seed)
    mask = keep_mask(draw_seed(), 14, IN, dropout) * keep_scale(dropout)

    class SameMask(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input * mask.to(input.dtype)

    if dropout:
        theirs.lora_dropout["default"] = SameMask()
    torch.manual_seed(seed)
    actual, expected = results_of(ours, x, grad), results_of(theirs, x, grad)
    assert set(actual) == {"y", "x", *TRAINED} == set(expected)
    for name, value in actual.items():
        assert_near(value, expected[name].to(value.dtype), dtype)


def test_peft_state_dict_loads(seed):
    theirs = peft_layer(make_base("dense"), r=8)
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = DoRALinear(make_base("dense"))
    x = torch.randn(3, IN)
    ours(x)
    ours.load_state_dict(theirs.state_dict())
    assert_near(ours(x), theirs(x))


@pytest.mark.parametrize("kind", BASES)
def test_a_new_adapter_changes_nothing(kind, seed):
    base, x = make_base(kind), torch.randn(4, IN)
    expected = base(x)
    layer = DoRALinear(base, dropout=0.5).eval()
    assert_near(layer(x), expected)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)
    layer.enable_adapters()
    layer.set_adapter(None)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_merge_and_exact_unmerge(kind, dtype, seed):
    layer = make(kind, dtype, rank=6)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(9, IN).to(dtype)
    y = layer(x)
    for _ in range(2):
        report = layer.merge()
        assert report.dtype == dtype and layer.weight.dtype == dtype
        assert_near(layer(x), y)
        layer.unmerge()
        assert torch.equal(layer(x), y)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_merge_without_the_base(seed):
    layer = make("nf4", torch.bfloat16)
    x = torch.randn(3, IN).bfloat16()
    y = layer(x)
    assert layer.merge(to="nf4", keep_base=False).delta_error > 0
    assert isinstance(layer.base_layer, NF4Linear) and not layer.settings and not layer.lora_magnitude_vector
    layer = make("dense")
    x = torch.randn(3, IN)
    y = layer(x)
    layer.merge(keep_base=False)
    assert_near(layer(x), y)


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that norms are computed."""
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return op.dora_norm(*args, **kwargs)

    monkeypatch.setattr("peftkern.nn.dora_linear.dora_norm", counting)
    return calls


def test_norms_are_computed_when_a_factor_changed(refreshes, seed):
    layer, x = make(), torch.randn(3, IN)
    a, b = layer.factors("default")
    for _ in range(3):
        layer(x).sum().backward()
    assert len(refreshes) == 1
    with torch.no_grad():
        layer.magnitude("default").mul_(2)
    layer(x)
    assert len(refreshes) == 1
    for change in (
        lambda: torch.optim.AdamW([a, b], lr=0.1).step(),
        lambda: b.data.add_(0.1),  # no version counts these
        lambda: b.data.fill_(0.5),
        lambda: b.data.neg_(),
        lambda: a.data.copy_(a.data.flip(0)),
        lambda: layer.scaling.update(default=3.0),
        lambda: layer.load_state_dict({**layer.state_dict(), "lora_A.default.weight": torch.randn_like(a)}),
        lambda: setattr(a, "data", torch.randn_like(a)),
    ):
        before = len(refreshes)
        change()
        y = layer(x)
        assert len(refreshes) == before + 1
        assert torch.equal(y, without_memory(layer)(x))


def without_memory(layer: DoRALinear) -> DoRALinear:
    """The same numbers in a layer that has computed nothing yet."""
    fresh = copy.deepcopy(layer)
    fresh._forget()
    return fresh


@torch.no_grad()
def other_scales(layer: NF4Linear) -> None:
    absmax = layer.nf4.absmax
    absmax.copy_(absmax.flip(0))


def replace_scales(layer: NF4Linear) -> None:
    layer.absmax = layer.absmax.flip(0)


def take_another_s(layer: nn.Module) -> None:
    other = make_base("nf4" if isinstance(layer, NF4Linear) else "dense")
    layer.load_state_dict(other.state_dict())


BASE_CHANGES = {
    "state dict": (BASES, take_another_s),
    "in place": (("dense",), lambda base: nn.init.normal_(base.weight)),
    "signs by .data": (("dense",), lambda base: base.weight.data.neg_()),
    ".data +=": (("dense",), lambda base: base.weight.data.add_(0.1)),
    "another .data": (("dense",), lambda base: setattr(base.weight, "data", torch.randn(OUT, IN))),
    "another parameter": (("dense",), lambda base: setattr(base, "weight", nn.Parameter(torch.randn(OUT, IN), False))),
    "absmax in place": (("nf4",), other_scales),
    "another absmax": (("nf4",), replace_scales),
    "codes by .data": (("nf4",), lambda base: base.weight.data.copy_(base.weight.data.flip(0))),
}


@pytest.mark.parametrize("detach_norm", [True, False], ids=["constant norm", "full gradient"])
@pytest.mark.parametrize(
    ("kind", "change"), [pytest.param(k, c, id=f"{k}, {n}") for n, (ks, c) in BASE_CHANGES.items() for k in ks]
)
def test_the_base_s_norms_follow_its_weight(kind, change, detach_norm, seed):
    layer, x = make(kind, detach_norm=detach_norm), torch.randn(3, IN)
    before = layer(x)
    change(layer.base_layer)
    y = layer(x)
    assert not torch.allclose(y, before)
    assert torch.equal(y, without_memory(layer)(x))


def test_the_base_s_norms_follow_the_layer_s_state_dict(seed):
    layer, x = make(), torch.randn(3, IN)
    layer(x)
    layer.load_state_dict({**layer.state_dict(), "base_layer.weight": torch.randn(OUT, IN)})
    fresh = DoRALinear(make_base("dense"))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("kind", BASES)
def test_a_compiled_layer_follows_its_base(kind, seed):
    layer, x = make(kind), torch.randn(3, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    take_another_s(layer.base_layer)
    assert_near(compiled(x), without_memory(layer)(x))


def test_training_after_inference_mode(seed):
    layer, x = make(), torch.randn(3, IN)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)


def test_a_layer_made_in_inference_mode(seed):
    with torch.inference_mode():
        layer, x = make(), torch.randn(3, IN)
        layer(x)
        layer.factors("default")[1].fill_(0.5)
        layer.base_layer.weight.mul_(2)
        assert torch.equal(layer(x), without_memory(layer)(x))


def test_full_gradient(seed):
    detached, full = make(), make(detach_norm=False)
    full.load_state_dict(detached.state_dict())
    x, grad = torch.randn(5, IN), torch.randn(5, OUT)
    theirs, ours = results_of(detached, x, grad), results_of(full, x, grad)
    assert torch.equal(theirs["y"], ours["y"])
    assert_near(ours["lora_magnitude_vector.default.weight"], theirs["lora_magnitude_vector.default.weight"])
    a, b = (f.detach().double().requires_grad_() for f in full.factors("default"))
    m, weight = full.magnitude("default").detach().double(), full.base_layer.weight.double()
    direction = weight + full.scaling["default"] * b @ a
    y = x.double() @ (m[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + full.bias.double()
    for value, name in zip(torch.autograd.grad(y, (a, b), grad.double()), ("lora_A", "lora_B")):
        assert_near(ours[f"{name}.default.weight"], value.float())
        assert (theirs[f"{name}.default.weight"] - value.float()).norm() > 1e-3 * value.norm()


def test_several_adapters(seed):
    layer, x = make(), torch.randn(3, IN)
    first = layer(x)
    layer.add_adapter("second", rank=2, dropout_mode="lora_only")
    assert torch.equal(layer(x), first)
    layer.set_adapter("second")
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        name.replace("default", "second") for name in TRAINED
    }
    assert not torch.allclose(layer(x), first)
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("second")
    assert list(layer.settings) == ["default"] and list(layer.lora_magnitude_vector) == ["default"]


def test_compile_without_graph_breaks(seed):
    layer, x = make("nf4"), torch.randn(3, IN)
    assert_near(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_float64_takes_the_reference(seed):
    layer, x = make(dtype=torch.float64), torch.randn(3, IN).double()
    y = layer(x)
    layer.merge()
    assert_near(layer(x), y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_mode": "none"}, ValueError, "DoRA: dropout_mode must be one of peft, lora_only, got 'none'"),
        ({"detach_norm": 1}, TypeError, "DoRA: detach_norm must be a bool, got 1"),
        ({"rank": 0}, ValueError, "rank must be positive, got 0"),
    ],
)
def test_bad_settings(options, error, message):
    base = make_base("dense")
    with pytest.raises(error, match=message):
        DoRALinear(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(error, match=message):
        DoRASettings(**options)


def test_a_lora_layer_is_no_base():
    with pytest.raises(TypeError, match=r"DoRALinear: base must be an nn\.Linear or NF4Linear, got LoRALinear"):
        DoRALinear(LoRALinear(make_base("dense")))  # type: ignore[arg-type]
