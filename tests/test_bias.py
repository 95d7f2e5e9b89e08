"""BitFit: which biases, their gradients, what is saved for backward, merging; dense and NF4 bases."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkern
from peftkern.methods import METHODS
from peftkern.nn import NF4Linear
from peftkern.nn.bias import BiasLinear, BiasModule

IN, OUT = 24, 16


def make_base(quantized: bool, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    return NF4Linear.from_linear(linear) if quantized else linear


def make(quantized: bool, bias: bool, dtype: torch.dtype = torch.float32) -> BiasLinear:
    layer = BiasLinear(make_base(quantized, bias, dtype))
    nn.init.normal_(layer.bias_delta["default"], std=0.3)
    return layer


bases = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["without", "with"])


@bases
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)])
def test_output_and_gradients(quantized, bias, dtype, shape, seed):
    layer = make(quantized, bias, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = (layer.base_layer.dequantize() if quantized else layer.base_layer.weight).double()
    own = layer.bias_delta["default"].detach().double() + (layer.base_layer.bias.double() if bias else 0)
    expected = F.linear(x.double(), weight, own)
    y = layer(x)
    assert y.dtype == dtype and y.shape == expected.shape
    # The products are rounded once, the bias once before it, and the kernel may round the weight to bf16.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(y)
    y.backward(grad)
    (delta,) = layer.adapter_parameters("default")
    assert delta.grad.dtype == torch.float32 and layer.base_layer.weight.grad is None
    exact = grad.double().flatten(0, -2).sum(0)
    torch.testing.assert_close(delta.grad.double(), exact, atol=tolerance * 4, rtol=tolerance)
    torch.testing.assert_close(x.grad.double(), (grad.double() @ weight), atol=tolerance, rtol=tolerance)


@bases
@biases
def test_no_activation_is_saved(quantized, bias, seed):
    layer = make(quantized, bias)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    x = torch.randn(64, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert saved == []


@bases
@biases
def test_disabled_and_without_an_adapter(quantized, bias, seed):
    base = make_base(quantized, bias)
    x = torch.randn(3, IN)
    expected = base(x)
    layer = BiasLinear(base)
    nn.init.normal_(layer.bias_delta["default"])
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)
    layer.enable_adapters()
    layer.set_adapter(None)
    assert torch.equal(layer(x), expected)


@bases
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_same_bit_for_bit(quantized, bias, dtype, seed):
    layer = make(quantized, bias, dtype)
    x = torch.randn(4, IN, dtype=dtype)
    expected = layer(x)
    plain = copy.deepcopy(layer)
    plain.disable_adapters()
    report = layer.merge()
    assert report.to == ("nf4" if quantized else "dense") and report.relative_error == 0
    assert report.delta_error < 1e-2 if dtype == torch.bfloat16 else report.delta_error < 1e-6
    assert layer.merged and torch.equal(layer(x), expected)
    assert layer.weight.data_ptr() == layer.base_layer.weight.data_ptr()
    layer.disable_adapters()
    assert torch.equal(layer(x), plain(x))
    layer.enable_adapters()
    layer.unmerge()
    assert torch.equal(layer(x), expected) and (layer.base_layer.bias is not None) is bias
    layer.merge(keep_base=False)
    assert torch.equal(layer(x), expected) and not layer.settings and layer.base_layer.bias is not None
    with pytest.raises(RuntimeError, match="no adapter is active"):
        layer.merge()


def test_what_cannot_be_merged(seed):
    layer = make(False, True)
    with pytest.raises(ValueError, match="to='nf4' needs an NF4Linear base"):
        layer.merge("nf4")
    nn.init.constant_(layer.bias_delta["default"], float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge()
    norm = BiasModule(nn.LayerNorm(4))
    with pytest.raises(RuntimeError, match="no merged adapter"):
        norm.unmerge()
    with pytest.raises(ValueError, match="to must be 'dense' or 'nf4'"):
        norm.merge("fp8")
    norm.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        norm.merge()


@pytest.mark.parametrize(
    "base, x",
    [
        (nn.LayerNorm(8), torch.randn(2, 8)),
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 5, 5)),
        (nn.GroupNorm(2, 8), torch.randn(2, 8, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_that_are_not_linear(base, x, seed):
    expected = base(x)
    layer = BiasModule(base)
    assert layer.weight is base.weight
    torch.testing.assert_close(layer(x), expected)
    nn.init.normal_(layer.bias_delta["default"])
    changed = layer(x)
    layer(x).square().sum().backward()
    assert layer.bias_delta["default"].grad.any() and base.bias.grad is None
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        by_hand.bias += layer.bias_delta["default"]
    torch.testing.assert_close(changed, by_hand(x))
    layer.merge()
    assert torch.equal(layer(x), changed)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)


class Block(nn.Module):
    """BERT's names, and so its traps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(8, 8), "output": nn.ModuleDict({"dense": nn.Linear(8, 8)})})
        self.intermediate = nn.Linear(8, 8, bias=False)
        self.output = nn.ModuleDict({"dense": nn.Linear(8, 8)})
        self.output_layernorm = nn.LayerNorm(8)
        self.scale = nn.LayerNorm(8, bias=False)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention["output"]["dense"](self.attention["query"](x))
        x = self.output_layernorm(self.output["dense"](self.intermediate(x)))
        return self.heads(self.scale(x), x, x)[0]


ALL = ["attention.query", "attention.output.dense", "intermediate", "output.dense", "output_layernorm"]


@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, ALL),
        ({"add_missing": False}, [path for path in ALL if path != "intermediate"]),
        ({"target_modules": ["query", "intermediate"]}, ["attention.query", "intermediate"]),
        ({"target_modules": ["output.dense"]}, ["attention.output.dense", "output.dense"]),
        ({"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]}, ["output.dense"]),
        ({"target_modules": r"output\.dense"}, ["output.dense"]),
        ({"exclude_modules": ["output_layernorm"]}, ALL[:-1]),
    ],
)
def test_which_biases(options, chosen, seed):
    model = Block()
    model.output_layernorm.register_forward_hook(lambda *args: None)
    peftkern.tune(model, "bitfit", **options)
    assert list(METHODS["bitfit"].modules(model)) == chosen
    model(torch.randn(2, 3, 8)).square().sum().backward()
    report = peftkern.report(model)
    assert report.no_gradient == report.zero_gradient == []
    assert {name.rpartition(".bias_delta.")[0] for name, p in model.named_parameters() if p.requires_grad} == set(
        chosen
    )


def test_whole_model_round_trip_and_report(tmp_path, seed):
    model = peftkern.tune(Block(), "bitfit")
    base = copy.deepcopy(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    peftkern.save(model, tmp_path)
    peftkern.delete_adapter(base, "default")
    assert type(base.output_layernorm) is nn.LayerNorm
    expected = model(x)
    assert torch.equal(peftkern.load(base, tmp_path)(x), expected)
    rows = {row.name: row.method for row in peftkern.report(model).rows}
    assert rows["output_layernorm"] == rows["attention.query"] == "BitFit" and rows["scale"] == "frozen"
    records = {record.name: record[1:3] for record in peftkern.explain(model)}
    assert records["intermediate"] == ("linear", "torch") and records["output_layernorm"] == ("bias", "torch")
    peftkern.merge(model)
    assert torch.equal(model(x), expected)


def test_casting_showing_and_what_is_refused(seed):
    layer = make(True, True, torch.bfloat16).to(torch.float32)
    assert layer(torch.randn(2, IN)).dtype == torch.float32
    assert "adapters=(default), active=default" in repr(layer) and "active=default" in repr(BiasModule(nn.LayerNorm(2)))
    with pytest.raises(TypeError, match="base must have a floating-point bias, got ReLU"):
        BiasModule(nn.ReLU())
    with pytest.raises(TypeError, match=r"base must be an nn\.Linear or NF4Linear"):
        BiasLinear(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default")
