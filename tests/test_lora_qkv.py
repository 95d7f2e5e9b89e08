"""lora_qkv against float64 and against lora_linear calls: dtypes, levels, layouts, masks, gradients, torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    FP32_SUM,
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    only_level,
    random_nf4,
    relative_error,
)
from projection_cases import Inputs, projection_inputs, projections_of, random_weight, together
from torch import Tensor

from peftkern import lora_linear, lora_qkv
from peftkern._native import ops
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import formats_of
from peftkern.ops._projections import draw_seeds, native_projections
from peftkern.ops.lora_qkv import lora_qkv_reference

IN = 33
WEIGHTS = tuple(f"weight{i}" for i in range(8))


def call(x: Tensor, backend: str | None = "cpu", dropout_p: float = 0.0, training: bool = False, **inputs: Any) -> Any:
    weights, lora_as, lora_bs, scalings, biases = zip(*projections_of(inputs))
    return lora_qkv(x, weights, lora_as, lora_bs, scalings, biases, dropout_p, training, backend=backend)


def native(**inputs: Any) -> Tensor:
    return together(call(**inputs))


def separate(x: Tensor, **inputs: Any) -> Tensor:
    """lora_linear calls, all with an adapter."""
    dropout = {name: inputs.pop(name) for name in ("dropout_p", "training") if name in inputs}
    return together(tuple(lora_linear(x, w, a, b, s, bias, **dropout) for w, a, b, s, bias in projections_of(inputs)))


def reference(x: Tensor, dropout_p: float = 0.0, seeds: Tensor | None = None, **inputs: Any) -> Tensor:
    return together(lora_qkv_reference(x, projections_of(inputs), dropout_p, seeds))


def qkv(
    kinds: tuple[str, ...] = ("nf4", "float32", "flat nf4"),
    outs: tuple[int, ...] = (7, 5, 1),
    columns: int = IN,
    ranks: tuple[int | None, ...] = (3, 1, 16),
    **options: Any,
) -> Inputs:
    inputs: Inputs = {}
    for i, (kind, out, rank) in enumerate(zip(kinds, outs, ranks)):
        inputs |= projection_inputs(i, random_weight(kind, (out, columns)), rank, **options)
    return inputs


def check(inputs: Inputs) -> None:
    width = sum(p.weight.shape[0] for p in projections_of(inputs))
    x = inputs["x"]
    assert_near_float64(native, reference, inputs, torch.randn(*x.shape[:-1], width).to(x.dtype), through_x=WEIGHTS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_gradients(dropout_p: float, seed: int) -> None:
    inputs = {"x": torch.randn(2, 3, IN), **qkv(("float32",) * 3, ranks=(3, None, 2), bias_dtype=torch.float32)}
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}
    seeds = draw_seeds(projections_of(inputs), dropout_p, True)

    def function(*values: Tensor) -> Tensor:
        return reference(**dict(zip(leaves, values)), dropout_p=dropout_p, seeds=seeds)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_reference_is_lora_linear(seed: int) -> None:
    inputs = {"x": torch.randn(5, IN).double(), **qkv(("float32",) * 3)}
    inputs = {name: value.double() for name, value in inputs.items()}
    torch.testing.assert_close(call(**inputs, backend=None), call(**inputs, backend="reference"))
    torch.testing.assert_close(reference(**inputs), separate(**inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 20, 64, 270])
def test_shapes(isa: str, rows: int, dtype: torch.dtype, seed: int) -> None:
    """Grouped-query sizes, every kind of weight, adapters of either dtype, and some left out."""
    with only_level(isa):
        for kinds, outs, columns, ranks, options in (
            (("nf4", "nf4", "nf4"), (70, 8, 8), 96, (16, 16, 16), {}),
            (("nf4", "float32", "flat nf4"), (65, 513, 7), 130, (3, 1, 40), {"bias_dtype": dtype}),
            (("bfloat16", "float16", "nf4"), (1, 33, 64), 72, (2, None, 5), {"adapter_dtype": dtype}),
        ):
            check({"x": torch.randn(rows, columns).to(dtype), **qkv(kinds, outs, columns, ranks, **options)})


@pytest.mark.parametrize("count", [1, 2, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_projections(isa: str, dtype: torch.dtype, count: int, seed: int) -> None:
    """Their gradients of x are more products than one Gemm takes."""
    for p in (0.0, 0.3):
        inputs = qkv(("nf4",) * count, tuple(range(3, 3 + count)), IN, (2,) * count)
        check_masks({"x": torch.randn(40, IN).to(dtype), **inputs}, p)


def test_adapters_of_several_dtypes(isa: str, seed: int) -> None:
    inputs = qkv()
    for name in ("lora_a1", "lora_b0"):
        inputs[name] = inputs[name].bfloat16()
    for rows in (4, 40):
        check({"x": torch.randn(rows, IN).bfloat16(), **inputs})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    grad_y, x = (LAYOUTS[layout](randn, features) for features in (13, IN))
    assert_near_float64(native, reference, {"x": x, **qkv(bias_dtype=dtype)}, grad_y, through_x=WEIGHTS)


def test_strided_parameters(isa: str, seed: int) -> None:
    inputs = qkv()
    inputs["lora_a0"], inputs["lora_b1"] = torch.randn(IN, 3).t(), torch.randn(5, 9)[:, 4:5]
    inputs["lora_a2"], inputs["weight1"] = torch.randn(16, 1).expand(16, IN), torch.randn(IN, 5).t()
    for rows in (4, 40):
        check({"x": torch.randn(rows, IN), **inputs})


def check_masks(inputs: Inputs, p: float) -> None:
    """Under dropout_p = p, with the seeds that the generator gives next."""

    def dropping(**values: Any) -> Tensor:
        torch.manual_seed(5)
        return native(**values, dropout_p=p, training=True)

    torch.manual_seed(5)
    seeds = draw_seeds(projections_of(inputs), p, True)
    x, width = inputs["x"], sum(p.weight.shape[0] for p in projections_of(inputs))
    grad_y = torch.randn(*x.shape[:-1], width).to(x.dtype)
    expected_inputs = {**inputs, "dropout_p": p, "seeds": seeds}
    assert_near_float64(dropping, reference, inputs, grad_y, expected_inputs, through_x=WEIGHTS)


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(isa: str, dtype: torch.dtype, p: float, seed: int) -> None:
    """A mask for each adapter, also in the one sum of the gradients of x."""
    for rows in (1, 4, 20, 270):
        check_masks({"x": torch.randn(rows, 130).to(dtype), **qkv(outs=(65, 30, 7), columns=130)}, p)
        check_masks({"x": torch.randn(rows, IN).to(dtype), **qkv(ranks=(3, None, 40))}, p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_lora_linear(isa: str, dtype: torch.dtype, dropout_p: float, seed: int) -> None:
    """The same generator state: the same bits, but for dx, which is rounded once instead of five times."""
    for rows in (3, 40, 270):
        inputs = {"x": torch.randn(rows, 130).to(dtype), **qkv(outs=(65, 30, 7), columns=130, bias_dtype=dtype)}
        grad_y = torch.randn(rows, 102).to(dtype)
        results = []
        for function in (native, separate):
            torch.manual_seed(seed)
            results.append(gradients(partial(function, dropout_p=dropout_p, training=True), inputs, grad_y))
        ours, theirs = (result.pop("x") for result in results)
        assert_same_bits(*results)
        assert relative_error(ours, theirs.double()) <= 2 * torch.finfo(dtype).eps + FP32_SUM


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"training": True}])
def test_no_dropout_draws_no_number(isa: str, options: dict[str, Any], seed: int) -> None:
    inputs = {"x": torch.randn(4, IN), **qkv()}
    state = torch.get_rng_state()
    assert torch.equal(native(**inputs, **options), native(**inputs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    inputs = qkv(("nf4",) * 3, (513, 130, 64), 320, (16, 16, 16))

    def dropping(**values: Any) -> Tensor:
        torch.manual_seed(seed)
        return native(**values, dropout_p=0.1, training=True)

    for rows in (1, 16, 300):
        inputs["x"], grad_y = torch.randn(rows, 320).to(dtype), torch.randn(rows, 707).to(dtype)
        for function in (native, dropping):
            results = []
            for threads in (1, 2, 3):
                set_threads(threads)
                results.append(gradients(function, inputs, grad_y))
            assert_same_bits(results[1], results[0])
            assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("needs", [("x",), ("lora_a1",), ("lora_b2",), ("weight1",), ("bias0",), ("x", "lora_b0"), ()])
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    inputs = {"x": torch.randn(40, IN), **qkv(bias_dtype=torch.float32)}
    expected = gradients(native, inputs, torch.ones(40, 13))
    leaves = {name: value.clone().requires_grad_(name in needs) for name, value in float_tensors(inputs).items()}
    y = native(**{**inputs, **leaves})
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_an_output_that_is_not_used(isa: str, seed: int) -> None:
    inputs = {"x": torch.randn(4, IN), **qkv()}
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    call(**{**inputs, **leaves})[0].sum().backward()
    assert leaves["lora_b0"].grad.any() and leaves["x"].grad.any() and not leaves["lora_b1"].grad.any()


def saved_bytes(function: Any, inputs: Inputs) -> int:
    """What backward keeps beside the parameters; x counts as often as it is kept."""
    sizes: list[int] = []
    own = {value.data_ptr() for name, value in float_tensors(inputs).items() if name != "x"}
    own |= {part.data_ptr() for p in projections_of(inputs) if not isinstance(p.weight, Tensor) for part in parts(p)}
    leaves = {name: value.detach().requires_grad_() for name, value in float_tensors(inputs).items()}

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(0 if tensor.data_ptr() in own else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**{**inputs, **leaves})
    return sum(sizes)


def parts(projection: Any) -> list[Tensor]:
    return [part for part in projection.weight.tensors if part is not None]


def test_saves_x_and_h_once(seed: int) -> None:
    inputs = {"x": torch.randn(50, 320).bfloat16(), **qkv(("nf4",) * 3, (64, 64, 64), 320, (16, 16, 16))}
    inputs |= {f"scaling{i}": 0.5 for i in range(3)}
    assert saved_bytes(call, inputs) == 50 * 320 * 2 + 50 * 48 * 4
    assert saved_bytes(separate, inputs) == 3 * 50 * 320 * 2 + 50 * 48 * 4


@pytest.mark.parametrize("kinds", [("nf4",) * 3, ("float32",) * 3, ("nf4", "float32", "flat nf4")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(kinds: tuple[str, ...], dropout_p: float, seed: int) -> None:
    inputs = qkv(kinds, ranks=(3, None, 2), bias_dtype=torch.float32)
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    projections = [p._replace(scaling=0.5) for p in projections_of(inputs)]
    lists = native_projections(projections)
    seeds = draw_seeds(projections, dropout_p, True)
    x = torch.randn(2, 3, IN, requires_grad=True)
    torch.library.opcheck(ops.lora_qkv, (x, *lists, dropout_p, seeds))
    flat = [[v.detach() if isinstance(v, Tensor) else v for v in values] for values in lists]
    w, wf, lora_as, lora_bs, scalings, _ = flat
    grad_ys = [torch.randn(2, 3, out) for out in (weight.out_features for weight in formats_of(wf))]
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        packed = (w, wf, lora_as, lora_bs, scalings)
        arguments = (grad_ys, x.detach(), torch.randn(6, 5), *packed, dropout_p, seeds, *needs)
        torch.library.opcheck(ops.lora_qkv_backward, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_without_graph_breaks(dropout_p: float, seed: int) -> None:
    inputs = qkv(bias_dtype=torch.float32)
    weights = {name: inputs.pop(name) for name in ("weight0", "weight2")}

    def function(**values: Any) -> Tensor:
        return native(**values, **weights, dropout_p=dropout_p, training=True)

    compiled, graphs = compile_counting(function)
    for rows in (50, 51, 60):
        inputs["x"], grad_y = torch.randn(rows, IN), torch.randn(rows, 13)
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


def test_autocast(isa: str, seed: int) -> None:
    inputs = {"x": torch.randn(5, IN), **qkv(bias_dtype=torch.float32)}
    halved = {name: v.bfloat16() if name == "x" or name.startswith("bias") else v for name, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = native(**inputs)
    assert y.dtype == torch.bfloat16 and torch.equal(y, native(**halved))


def test_double_backward(seed: int) -> None:
    inputs = {"x": torch.randn(5, IN, requires_grad=True), **qkv()}
    with pytest.raises(RuntimeError, match="lora_qkv: double backward is not implemented"):
        (grad,) = torch.autograd.grad(native(**inputs).square().sum(), inputs["x"], create_graph=True)
        grad.sum().backward()


A, B = torch.ones(2, IN), torch.ones(7, 2)
GOOD: Inputs = {
    "x": torch.ones(3, IN),
    "weights": [random_nf4((7, IN)), torch.ones(5, IN)],
    "lora_as": [A, None],
    "lora_bs": [B, None],
    "scalings": [1.0, 1.0],
    "biases": [None, torch.ones(5)],
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"\[0\]: x must be a Tensor, got list"),
        ({"x": torch.ones(3, 4)}, ValueError, r"\[0\]: x must have shape \[..., 33\] .*, got \[3, 4\]"),
        ({"weights": torch.ones(2, 7, IN)}, TypeError, ": weights must be a sequence of weights, got Tensor"),
        ({"weights": []}, ValueError, ": weights must have at least one entry"),
        ({"weights": [torch.ones(7, IN), 1]}, TypeError, r"\[1\]: weight must be a Tensor or NF4Weight, got int"),
        ({"lora_as": [A]}, ValueError, ": lora_as must have 2 entries, as weights, got 1"),
        ({"scalings": [1.0] * 3}, ValueError, ": scalings must have 2 entries, as weights, got 3"),
        ({"biases": []}, ValueError, ": biases must have 2 entries, as weights, got 0"),
        ({"lora_as": [None, None]}, TypeError, r"\[0\]: lora_a must be a Tensor, got NoneType"),
        ({"lora_as": [A[:, 1:], None]}, ValueError, r"\[0\]: lora_a must have shape \[rank, 33\], got \[2, 32\]"),
        ({"lora_bs": [B[1:], None]}, ValueError, r"\[0\]: lora_b must have shape \[7, 2\] .*, got \[6, 2\]"),
        ({"scalings": ["1", 1.0]}, TypeError, r"\[0\]: scaling must be a number or a 0-d tensor, got str"),
        ({"biases": [None, torch.ones(4)]}, ValueError, r"\[1\]: bias must have shape \[5\] .*, got \[4\]"),
        ({"dropout_p": 1.5}, ValueError, r"\[0\]: dropout_p must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments_raise(change: Inputs, error: Any, message: str, backend: str) -> None:
    with pytest.raises(error, match=f"lora_qkv{message}"):
        lora_qkv(**{**GOOD, **change}, backend=backend)


def test_native_op_checks_its_arguments() -> None:
    x, lists = torch.ones(3, IN), native_projections(projections_of(qkv()))
    for change, message in (
        ({"w": lists.w[:-1]}, "lora_qkv: w must have"),
        ({"w": [*lists.w, lists.w[0]]}, "lora_qkv: w must have .* tensors, as wf says, got"),
        ({"wf": lists.wf[:-1]}, "lora_qkv: wf must have 5 entries for each weight, got 14"),
        ({"wf": []}, "lora_qkv: w must have 0 tensors"),
        ({"biases": lists.biases[:2]}, "lora_qkv: biases must have 3 entries, got 2"),
        ({"scalings": [1.0]}, "lora_qkv: scalings must have 3 entries, got 1"),
        ({"wf": [*lists.wf[:4], 2, *lists.wf[5:]]}, "lora_qkv: "),
        ({"biases": [torch.ones(9)] * 3}, r"lora_qkv: bias must have shape \[7\], got \[9\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.lora_qkv(x, *lists._replace(**change), 0.0, None)
    with pytest.raises(RuntimeError, match="lora_qkv: seeds must have 3 entries, got 1"):
        ops.lora_qkv(x, *lists, 0.5, draw_seed())
