"""NF4Linear: the module around nf4_linear, what copies, casts and moves leave alone, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from nf4_layers import DTYPES, FLAT_PARTS, IN, OUT, PARTS, assert_entries, make, snapshot
from torch import Tensor, nn

from peftkern import nf4_linear, nf4_quantize
from peftkern.integrations.bitsandbytes import native_entries
from peftkern.nn import NF4Linear

NESTED = pytest.mark.parametrize("double_quant", [False, True], ids=["flat", "nested"])


def quantised(layer: NF4Linear) -> dict[str, Tensor]:
    """The entries of the weight, without the bias."""
    return {name: value for name, value in snapshot(layer).items() if name != "bias"}


# Construction


@NESTED
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_linear_is_nf4_quantize(dtype, block_size, double_quant, seed):
    linear = nn.Linear(33, 47, dtype=dtype)
    before = linear.weight.detach().clone()
    layer = NF4Linear.from_linear(linear, block_size, double_quant)
    q = nf4_quantize(before, block_size, double_quant)
    assert_entries(quantised(layer), native_entries(q))
    assert (layer.nf4.shape, layer.nf4.dtype, layer.nf4.block_size) == (q.shape, q.dtype, q.block_size)
    assert (layer.in_features, layer.out_features, layer.weight_dtype) == (33, 47, dtype)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_from_linear_keeps_the_bias_and_the_training_flag(training, bias):
    linear = nn.Linear(8, 8, bias=bias).train(training)
    layer = NF4Linear.from_linear(linear)
    assert layer.bias is linear.bias and layer.training is training


def test_from_linear_keeps_the_hooks(seed):
    linear, calls = nn.Linear(8, 8), []
    handles = [
        linear.register_forward_pre_hook(lambda *_: calls.append("forward pre")),
        linear.register_forward_hook(lambda *_, **__: calls.append("forward"), with_kwargs=True, always_call=True),
        linear.register_full_backward_pre_hook(lambda *_: calls.append("backward pre")),
        linear.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    layer = NF4Linear.from_linear(linear)
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == ["forward pre", "forward", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert len(calls) == 4


def test_from_linear_on_meta_stays_there():
    layer = NF4Linear.from_linear(nn.Linear(IN, OUT, device="meta", dtype=torch.bfloat16))
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        name: value.shape for name, value in make().state_dict().items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_layer_is_a_new_linear_quantised(dtype):
    torch.manual_seed(5)
    linear = nn.Linear(IN, OUT, dtype=dtype)
    torch.manual_seed(5)
    layer = NF4Linear(IN, OUT, dtype=dtype)
    assert_entries(snapshot(layer), snapshot(NF4Linear.from_linear(linear)))
    torch.manual_seed(5)
    layer.reset_parameters()
    assert_entries(snapshot(layer), snapshot(NF4Linear.from_linear(linear)))


def test_dtype_is_torch_s_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = NF4Linear(8, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight_dtype == layer.bias.dtype == layer.dequantize().dtype == torch.bfloat16


@NESTED
def test_parameters_and_buffers(double_quant):
    layer = make(torch.bfloat16, double_quant=double_quant)
    parameters = {name: (value.dtype, value.requires_grad) for name, value in layer.named_parameters()}
    assert parameters == {"weight": (torch.uint8, False), "bias": (torch.bfloat16, True)}
    parts = PARTS if double_quant else FLAT_PARTS
    assert [name for name, _ in layer.named_buffers()] == list(parts[1:])
    assert set(layer.state_dict()) == {*parts, "bias"}
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (OUT * IN // 2, 1)


def test_extra_repr():
    assert repr(NF4Linear(3, 5, block_size=128)) == (
        "NF4Linear(in_features=3, out_features=5, bias=True, block_size=128, double_quant=True, dtype=torch.float32)"
    )
    layer = NF4Linear(3, 5, bias=False, dtype=torch.float16, double_quant=False, compute_dtype=torch.bfloat16)
    assert repr(layer) == (
        "NF4Linear(in_features=3, out_features=5, bias=False, block_size=64, double_quant=False, dtype=torch.float16, "
        "compute_dtype=torch.bfloat16)"
    )


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((0, 4), {}, ValueError, "in_features must be a positive int, got 0"),
        ((4, -1), {}, ValueError, "out_features must be a positive int, got -1"),
        ((2.5, 4), {}, ValueError, "in_features must be a positive int, got 2.5"),
        ((4, "4"), {}, ValueError, "out_features must be a positive int, got '4'"),
        ((4, 4), {"block_size": 48}, ValueError, "block_size must be one of .*, got 48"),
        ((4, 4), {"dtype": torch.uint8}, TypeError, "dtype must be one of .*, got torch.uint8"),
        ((4, 4), {"compute_dtype": torch.int8}, TypeError, "compute_dtype must be one of .*, got torch.int8"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=f"NF4Linear: {message}"):
        NF4Linear(*arguments, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_from_linear_refuses_what_is_not_finite(value):
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[3, 5] = value
    with pytest.raises(ValueError, match="weight must be finite"):
        NF4Linear.from_linear(linear)


def test_from_linear_refuses_what_is_not_a_dense_linear():
    integer = nn.Linear(4, 4)
    integer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for linear, got in ((nn.Conv1d(4, 4, 1), "Conv1d"), (make(), "NF4Linear"), (None, "NoneType"), (integer, "int8")):
        with pytest.raises(TypeError, match=rf"NF4Linear.from_linear: linear.* must be .*{got}"):
            NF4Linear.from_linear(linear)
    with pytest.raises(ValueError, match=r"block_size must be one of .*, got 33"):
        NF4Linear.from_linear(nn.Linear(4, 4), 33)


# Forward and gradients


@NESTED
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, bias, double_quant, seed):
    layer = make(dtype, bias, double_quant=double_quant)
    x = torch.randn(3, 5, IN).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, OUT).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert torch.equal(y, nf4_linear(x, layer.nf4, layer.bias)) and y.dtype == dtype
    assert layer.weight.grad is None and not layer.weight.requires_grad

    weight = layer.dequantize(torch.float32).double()
    exact = F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    wanted = [(y, exact), (x.grad, grad.double() @ weight)]
    if bias:
        wanted.append((layer.bias.grad, grad.double().flatten(0, 1).sum(0)))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for got, value in wanted:
        assert got.dtype == dtype and (got.double() - value).norm() <= tolerance * value.norm()


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (1, 1, 2, IN)], ids=str)
def test_leading_shapes(shape, seed):
    layer = make()
    assert layer(torch.randn(shape)).shape == (*shape[:-1], OUT)


def test_training_flag_changes_nothing(seed):
    layer, x = make(torch.bfloat16), torch.randn(4, IN).bfloat16()
    assert layer.training
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compute_dtype(compute_dtype, seed):
    layer = make(compute_dtype=compute_dtype)
    x = torch.randn(4, IN, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert torch.equal(y, nf4_linear(x.to(compute_dtype), layer.nf4, layer.bias).float())
    assert layer(x.to(compute_dtype)).dtype == compute_dtype


def test_autocast(seed):
    layer, x = make(), torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, nf4_linear(x.bfloat16(), layer.nf4, layer.bias.bfloat16()))


def test_double_backward_names_the_op(seed):
    layer, x = make(), torch.randn(2, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="nf4_linear"):
        grad.sum().backward()


@pytest.mark.parametrize("x, error", [(torch.zeros(2, IN + 1), ValueError), (torch.zeros(2, IN).int(), TypeError)])
def test_bad_input(x, error):
    with pytest.raises(error, match="nf4_linear: x must"):
        make()(x)


def test_an_optimizer_leaves_every_byte(seed):
    layer = make()
    before = quantised(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    bias = layer.bias.detach().clone()
    layer(torch.randn(4, IN)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.bias, bias)
    assert_entries(quantised(layer), before)


# Views of the weight


@NESTED
def test_nf4_shares_the_tensors(double_quant):
    layer = make(double_quant=double_quant)
    q = layer.nf4
    own = [getattr(layer, name) for name in PARTS[:-1]]
    assert all(part is tensor for part, tensor in zip(q.tensors, own))
    assert (q.shape, q.dtype, q.block_size, q.nested) == ((OUT, IN), torch.float32, 64, double_quant)


def test_dequantize_and_W_q():
    layer = make(torch.bfloat16)
    assert layer.W_q is layer.weight
    assert layer.dequantize().dtype == torch.bfloat16
    for dtype in DTYPES:
        assert torch.equal(layer.dequantize(dtype), layer.nf4.dequantize(dtype))
        assert layer.dequantize(dtype).dtype == dtype
