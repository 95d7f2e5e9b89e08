"""lora_linear by CUDA kernels, which take 1 to 8 rows on NF4, against float64; on a GPU only."""

from typing import Any

import pytest
import torch
from linear_cases import (
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    lora_inputs,
    random_nf4,
)
from torch import Tensor

from peftkern import NF4Weight, lora_linear
from peftkern._native import caps
from peftkern.ops._linear import native_weight
from peftkern.ops._op import NAMESPACES
from peftkern.ops.lora_linear import lora_linear_reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not caps.cuda_archs(), reason="built without CUDA kernels, which `make cuda` compiles"),
]

ops = NAMESPACES["cuda"].library
DTYPES = (torch.bfloat16, torch.float16)
# The codes' rounding, or that of a weight in the gradient of x, whose base is rounded once more.
PRODUCT_ERROR = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


def moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("cuda") if isinstance(v, Tensor | NF4Weight) else v for k, v in inputs.items()}


def on_gpu(**inputs: Any) -> Tensor:
    """lora_linear on the GPU for inputs, results and gradients on the CPU."""
    return lora_linear(**moved(inputs), backend="cuda").cpu()


def check(inputs: dict[str, Any], grad_y: Tensor | None = None) -> None:
    x, out_features = inputs["x"], inputs["weight"].shape[0]
    grad_y = torch.randn(*x.shape[:-1], out_features).to(x.dtype) if grad_y is None else grad_y
    assert_near_float64(on_gpu, lora_linear_reference, inputs, grad_y, product_error=PRODUCT_ERROR[x.dtype])


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype, nested: bool, rows: int, seed: int) -> None:
    """Ranks beside a lane's and a warp's; one row of the weight and many; adapters in either dtype."""
    for rank, shape, adapter_dtype in (
        (1, (1, 64), torch.float32),
        (7, (70, 192), dtype),
        (16, (257, 4096), torch.float32),
        (64, (33, 320), dtype),
    ):
        x = torch.randn(rows, shape[1]).to(dtype)
        check(lora_inputs(random_nf4(shape, 64, nested), x, rank, adapter_dtype, dtype if rank > 1 else None))


@pytest.mark.parametrize(
    "name", [name for name, layout in LAYOUTS.items() if layout(torch.randn, 64).numel() <= 8 * 64]
)
def test_layouts(name: str, seed: int) -> None:
    grad_y, x = (LAYOUTS[name](torch.randn, features).bfloat16() for features in (7, 64))
    check(lora_inputs(random_nf4((7, 64)), x), grad_y)


def test_slices_of_factors(seed: int) -> None:
    """Whose first elements are on no 16-byte boundary, and whose rows lie apart."""
    inputs = lora_inputs(random_nf4((7, 64)), torch.randn(3, 64).bfloat16())
    inputs["lora_a"], inputs["lora_b"] = torch.randn(3, 67)[:, 1:65], torch.randn(3, 7).t()
    check(inputs)


@pytest.mark.parametrize("rows", [1, 8])
def test_same_bits_again(rows: int, seed: int) -> None:
    inputs = lora_inputs(random_nf4((1024, 4096)), torch.randn(rows, 4096).bfloat16(), 16)
    grad_y = torch.randn(rows, 1024).bfloat16()
    assert_same_bits(gradients(on_gpu, inputs, grad_y), gradients(on_gpu, inputs, grad_y))


def test_in_a_graph(seed: int) -> None:
    """Replayed with other values of x and of the factors."""
    first, second = (
        moved(lora_inputs(random_nf4((256, 512)), torch.randn(4, 512).bfloat16(), 16) | {"scaling": 0.7})
        for _ in range(2)
    )
    second["weight"] = first["weight"]
    wanted = lora_linear(**second, backend="cuda")
    lora_linear(**first, backend="cuda")  # opts in to shared memory
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(**first, backend="cuda")
    for name, value in float_tensors(first).items():
        value.copy_(second[name])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)


def test_on_another_stream(seed: int) -> None:
    inputs = moved(lora_inputs(random_nf4((256, 4096)), torch.randn(2, 4096).bfloat16(), 16))
    wanted = lora_linear(**inputs, backend="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = lora_linear(**inputs, backend="cuda")
        torch.cuda.current_stream().synchronize()
    assert torch.equal(y, wanted)


def test_opcheck(seed: int) -> None:
    q = random_nf4((7, 64)).to("cuda")
    x, lora_a, lora_b = (
        torch.randn(*shape, device="cuda").to(dtype).requires_grad_()
        for shape, dtype in (((2, 64), torch.bfloat16), ((3, 64), torch.float32), ((7, 3), torch.float32))
    )
    torch.library.opcheck(ops.lora_linear, (x, *native_weight(q), lora_a, lora_b, 0.7, None, 0.0, None))
    grad_y, h = torch.randn(2, 7, device="cuda").bfloat16(), torch.randn(2, 3, device="cuda")
    leaves = (x.detach(), h, *native_weight(q), lora_a.detach(), lora_b.detach())
    torch.library.opcheck(ops.lora_linear_backward, (grad_y, *leaves, 0.7, 0.0, None, True, True, True))


def test_compile_without_graph_breaks(seed: int) -> None:
    inputs = lora_inputs(random_nf4((7, 64)), torch.randn(3, 64).bfloat16())
    weight, grad_y = inputs.pop("weight"), torch.randn(3, 7).bfloat16()
    compiled, graphs = compile_counting(lambda **values: on_gpu(**values, weight=weight))
    eager = gradients(on_gpu, {**inputs, "weight": weight}, grad_y, float_tensors(inputs))
    assert_same_bits(gradients(compiled, inputs, grad_y), eager)
    assert graph_count(graphs) == 1


def test_double_backward(seed: int) -> None:
    inputs = lora_inputs(random_nf4((7, 64)), torch.randn(2, 64).bfloat16().requires_grad_())
    with pytest.raises(RuntimeError, match="lora_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(on_gpu(**inputs).float().square().sum(), inputs["x"], create_graph=True)
        grad.float().sum().backward()


def test_the_op_refuses_what_it_does_not_take(seed: int) -> None:
    """Also where it is called directly; the public function's messages are tested without a GPU."""
    q = random_nf4((7, 64)).to("cuda")
    x, lora_a, lora_b = (torch.randn(*shape, device="cuda") for shape in ((9, 64), (3, 64), (7, 3)))
    rest = (lora_a, lora_b, 1.0, None)
    with pytest.raises(RuntimeError, match="lora_linear: x must have at most 8 rows"):
        ops.lora_linear(x.bfloat16(), *native_weight(q), *rest, 0.0, None)
    with pytest.raises(RuntimeError, match="lora_linear: x must have at most 8 rows, in bfloat16 or float16"):
        ops.lora_linear(x[:1], *native_weight(q), *rest, 0.0, None)
    with pytest.raises(RuntimeError, match="lora_linear: dropout_p must be 0"):
        ops.lora_linear(x[:1].bfloat16(), *native_weight(q), *rest, 0.1, None)
    with pytest.raises(RuntimeError, match="lora_linear: weight must be NF4"):
        ops.lora_linear(x[:1], *native_weight(torch.randn(7, 64, device="cuda")), *rest, 0.0, None)
