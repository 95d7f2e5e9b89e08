"""nf4_quantize, nf4_dequantize and nf4_linear by CUDA kernels: bytes, layouts, graphs, streams; on a GPU only.

The comparison with float64 over random shapes is benchmarks/gpu_errors.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import (
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    gradients,
    graph_count,
    linear_inputs,
    random_nf4,
)
from test_nf4_dequantize import DTYPES, assert_equal, random_weight
from torch import Tensor

from peftkern import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from peftkern._native import caps
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.nf4_dequantize import nf4_dequantize_reference
from peftkern.ops.nf4_linear import nf4_linear_reference
from peftkern.ops.nf4_quantize import BLOCK_SIZES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not caps.cuda_archs(), reason="built without CUDA kernels, which `make cuda` compiles"),
]

BACKEND = DEVICE = "cuda"
ops = NAMESPACES[BACKEND].library
# The codes' rounding, or a weight's; fp32 goes to the library's product.
PRODUCT_ERROR = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-5}
# Of decode, of every tile of tokens, and of the dense path.
ROWS = (0, 1, 4, 5, 8, 9, 17, 33, 65, 129, 257, 513, 2048)


def moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(DEVICE) if isinstance(v, Tensor | NF4Weight) else v for k, v in inputs.items()}


def on_gpu(**inputs: Any) -> Tensor:
    """nf4_linear on the GPU for inputs, results and gradients on the CPU."""
    return nf4_linear(**moved(inputs), backend=BACKEND).cpu()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_bytes_are_the_cpus(dtype: torch.dtype, block_size: int, seed: int) -> None:
    for shape in ((1, 1), (7, 33), (64, 96), (3, 4129)):
        dense = torch.randn(shape).to(dtype)
        wanted = nf4_quantize(dense, block_size, double_quant=False)
        found = nf4_quantize(dense.to(DEVICE), block_size, double_quant=False, backend=BACKEND)
        assert_same_bits({"codes": found.codes.cpu(), "absmax": found.absmax.cpu()}, dict(parts_of(wanted)))


def parts_of(q: NF4Weight) -> Any:
    return (("codes", q.codes), ("absmax", q.absmax))


def test_a_slice_on_no_boundary_is_quantized(seed: int) -> None:
    dense = torch.randn(64 * 9 + 1).bfloat16()
    found = nf4_quantize(dense.to(DEVICE)[1:].view(9, 64), double_quant=False, backend=BACKEND)
    wanted = nf4_quantize(dense[1:].view(9, 64), double_quant=False)
    assert torch.equal(found.codes.cpu(), wanted.codes)


def test_nested_bytes_are_the_cpus(seed: int) -> None:
    """From the same mean: that of the whole is torch's, whose order of sums is the device's."""
    q = random_nf4((300, 320), nested=True)
    assert q.nested_quant_map is not None
    absmax = torch.rand(1500) * 3
    inputs = absmax, q.nested_quant_map, absmax.mean()
    for found, wanted in zip(
        ops.nf4_quantize_absmax(*(t.to(DEVICE) for t in inputs)), ops.nf4_quantize_absmax(*inputs)
    ):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_bits_are_the_references(dtype: torch.dtype, block_size: int, nested: bool, seed: int) -> None:
    for shape in ((1, 1), (3, 1), (7, 33), (64, 96), (1, 4129), (130, 257)):
        q = random_weight(shape, block_size, nested)
        found = nf4_dequantize(q.to(DEVICE), dtype, backend=BACKEND)
        assert_equal(found.cpu(), nf4_dequantize_reference(q, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", PRODUCT_ERROR)
def test_rows(dtype: torch.dtype, nested: bool, seed: int) -> None:
    """Of weights with whole blocks in a row and without, an odd out, and contractions that are cut."""
    for shape in ((136, 320), (33, 100), (128, 4096)):
        weight = random_nf4(shape, 64, nested)
        for rows in ROWS:
            x, grad_y = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
            inputs = linear_inputs(weight, x, dtype)
            if rows == 0:
                assert gradients(on_gpu, inputs, grad_y)["x"].shape == x.shape
            else:
                error = PRODUCT_ERROR[dtype]
                assert_near_float64(on_gpu, nf4_linear_reference, inputs, grad_y, product_error=error)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[name](torch.randn, features).bfloat16() for features in (72, 64))
    inputs = linear_inputs(random_nf4((72, 64)), x)
    if x.numel():
        assert_near_float64(on_gpu, nf4_linear_reference, inputs, grad_y, product_error=6e-3)
    else:
        assert gradients(on_gpu, inputs, grad_y)["x"].shape == x.shape


def test_a_row_of_an_odd_matrix(seed: int) -> None:
    """Contiguous for torch whatever its stride, which TMA would refuse."""
    q = random_nf4((72, 64)).to(DEVICE)
    grad_y = torch.randn(4, 75, device=DEVICE).bfloat16()[2:3, :72]
    x = torch.randn(4, 67, device=DEVICE).bfloat16()[2:3, :64]
    for function, value in ((ops.nf4_linear, x), (ops.nf4_linear_backward, grad_y)):
        last = (None,) if function is ops.nf4_linear else ()
        found = function(value, *native_weight(q), *last)
        torch.testing.assert_close(found, function(value.clone(), *native_weight(q), *last), rtol=0, atol=0)


def test_codes_on_no_boundary(seed: int) -> None:
    """As a part of a larger buffer, from where 16 bytes cannot be read at once."""
    q = random_nf4((72, 64)).to(DEVICE)
    shifted = replace(q, codes=torch.cat((q.codes.new_zeros(1, 1), q.codes))[1:])
    for rows in (1, 40, 2000):
        x = torch.randn(rows, 64, device=DEVICE).bfloat16()
        assert torch.equal(nf4_linear(x, shifted, backend=BACKEND), nf4_linear(x, q, backend=BACKEND))


@pytest.mark.parametrize("rows", [1, 8, 40, 300])
def test_same_bits_again(rows: int, seed: int) -> None:
    inputs = linear_inputs(random_nf4((1024, 4096)), torch.randn(rows, 4096).bfloat16())
    grad_y = torch.randn(rows, 1024).bfloat16()
    assert_same_bits(gradients(on_gpu, inputs, grad_y, ["x"]), gradients(on_gpu, inputs, grad_y, ["x"]))


@pytest.mark.parametrize("rows", [4, 40, 300, 2048])
def test_in_a_graph(rows: int, seed: int) -> None:
    """Forward and dX, replayed with other values."""
    q = random_nf4((256, 4096)).to(DEVICE)
    x, other = (torch.randn(rows, 4096, device=DEVICE).bfloat16() for _ in range(2))
    grad_y = torch.randn(rows, 256, device=DEVICE).bfloat16()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = ops.nf4_linear(x, *native_weight(q), None)
        return y, ops.nf4_linear_backward(grad_y * x[:1, :1], *native_weight(q))

    wanted = both(other)
    both(x)  # opts in to shared memory
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(x)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for got, exact in zip(found, wanted, strict=True):
        assert torch.equal(got, exact)


def test_on_another_stream(seed: int) -> None:
    q, x = random_nf4((256, 4096)).to(DEVICE), torch.randn(40, 4096, device=DEVICE).bfloat16()
    wanted = nf4_linear(x, q, backend=BACKEND)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = nf4_linear(x, q, backend=BACKEND)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(y, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(seed: int) -> None:
    q, x = random_nf4((256, 4096)), torch.randn(40, 4096).bfloat16()
    wanted = nf4_linear(x.to("cuda:0"), q.to("cuda:0"), backend=BACKEND)
    assert torch.equal(nf4_linear(x.to("cuda:1"), q.to("cuda:1"), backend=BACKEND).cpu(), wanted.cpu())


def test_opcheck(seed: int) -> None:
    q = random_nf4((72, 64)).to(DEVICE)
    for rows in (2, 40):
        x = torch.randn(rows, 64, device=DEVICE).bfloat16().requires_grad_()
        torch.library.opcheck(ops.nf4_linear, (x, *native_weight(q), None))
        grad_y = torch.randn(rows, 72, device=DEVICE).bfloat16()
        torch.library.opcheck(ops.nf4_linear_backward, (grad_y, *native_weight(q)))


def test_compile_without_graph_breaks(seed: int) -> None:
    weight, x, grad_y = random_nf4((72, 64)), torch.randn(40, 64).bfloat16(), torch.randn(40, 72).bfloat16()
    compiled, graphs = compile_counting(lambda x: on_gpu(x=x, weight=weight, bias=None))
    eager = gradients(on_gpu, {"x": x, "weight": weight, "bias": None}, grad_y, ["x"])
    assert_same_bits(gradients(compiled, {"x": x}, grad_y), eager)
    assert graph_count(graphs) == 1


def test_a_part_elsewhere_is_refused(seed: int) -> None:
    q, x = random_nf4((72, 64)).to(DEVICE), torch.randn(2, 64, device=DEVICE).bfloat16()
    with pytest.raises(RuntimeError, match="nf4_linear: bias must be on CUDA device 0"):
        ops.nf4_linear(x, *native_weight(q), torch.randn(72))
    with pytest.raises(RuntimeError, match=r"nf4_linear: absmax must be .* with 72 elements"):
        ops.nf4_linear(x, *native_weight(replace(q, absmax=q.absmax[1:])), None)
