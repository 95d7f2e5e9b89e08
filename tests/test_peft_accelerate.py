"""`accelerate`: what HF PEFT computes, by the fused ops, with nothing else changed."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.integrations import peft as integration
from peftkern.integrations.peft import accelerated, calls, register
from peftkern.nn import NF4Linear

peft = pytest.importorskip("peft")

# Widths that are multiples of 64: bitsandbytes' CPU kernel decodes no others right.
WIDTHS = (64, 128, 64)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(target_modules=["0", "2"], r=4, **options)


def ia3() -> Any:
    return peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "bias": lambda: lora(lora_bias=True),
    "trained bias": lambda: lora(bias="all"),
    "dora": lambda: lora(use_dora=True),
    "ia3": ia3,
}
METHOD = pytest.mark.parametrize("method", CONFIGS)


def dense(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:])).to(dtype)


def bnb(dtype: torch.dtype = torch.float32, nested: bool = True, storage: torch.dtype = torch.uint8) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes").nn
    model = dense(dtype)
    for at in ("0", "2"):
        linear = model.get_submodule(at)
        layer = layers.Linear4bit(
            linear.in_features,
            linear.out_features,
            quant_type="nf4",
            compress_statistics=nested,
            quant_storage=storage,
        )
        layer.load_state_dict(linear.state_dict())
        model.set_submodule(at, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # what PEFT goes by
    return model


def native(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = dense(dtype)
    for at in ("0", "2"):
        model.set_submodule(at, NF4Linear.from_linear(model.get_submodule(at)))
    return model


BASES = {"dense": dense, "bitsandbytes": bnb, "NF4Linear": native}
BASE = pytest.mark.parametrize("base", BASES)


def adapted(model: nn.Module, *configs: Any) -> Any:
    """PEFT's model, every adapter moved so that each tensor has a gradient; the adapters are `default`, `1`, `2`..."""
    model = peft.get_peft_model(model, configs[0])
    for name, config in enumerate(configs[1:], 1):
        model.add_adapter(str(name), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, 5, WIDTHS[0], generator=generator) + 0.3).to(dtype).requires_grad_()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    model.zero_grad()
    y = model(x)
    (grad_x,) = torch.autograd.grad(y.float().square().mean(), x, retain_graph=True)
    y.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": grad_x, **{name: grad.clone() for name, grad in found.items()}}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error < tolerance, f"{name}: {error:.2e}"


def assert_all_fast(model: nn.Module, times: int = 1) -> None:
    assert [c.fast for c in calls(model).values()] == [times] * 2
    assert [c.stock for c in calls(model).values()] == [{}] * 2


@pytest.fixture(autouse=True)
def only_expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(accelerate|register)")
        yield


# The same numbers


@pytest.fixture(params=["auto", "torch", "reference"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs the ops: a layer takes whatever is chosen."""
    monkeypatch.setenv("PEFTKERN_BACKEND", request.param)
    return str(request.param)


@BASE
@METHOD
def test_outputs_and_gradients_are_peft_s(method, base, engine, seed):
    model = adapted(BASES[base](), CONFIGS[method]())
    expected = step(model, rows())
    assert len(expected) > 3 and all(value.norm() > 0 for value in expected.values())
    assert peftkern.accelerate(model) is model
    # fp32 sums of at most 128 products, in another order.
    assert_near(step(model, rows()), expected, 5e-6)
    assert_all_fast(model)
    peftkern.restore(model)
    torch.testing.assert_close(step(model, rows()), expected, rtol=0, atol=0)


@BASE
@METHOD
def test_bf16_is_as_near_to_fp32_as_peft(method, base, engine, seed):
    model = adapted(BASES[base](torch.bfloat16), CONFIGS[method]())
    exact = step(_as_fp32(model), rows())
    theirs = step(model, rows(torch.bfloat16))
    ours = step(peftkern.accelerate(model), rows(torch.bfloat16))
    assert_all_fast(model)
    assert ours["y"].dtype == torch.bfloat16
    for name, value in exact.items():
        error, theirs_error = ((each[name].double() - value).norm() / value.norm() for each in (ours, theirs))
        # Both round inputs and outputs of each layer to 8 bits.
        assert error < max(1.5 * theirs_error, 2**-7), f"{name}: {error:.2e}, PEFT's {theirs_error:.2e}"


def _as_fp32(model: nn.Module) -> nn.Module:
    """The same adapters on dense fp32 layers of the same values."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if path.endswith("base_layer"):
            plain = nn.Linear(layer.in_features, layer.out_features)
            weight = peft.utils.integrations.dequantize_module_weight(layer).detach().float()
            plain.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=layer.bias.requires_grad)
            model.set_submodule(path, plain)
    for module in model.modules():
        if type(module) in (peft.tuners.lora.Linear4bit, peft.tuners.ia3.Linear4bit):
            module.__class__ = {"lora": peft.tuners.lora.Linear, "ia3": peft.tuners.ia3.Linear}[
                type(module).__module__.split(".")[2]
            ]
            module.fan_in_fan_out = False
    return model.float()


@pytest.mark.parametrize("nested, storage", [(False, torch.uint8), (True, torch.bfloat16)])
def test_bitsandbytes_formats_are_viewed_in_place(nested, storage, seed):
    model = adapted(bnb(nested=nested, storage=storage), lora())
    expected = step(model, rows())
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.data_ptr(), layer.base_layer.weight.data.view(torch.uint8).clone()
    assert_near(step(peftkern.accelerate(model), rows()), expected, 5e-6)
    assert_all_fast(model)
    from peftkern.integrations._peft_base import read_base

    assert read_base(layer.base_layer, rows()).weight.codes.data_ptr() == before[0]
    assert torch.equal(layer.base_layer.weight.data.view(torch.uint8), before[1])


@BASE
def test_several_adapters_are_summed_and_nothing_is_kept(base, seed):
    model = adapted(BASES[base](), lora(lora_bias=True), peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5))
    model.base_model.set_adapter(["default", "1"])
    expected = step(model, rows())
    assert_near(step(peftkern.accelerate(model), rows()), expected, 5e-6)
    assert_all_fast(model)
    model.base_model.model[0].lora_B["1"].weight.data.mul_(-2)  # which no version counter shows
    model.base_model.model[0].scale_layer(0.5)
    ours = step(model, rows())
    assert_near(ours, step(peftkern.restore(model), rows()), 5e-6)
    assert not torch.allclose(ours["y"], expected["y"])


def test_several_ia3_adapters_multiply(seed):
    model = adapted(dense(), ia3(), ia3())
    model.base_model.set_adapter(["default", "1"])
    expected = step(model, rows())
    assert_near(step(peftkern.accelerate(model), rows()), expected, 5e-6)
    assert_all_fast(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
@BASE
def test_dropout_has_peft_s_formula(method, base, seed):
    """With everything or nothing dropped the masks cannot differ; between, only the mean can be compared."""
    model = adapted(BASES[base](), lora(lora_dropout=0.5, use_dora=method == "dora"))
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    for p in (0.0, 1.0):
        for dropout in dropouts:
            dropout.p = p
        expected = step(peftkern.restore(model), rows())
        ours = step(peftkern.accelerate(model), rows())
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
        assert_all_fast(model)
    for dropout in dropouts:
        dropout.p = 0.5
    layer, x = model.base_model.model[0], rows().detach()
    assert not torch.equal(layer(x), layer(x))
    ours = torch.stack([layer(x) for _ in range(400)]).mean(0)
    spread = (layer(x) - ours).abs().mean()
    peftkern.restore(model)
    theirs = torch.stack([layer(x) for _ in range(400)]).mean(0)
    # Two means of 400 draws, each sqrt(400) times as near as one.
    assert (ours - theirs).abs().mean() < 3 * spread / 20
    model.eval()
    x = rows()  # that needs a gradient: bitsandbytes does not repack the weight then
    expected = layer(x)
    torch.testing.assert_close(peftkern.accelerate(model).base_model.model[0](x), expected, rtol=1e-4, atol=1e-5)


@METHOD
def test_autocast(method, seed):
    model = adapted(dense(), CONFIGS[method]())
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, rows())
        ours = step(peftkern.accelerate(model), rows())
    assert_all_fast(model)
    assert_near(ours, expected, 2**-6)  # bf16 on both sides


def test_no_fp32_copy_of_x(seed):
    def saved(model: nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda _: None):
            model(x)
        return sum(sizes)

    x = torch.randn(512, WIDTHS[0]).bfloat16().requires_grad_()
    model = adapted(dense(torch.bfloat16), lora())
    theirs, ours = saved(model), saved(peftkern.accelerate(model))
    assert theirs - ours > 0.9 * 4 * 512 * (WIDTHS[0] + WIDTHS[1]) - 2 * 512 * (WIDTHS[0] + WIDTHS[1])


def test_scaling_that_is_a_tensor_is_read_at_every_call(seed):
    model = peftkern.accelerate(adapted(dense(), lora()))
    layer, x = model.base_model.model[0], rows()
    layer.scaling["default"] = torch.tensor(2.0)
    doubled, base = layer(x), layer.base_layer(x)
    layer.scaling["default"].mul_(2)
    torch.testing.assert_close(layer(x) - base, 2 * (doubled - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@METHOD
def test_gradient_checkpointing(method, use_reentrant, seed):
    from torch.utils.checkpoint import checkpoint

    model = peftkern.accelerate(adapted(dense(), CONFIGS[method]()))
    expected = step(model, rows())
    inner = copy.deepcopy(model)
    again = step(inner, rows())
    inner.forward = lambda x: checkpoint(model.forward, x, use_reentrant=use_reentrant)
    model.zero_grad()
    y = inner.forward(rows())
    y.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[name]) and torch.equal(again[name], expected[name])


@pytest.mark.parametrize("base", ["dense", "bitsandbytes"])
@METHOD
def test_compiles_without_a_graph_break(method, base, seed):
    model = peftkern.accelerate(adapted(BASES[base](), CONFIGS[method]()))
    expected = model(rows())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows()), expected)
    compiled(rows()).sum().backward()
    assert_all_fast(model)


def test_importing_peftkern_does_not_import_peft():
    program = "import sys, peftkern, peftkern.integrations.peft; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_model_without_peft_s_layers_is_left_alone():
    model = dense()
    with pytest.warns(UserWarning, match="accelerate: the model has no layers of PEFT"):
        assert peftkern.accelerate(model) is model
    assert peftkern.restore(model) is model
    for function in (peftkern.accelerate, peftkern.restore):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
            function(3)


def test_another_version_of_peft_keeps_its_own_forward(monkeypatch, seed):
    monkeypatch.setattr(integration, "version", lambda _: "0.99.1")
    model = adapted(dense(), lora())
    expected = model(rows())
    with pytest.warns(UserWarning, match=r"accelerate: PEFT must be >=0\.\d+, <0\.22, got 0\.99\.1") as caught:
        peftkern.accelerate(model)
    assert len(caught) == 1
    assert calls(model) == {} and torch.equal(model(rows()), expected)
    with pytest.warns(UserWarning, match="register: PEFT must be"):
        register(lora())
    with pytest.warns(UserWarning, match="accelerated: PEFT must be"), accelerated():
        assert calls(adapted(dense(), lora())) == {}


@METHOD
def test_the_official_hook_and_the_context(method, seed, tmp_path: Path):
    base = dense()
    model = adapted(copy.deepcopy(base), CONFIGS[method]())
    expected = model(rows())
    model.save_pretrained(tmp_path)
    with accelerated():
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(read(rows()), expected, rtol=1e-4, atol=1e-5)
    assert_all_fast(read)
    assert calls(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))) == {}
