"""bitsandbytes on our kernels. Run by test_bnb_backend.py where the entry point is installed."""

import copy
import pickle
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from nf4_layers import assert_entries, snapshot
from tiny_models import IDS, llama, logits, move, transformers
from torch import Tensor, nn

import peftkern
from peftkern import nf4_dequantize, nf4_linear, nf4_quantize
from peftkern.integrations import bnb_backend
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference

assert bnb_backend._registered

# Not multiples of a block or of 32, where bitsandbytes' own CPU path reads scales wrongly or fails.
SHAPES = [(33, 48), (64, 80), (40, 96), (32, 160), (64, 128), (7, 31), (1, 1)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])


def linear(out: int, columns: int, nested: bool = True, bias: bool = False, kind: str = "nf4", **options: Any) -> Any:
    return bnb.nn.Linear4bit(columns, out, bias, compress_statistics=nested, quant_type=kind, **options).to("cpu")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@SHAPE
@DTYPE
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_quantize_and_dequantize(shape, dtype, block_size, seed):
    weight = torch.randn(shape).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    expected = nf4_quantize(weight, block_size, double_quant=False)
    assert torch.equal(codes, expected.codes) and torch.equal(state.absmax, expected.absmax)
    dense = functional.dequantize_4bit(codes, state)
    assert dense.shape == shape and dense.dtype == dtype
    assert torch.equal(dense, nf4_dequantize_reference(expected))


@pytest.mark.parametrize("shape", [(100,), (3, 5, 64), (2, 2, 2, 17)], ids=str)
def test_any_shape(shape, seed):
    weight = torch.randn(shape)
    dense = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    assert torch.equal(dense.flatten(), nf4_dequantize(nf4_quantize(weight.view(1, -1), double_quant=False)).flatten())
    assert dense.shape == shape


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_storage(storage, seed):
    weight, x = torch.randn(24, 80), torch.randn(3, 80)
    both = [functional.quantize_4bit(weight, quant_type="nf4", quant_storage=kind) for kind in (torch.uint8, storage)]
    plain, stored = both
    assert (stored[0].dtype, stored[0].shape) == (storage, (960 // storage.itemsize, 1))
    assert torch.equal(stored[0].view(torch.uint8).flatten(), plain[0].flatten())
    assert torch.equal(functional.dequantize_4bit(*stored), functional.dequantize_4bit(*plain))
    results = [bnb.matmul_4bit(x, codes, quant_state=state) for codes, state in both]
    assert torch.equal(*results)


@SHAPE
@DTYPE
@NESTED
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_is_nf4_linear(shape, dtype, nested, bias, training, seed):
    layer = linear(*shape, nested, bias).train(training)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    ours = peftkern.from_bnb(copy.deepcopy(layer))
    own_bias = None if ours.bias is None else ours.bias.to(dtype)
    for each in (x, x.transpose(0, 1), x[0, 0]):
        assert torch.equal(layer(each), nf4_linear(each, ours.nf4, own_bias))
    assert layer(x[:0]).shape == (0, 3, shape[0])


@SHAPE
@DTYPE
def test_gradients(shape, dtype, seed):
    layer = linear(*shape)
    weight = nf4_dequantize_reference(peftkern.from_bnb(copy.deepcopy(layer)).nf4).double()
    x = (torch.randn(5, shape[1]) + 1).to(dtype).requires_grad_()
    grad = torch.randn(5, shape[0]).to(dtype)
    layer(x).backward(grad)
    # The gradient is torch's product with the weight rounded to dtype, itself rounded.
    assert relative_error(x.grad, grad.double() @ weight) < 4 * torch.finfo(dtype).eps


def test_eval_leaves_the_bytes(seed):
    layer = linear(64, 128, bias=True)
    before = snapshot(layer)
    layer.eval()(torch.randn(3, 128))
    assert_entries(snapshot(layer), before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_training_after_eval_has_all_gradients(seed):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(*(linear(64, 64, compute_dtype=torch.bfloat16) for _ in range(2)))
    model.is_loaded_in_4bit = True
    model = move(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], r=4)))
    x = torch.randn(8, 64, dtype=torch.bfloat16)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(x).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    output = model.eval()(x)
    assert len(before) == 4 and all(torch.equal(value, before[name]) for name, value in gradients().items())
    model.merge_adapter()
    # What merging costs is requantising: 4 bits of a weight that the adapter has changed.
    assert relative_error(model(x), output) < 0.15


def test_fp4_is_theirs(seed):
    weight = torch.randn(64, 128)
    codes, state = functional.quantize_4bit(weight, quant_type="fp4")
    arguments = (codes.flatten(), state.absmax, _get_4bit_code("fp4", weight.device), 64, weight.shape, weight.dtype)
    assert torch.equal(functional.dequantize_4bit(codes, state), _dequantize_4bit_compute(*arguments))
    layer = linear(64, 128, kind="fp4").eval()
    assert layer.support_avx512bf16_for_cpu == functional.has_avx512bf16()
    x = torch.randn(3, 128)
    dense = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert relative_error(layer(x), x @ dense.T) < 0.02  # their eval path computes in bf16


def test_what_is_not_finite_is_theirs(seed):
    weight = torch.randn(2, 64)
    weight[1, 3] = float("nan")
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(codes[:32], nf4_quantize(weight[:1], double_quant=False).codes) and state.absmax[1].isnan()


def test_wrong_sizes_still_raise(seed):
    codes, state = functional.quantize_4bit(torch.randn(8, 64), quant_type="nf4")
    state.shape = torch.Size((8, 128))
    with pytest.raises(RuntimeError):
        bnb.matmul_4bit(torch.randn(2, 128), codes, quant_state=state)


def test_compile_without_graph_breaks(seed):
    layer = linear(33, 48, compute_dtype=torch.float32)
    x = torch.randn(4, 48, requires_grad=True)
    for training in (True, False):
        compiled = torch.compile(layer.train(training), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


def test_layers_travel(seed):
    layer = linear(32, 64).eval()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.support_avx512bf16_for_cpu is False
        assert torch.equal(again(torch.ones(1, 64)), layer(torch.ones(1, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_transformers_is_ours_bit_for_bit(dtype, seed, tmp_path):
    llama().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, dtype=dtype, quantization_config=config, device_map="cpu")
    ours = load(tmp_path, dtype=dtype, quantization_config=peftkern.NF4Config())
    assert torch.equal(logits(theirs), logits(ours))
    assert torch.equal(theirs(input_ids=IDS, labels=IDS).loss, ours(input_ids=IDS, labels=IDS).loss)
