"""BottleneckAdapter, AdaptedSublayer and AdaptedNorm: what they compute, and what their adapters and copies promise."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkern.nn import AdaptedSublayer, BottleneckAdapter, NF4Linear
from peftkern.nn.adapter import AdaptedNorm, BottleneckSettings

IN, WIDTH, SIZE = 48, 32, 5


def fill(module: nn.Module) -> Any:
    """Adapters as large as what they adapt."""
    for name, parameter in module.named_parameters():
        if "adapter_" in name:
            nn.init.normal_(parameter, std=0.4)
    return module


def make(base: nn.Module | None = None, adapter_name: str = "default", **settings: Any) -> AdaptedSublayer:
    base = nn.Linear(IN, WIDTH) if base is None else base
    return fill(AdaptedSublayer(base, WIDTH, BottleneckSettings(SIZE, **settings), adapter_name))


def formula(adapter: BottleneckAdapter, x: Tensor, residual: Tensor) -> Tensor:
    state = adapter.state_dict()
    z = F.linear(x, state["adapter_down.0.weight"], state["adapter_down.0.bias"])
    return residual + state.get("scaling", adapter.settings.scaling) * F.linear(
        F.gelu(z), state["adapter_up.weight"], state["adapter_up.bias"]
    )


@pytest.mark.parametrize("scaling", [0.5, 3, "learned"])
def test_sequential_is_the_formula(scaling: float | str, seed: int) -> None:
    layer = make(scaling=scaling)
    x = torch.randn(2, 3, IN)
    h = layer.base_layer(x)
    torch.testing.assert_close(layer(x), formula(layer.adapters["default"], h, h))


def test_parallel_is_the_formula(seed: int) -> None:
    """The input is what the norm before the sublayer was called with."""
    layer, norm = make(nn.Linear(WIDTH, WIDTH), parallel=True), nn.LayerNorm(WIDTH)
    layer.take_input_of(norm)
    stream = torch.randn(2, 3, WIDTH)
    normed = norm(stream)
    torch.testing.assert_close(layer(normed), formula(layer.adapters["default"], stream, layer.base_layer(normed)))
    with pytest.raises(RuntimeError, match="a parallel adapter needs the sublayer's input; see take_input_of"):
        layer(normed)
    other = nn.Bilinear(WIDTH, WIDTH, 2)
    layer.take_input_of(other, 1)
    other(stream, stream + 1)
    expected = formula(layer.adapters["default"], stream + 1, layer.base_layer(normed))
    torch.testing.assert_close(layer(normed), expected)
    assert not norm._forward_pre_hooks
    layer.delete_adapter("default")
    assert not other._forward_pre_hooks


@pytest.mark.parametrize(("init", "largest"), [("houlsby", 1e-3), ("bert", 0.25), ("mam_adapter", 0.0)])
def test_a_new_adapter_is_near_the_identity(init: str, largest: float, seed: int) -> None:
    layer = AdaptedSublayer(nn.Identity(), 256, BottleneckSettings(init=init))
    x = torch.randn(64, 256)
    assert (layer(x) - x).abs().max() <= largest
    down, up = (layer.adapters["default"].state_dict()[f"adapter_{n}.weight"] for n in ("down.0", "up"))
    if init == "houlsby":
        # A normal distribution cut off at two standard deviations has 0.88 of its deviation.
        assert down.abs().max() <= 2e-3 and 0.85e-3 < down.std() < 0.91e-3 and 0.85e-3 < up.std() < 0.91e-3
    if init == "bert":
        assert 0.019 < down.std() < 0.021 and 0.019 < up.std() < 0.021
    for name, parameter in layer.adapters["default"].named_parameters():
        assert name.endswith("weight") or not parameter.any()


def test_defaults_are_the_paper_s() -> None:
    settings = AdaptedSublayer(nn.Linear(IN, WIDTH), WIDTH).settings["default"]
    assert settings == BottleneckSettings(64, "gelu", 1.0, False, "houlsby", 1e-3)


def test_parameters_are_those_of_the_paper() -> None:
    """2 m d + m + d."""
    assert sum(p.numel() for p in BottleneckAdapter(4096).parameters()) == 528_448


def test_state_dict_names_are_adapterhub_s(seed: int) -> None:
    layer = make(adapter_name="task", scaling="learned")
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if "adapters" in name}
    assert shapes == {
        "adapters.task.adapter_down.0.weight": (SIZE, WIDTH),
        "adapters.task.adapter_down.0.bias": (SIZE,),
        "adapters.task.adapter_up.weight": (WIDTH, SIZE),
        "adapters.task.adapter_up.bias": (WIDTH,),
        "adapters.task.scaling": (1,),
    }


def test_only_the_active_adapter_trains(seed: int) -> None:
    layer = make(scaling="learned")
    layer.add_adapter("second", BottleneckSettings(3))
    fill(layer)
    x = torch.randn(4, IN)
    layer(x).sum().backward()
    with_grad = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_grad == {f"adapters.default.{name}" for name in layer.adapters["default"].state_dict()}
    layer.set_adapter("second")
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        f"adapters.second.{name}" for name in layer.adapters["second"].state_dict()
    }


@pytest.mark.parametrize("kind", ["linear", "nf4", "dropout"])
def test_disabled_is_the_base_bit_for_bit(kind: str, seed: int) -> None:
    base = nn.Dropout() if kind == "dropout" else nn.Linear(WIDTH, WIDTH)
    base = NF4Linear.from_linear(base) if kind == "nf4" else base
    x = torch.randn(4, WIDTH)
    expected = base.eval()(x)
    layer = make(base)
    assert not layer.training and not torch.equal(layer(x), expected)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)
    layer.enable_adapters()
    assert not torch.equal(layer(x), expected)
    layer.set_adapter(None)
    assert torch.equal(layer(x), expected)


def test_adapters_switch_and_go(seed: int) -> None:
    layer = make()
    layer.add_adapter("second", BottleneckSettings(3))
    fill(layer)
    x = torch.randn(4, IN)
    first = layer(x)
    layer.set_adapter("second")
    second = layer(x)
    assert not torch.allclose(first, second)
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("default")
    assert layer.active_adapter is None and set(layer.adapters) == set(layer.settings) == {"second"}
    assert torch.equal(layer(x), layer.base_layer(x))
    for call, message in (
        (lambda: layer.set_adapter("default"), "no adapter 'default'; there is 'second'"),
        (lambda: layer.adapter_parameters("third"), "no adapter 'third'"),
        (lambda: layer.add_adapter("second"), "adapter 'second' exists already"),
        (lambda: layer.add_adapter("a.b"), "adapter_name must be a name without '.'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, seed: int) -> None:
    """fp32 adapters on any base; adapters in the base's dtype."""
    layer = make(nn.Linear(IN, WIDTH, dtype=dtype))
    x = torch.randn(4, IN, dtype=dtype)
    assert layer(x).dtype == dtype
    own = AdaptedSublayer(nn.Linear(IN, WIDTH, dtype=dtype), WIDTH, dtype=dtype)
    assert own(x).dtype == dtype and {p.dtype for p in own.adapter_parameters("default")} == {dtype}


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(through: str, seed: int) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), make(nn.Linear(WIDTH, WIDTH), parallel=True))
    model[1].take_input_of(model[0])
    x = torch.randn(3, WIDTH)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    fill(twin)
    assert torch.equal(model(x), expected) and not torch.allclose(twin(x), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, seed: int) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), make(nn.Linear(WIDTH, WIDTH), parallel=True))
    model[1].take_input_of(model[0])
    x = torch.randn(3, WIDTH, requires_grad=True)
    grads = []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        function(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model[1].adapter_parameters("default")])
    assert all(map(torch.equal, *grads))


def test_compile_without_graph_breaks(seed: int) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), make(nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bottleneck": 0}, ValueError, "bottleneck must be positive, got 0"),
        ({"bottleneck": 2.0}, TypeError, "bottleneck must be an int, got 2.0"),
        ({"activation": "gelu_new"}, ValueError, "activation must be one of relu, .*; did you mean .*'gelu'"),
        ({"scaling": "learnt"}, TypeError, "scaling must be a number or 'learned', got 'learnt'"),
        ({"scaling": float("inf")}, ValueError, "scaling must be finite, got inf"),
        ({"parallel": 1}, TypeError, "parallel must be a bool, got 1"),
        ({"init": "zeros"}, ValueError, "init must be one of houlsby, bert, mam_adapter, got 'zeros'"),
        ({"init_scale": 0}, ValueError, "init_scale must be positive, got 0"),
        ({"init_scale": None}, TypeError, "init_scale must be a number, got None"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^BottleneckAdapter: {message}"):
        BottleneckSettings(**options)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"BottleneckAdapter: dtype must be one of .*, got torch.int8"):
        BottleneckAdapter(WIDTH, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"AdaptedSublayer: base must be an nn.Module, got int"):
        AdaptedSublayer(3, WIDTH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AdaptedNorm: base must be a module of parameters alone, got Sequential"):
        AdaptedNorm(nn.Sequential())
    base = nn.Linear(IN, WIDTH)
    with pytest.raises(ValueError, match="adapter_name"):
        AdaptedSublayer(base, WIDTH, adapter_name="")
    assert base.weight.requires_grad


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms(kind: Any, seed: int) -> None:
    """Each adapter has its own copy; the base's hooks run once, whichever is active."""
    base = kind(WIDTH)
    calls: list[int] = []
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    norm, x = AdaptedNorm(base), torch.randn(3, WIDTH)
    expected = norm(x)
    assert torch.equal(expected, base(x)) and len(calls) == 2
    norm.add_adapter("second")
    nn.init.constant_(norm.adapter_parameters("default")[0], 2.0)
    assert torch.equal(norm(x), 2 * expected) and len(calls) == 3
    norm(x).sum().backward()
    assert {n for n, p in norm.named_parameters() if p.grad is not None} == {
        f"adapters.default.{n}" for n, _ in base.named_parameters()
    }
    norm.disable_adapters()
    assert torch.equal(norm(x), expected)
    norm.enable_adapters()
    norm.set_adapter("second")
    assert torch.equal(norm(x), expected)
    handle.remove()
    calls.clear()
    norm(x)
    assert not calls
