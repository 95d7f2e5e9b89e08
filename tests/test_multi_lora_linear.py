"""multi_lora_linear against float64 and against lora_linear calls: batches, ranks, levels, masks, torch's tools."""

from functools import partial
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    LAYOUTS,
    assert_near_float64,
    assert_same_bits,
    compile_counting,
    float_tensors,
    gradients,
    graph_count,
    only_level,
)
from projection_cases import Inputs, random_weight
from torch import Tensor

from peftkern import lora_linear, multi_lora_linear
from peftkern._native import ops
from peftkern.ops._dropout import draw_seed
from peftkern.ops._linear import native_weight
from peftkern.ops.multi_lora_linear import multi_lora_linear_reference

OUT, IN = 7, 33
SOME = (1, -1, 0, 3, 1, 0)  # adapter 2 has no row


def of_adapters(inputs: Inputs) -> dict[str, Any]:
    """The lists of the op from tensors by name: "lora_a1" is A of the second adapter."""
    rest = {name: value for name, value in inputs.items() if not name[-1].isdigit()}
    count = sum(name.startswith("lora_a") for name in inputs)
    lists = {f"{name}s": [inputs[f"{name}{i}"] for i in range(count)] for name in ("lora_a", "lora_b", "scaling")}
    return {**rest, **lists}


def call(backend: str | None = "cpu", **inputs: Any) -> Tensor:
    return multi_lora_linear(**of_adapters(inputs), backend=backend)


def reference(**inputs: Any) -> Tensor:
    return multi_lora_linear_reference(**of_adapters(inputs))


def make(
    x: Tensor,
    indices: Tensor | tuple[int, ...] = SOME,
    kind: str = "nf4",
    out_features: int = OUT,
    ranks: tuple[int, ...] = (3, 1, 4, 16),
    adapter_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
) -> Inputs:
    indices = indices if isinstance(indices, Tensor) else torch.tensor(indices)
    inputs = {"x": x, "weight": random_weight(kind, (out_features, x.shape[-1])), "indices": indices}
    inputs["bias"] = None if bias_dtype is None else 3 * torch.randn(out_features).to(bias_dtype)
    for i, rank in enumerate(ranks):
        inputs[f"lora_a{i}"] = torch.randn(rank, x.shape[-1]).to(adapter_dtype)
        inputs[f"lora_b{i}"] = (torch.randn(out_features, rank) / max(1, rank) ** 0.5).to(adapter_dtype)
        inputs[f"scaling{i}"] = torch.tensor(0.7 + 0.2 * i)
    return inputs


def check(inputs: Inputs, function: Any = call, **expected: Any) -> None:
    x = inputs["x"]
    grad_y = torch.randn(*x.shape[:-1], inputs["weight"].shape[0]).to(x.dtype)
    assert_near_float64(function, reference, inputs, grad_y, {**inputs, **expected})


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_reference_gradients(dropout_p: float, seed: int) -> None:
    inputs = make(torch.randn(6, 2, 5), kind="float32", out_features=3, ranks=(2, 1, 1, 2), bias_dtype=torch.float32)
    leaves = {name: value.double().requires_grad_() for name, value in float_tensors(inputs).items()}
    mask_seed = draw_seed()

    def function(*values: Tensor) -> Tensor:
        return reference(**{**inputs, **dict(zip(leaves, values))}, dropout_p=dropout_p, seed=mask_seed)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_reference_is_lora_linear_for_each_sample(dropout_p: float, seed: int) -> None:
    """And the base alone for those without an adapter; masks are those of a lora_linear on the whole batch."""
    inputs = {
        name: value.double() for name, value in float_tensors(make(torch.randn(6, 2, IN), kind="float32")).items()
    }
    values = of_adapters(inputs)
    torch.manual_seed(seed)
    y = multi_lora_linear(**values, indices=torch.tensor(SOME), dropout_p=dropout_p, training=True)
    for sample, i in enumerate(SOME):
        adapter = (values["lora_as"][i], values["lora_bs"][i], values["scalings"][i] * (i >= 0))
        torch.manual_seed(seed)
        expected = lora_linear(inputs["x"], inputs["weight"], *adapter, None, dropout_p, True)
        torch.testing.assert_close(y[sample], expected[sample])


@pytest.mark.parametrize("kind", ["nf4", "flat nf4", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    """Decoding, a few samples, and more rows of one adapter than a tile has; adapters of either dtype."""
    with only_level(isa):
        for out, columns, tokens, adapter_dtype, bias_dtype in (
            (65, 130, 1, torch.float32, None),
            (513, 72, 4, dtype, dtype),
            (33, 320, 90, torch.float32, torch.float32),
            (1, 1, 3, dtype, None),
        ):
            x = torch.randn(6, tokens, columns).to(dtype)
            check(make(x, SOME, kind, out, (16, 40, 3, 130), adapter_dtype, bias_dtype))


BATCHES = {
    "by row": (torch.tensor([[3, 0, -1], [0, 0, 1]]), (2, 3)),
    "one for all": (torch.tensor(1), (4, 5)),
    "none for all": (torch.tensor([-1, -1]), (2, 5)),
    "in order": (torch.tensor([0, 0, 1, 3, -1]), (5, 2)),
    "one sample": (torch.tensor([3]), (1, 1)),
    "int32": (torch.tensor([3, 0], dtype=torch.int32), (2, 2, 2)),
    "strided": (torch.tensor([3, 9, 0, 9])[::2], (2, 2)),
    "expanded": (torch.tensor([[2], [1]]).expand(2, 3), (2, 3)),
    "no tokens": (torch.tensor([3, 0]), (2, 0)),
    "no samples": (torch.tensor([], dtype=torch.int64), (0, 3)),
    "one vector": (torch.tensor(2), ()),
    "a row each": (torch.arange(40).remainder(5) - 1, (40,)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(isa: str, dtype: torch.dtype, batch: str, seed: int) -> None:
    indices, leading = BATCHES[batch]
    inputs = make(torch.randn(*leading, IN).to(dtype), indices)
    check(inputs)
    used = {int(i) for i in indices.unique()} if inputs["x"].numel() else set()
    grads = gradients(call, inputs, torch.ones(*leading, OUT, dtype=dtype))
    for i in range(4):
        assert grads[f"lora_a{i}"].any() == grads[f"lora_b{i}"].any() == (i in used)


@pytest.mark.parametrize("ranks", [(0, 3, 0, 1), (0, 0, 0, 0), (5,), tuple(range(1, 12))])
def test_ranks(isa: str, ranks: tuple[int, ...], seed: int) -> None:
    indices = torch.arange(3 * len(ranks)).remainder(len(ranks) + 1) - 1
    check(make(torch.randn(len(indices), 2, IN), indices, "float32", ranks=ranks))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_adapters_it_is_the_base(isa: str, backend: str, seed: int) -> None:
    inputs = make(torch.randn(6, 2, IN), (-1,) * 6, "float32", ranks=(), bias_dtype=torch.float32)
    base = lora_linear(inputs["x"], inputs["weight"], torch.ones(0, IN), torch.ones(OUT, 0), 1.0, inputs["bias"])
    grads = gradients(partial(call, backend=backend, dropout_p=0.5, training=True), inputs, torch.ones(6, 2, OUT))
    torch.testing.assert_close(grads["y"], base)
    assert set(grads) == {"y", "x", "weight", "bias"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, seed: int) -> None:
    randn = partial(torch.randn, dtype=dtype)
    grad_y, x = (LAYOUTS[layout](randn, features) for features in (OUT, IN))
    indices = torch.randint(-1, 4, x.shape[:-1])
    assert_near_float64(call, reference, make(x, indices), grad_y)


def test_strided_adapters(isa: str, seed: int) -> None:
    inputs = make(torch.randn(6, 2, IN))
    inputs["lora_a0"], inputs["lora_b1"] = torch.randn(IN, 3).t(), torch.randn(OUT, 9)[:, 4:5]
    inputs["lora_a3"] = torch.randn(16, 1).expand(16, IN)
    check(inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "bfloat16"])
def test_one_adapter_for_all_is_lora_linear(
    isa: str, kind: str, dtype: torch.dtype, dropout_p: float, seed: int
) -> None:
    """To the last bit, y and every gradient."""
    for rows in (1, 5, 300):
        inputs = make(torch.randn(rows, 130).to(dtype), torch.tensor(1), kind, 65, (3, 16), bias_dtype=dtype)
        own = {name: inputs[name] for name in ("x", "weight", "bias")}
        if kind == "nf4":
            del own["weight"]
        own = {name: inputs[name] for name in (*own, "lora_a1", "lora_b1", "scaling1")}

        def single(lora_a1: Tensor, lora_b1: Tensor, scaling1: Tensor, bias: Tensor, x: Tensor, weight: Any) -> Tensor:
            return lora_linear(x, weight, lora_a1, lora_b1, scaling1, bias, dropout_p, True)

        results = []
        for function in (partial(call, dropout_p=dropout_p, training=True), single):
            torch.manual_seed(seed)
            rest = inputs if function is not single else {"weight": inputs["weight"]}
            results.append(gradients(function, {**rest, **own}, torch.ones(rows, 65, dtype=dtype), own))
        assert_same_bits(*results)


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(isa: str, dtype: torch.dtype, p: float, seed: int) -> None:
    """The mask lies on x, not on the sorted rows, forward and in every gradient."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed + 1)
        return call(**inputs, dropout_p=p, training=True)

    torch.manual_seed(seed + 1)
    mask_seed = draw_seed()
    for kind, tokens, columns in (("nf4", 1, 130), ("bfloat16", 3, IN), ("nf4", 60, 96)):
        x = torch.randn(6, tokens, columns).to(dtype)
        check(make(x, kind=kind, out_features=65, bias_dtype=dtype), dropping, dropout_p=p, seed=mask_seed)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"training": True}])
def test_no_dropout_draws_no_number(isa: str, options: dict[str, Any], seed: int) -> None:
    inputs = make(torch.randn(6, IN))
    state = torch.get_rng_state()
    assert torch.equal(call(**inputs, **options), call(**inputs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa: str, dtype: torch.dtype, set_threads: Any, seed: int) -> None:
    """Also where tiles are cut between rows, within those of an adapter."""

    def dropping(**inputs: Any) -> Tensor:
        torch.manual_seed(seed)
        return call(**inputs, dropout_p=0.1, training=True)

    for out, tokens in ((513, 1), (40, 13), (64, 70)):
        inputs = make(torch.randn(6, tokens, 320).to(dtype), SOME, "nf4", out)
        grad_y = torch.randn(6, tokens, out).to(dtype)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(gradients(dropping, inputs, grad_y))
        for result in results[1:]:
            assert_same_bits(result, results[0])


NEEDS = [("x",), ("lora_a1",), ("lora_b3",), ("lora_a2",), ("scaling0",), ("weight",), ("bias",), ("x", "lora_b0"), ()]


@pytest.mark.parametrize("needs", NEEDS)
def test_only_what_is_asked_for_gets_a_gradient(isa: str, needs: tuple[str, ...], seed: int) -> None:
    """And the same as when all is asked for."""
    inputs = make(torch.randn(6, 2, IN), kind="float32", bias_dtype=torch.float32)
    expected = gradients(call, inputs, torch.ones(6, 2, OUT))
    leaves = {name: value.clone().requires_grad_(name in needs) for name, value in float_tensors(inputs).items()}
    y = call(**{**inputs, **leaves})
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
    for name in needs:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=0)


def test_saves_x_and_h(seed: int) -> None:
    inputs = make(torch.randn(6, 10, 320).bfloat16(), out_features=64)
    inputs |= {f"scaling{i}": 0.5 for i in range(4)}
    own = {value.data_ptr() for name, value in float_tensors(inputs).items() if name != "x"}
    own |= {part.data_ptr() for part in inputs["weight"].tensors}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(0 if tensor.data_ptr() in own else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(**{**inputs, "x": inputs["x"].requires_grad_()})
    assert sum(sizes) == 60 * 320 * 2 + 60 * 16 * 4 + 6 * 8


@pytest.mark.parametrize("kind", ["nf4", "flat nf4", "float32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(kind: str, dropout_p: float, seed: int) -> None:
    inputs = make(torch.randn(6, 2, IN), kind=kind, bias_dtype=torch.float32 if dropout_p else None)
    for value in float_tensors(inputs).values():
        value.requires_grad_()
    w, wf = native_weight(inputs["weight"])
    values = of_adapters(inputs)
    adapters = [values["lora_as"], values["lora_bs"], [0.5] * 4]
    dropout = (dropout_p, draw_seed() if dropout_p else None)
    x, indices = inputs["x"], inputs["indices"]
    torch.library.opcheck(ops.multi_lora_linear, (x, w, wf, *adapters, indices, inputs["bias"], *dropout))
    as_, bs = ([value.detach() for value in each] for each in adapters[:2])
    base = [part.detach() for part in w], wf
    for needs in ((True, [1] * 4, [1] * 4), (False, [0, 1, 1, 0], [0] * 4), (False, [0] * 4, [0, 0, 0, 1])):
        grad_y, h = torch.randn(6, 2, OUT), torch.randn(12, 16)
        arguments = (grad_y, x.detach(), h, *base, as_, bs, adapters[2], indices, *dropout, *needs)
        torch.library.opcheck(ops.multi_lora_linear_backward, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_without_graph_breaks(dropout_p: float, seed: int) -> None:
    """One graph for any batch, whatever adapters it has."""
    inputs = make(torch.randn(6, 2, IN), bias_dtype=torch.float32)
    weight = inputs.pop("weight")

    def function(**values: Any) -> Tensor:
        return call(**values, weight=weight, dropout_p=dropout_p, training=True)

    compiled, graphs = compile_counting(function)
    for samples, tokens in ((50, 21), (51, 22), (60, 25)):
        inputs["x"], grad_y = torch.randn(samples, tokens, IN), torch.randn(samples, tokens, OUT)
        inputs["indices"] = torch.randint(-1, 4, (samples,))
        results = []
        for each in (compiled, function):
            torch.manual_seed(seed)
            results.append(gradients(each, inputs, grad_y))
        assert_same_bits(*results)
    assert graph_count(graphs) == 1


def test_autocast(isa: str, seed: int) -> None:
    """x and bias are cast; adapters and their gradients stay fp32."""
    inputs = make(torch.randn(6, 2, IN), bias_dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in float_tensors(inputs).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = call(**inputs)
    halved = {**inputs, "x": inputs["x"].bfloat16(), "bias": inputs["bias"].bfloat16()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, call(**halved))
    y.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["x", "lora_a1", "lora_b0"])
def test_double_backward(name: str, seed: int) -> None:
    inputs = make(torch.randn(6, 2, IN))
    leaf = inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match="multi_lora_linear: double backward is not implemented"):
        (grad,) = torch.autograd.grad(call(**inputs).square().sum(), leaf, create_graph=True)
        grad.sum().backward()


def test_meta_tensors(seed: int) -> None:
    values = of_adapters(
        {name: value.to("meta") for name, value in make(torch.randn(6, IN)).items() if value is not None}
    )
    y = multi_lora_linear(**values, dropout_p=0.5, training=True)
    assert y.device.type == "meta" and y.shape == (6, OUT)
