"""What else `accelerate` runs on an op: GPT-2's Conv1D, several adapters with dropout; what is too small for one."""

import pytest
import torch
from test_peft_accelerate import CONFIGS, METHOD, adapted, assert_all_fast, assert_near, dense, ia3, lora, rows, step
from torch import nn

import peftkern
from peftkern.integrations import _peft_small
from peftkern.integrations.peft import calls

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

LEAST = dict(_peft_small.LEAST)  # before the fixture that empties it


def conv1d(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(Conv1D(128, 64), nn.Tanh(), Conv1D(64, 128)).to(dtype)


def conv1d_config(method: str) -> object:
    config = CONFIGS[method]()
    config.fan_in_fan_out = True
    return config


# Conv1D, whose weight is [in, out]


@METHOD
def test_conv1d_is_peft_s(method, seed):
    model = adapted(conv1d(), conv1d_config(method))
    expected = step(model, rows())
    peftkern.accelerate(model)
    # fp32 sums of at most 128 products, in another order.
    assert_near(step(model, rows()), expected, 5e-6)
    assert_all_fast(model)
    merged = model.merge_and_unload()
    assert type(merged[0]) is Conv1D
    torch.testing.assert_close(merged(rows()), expected["y"], rtol=1e-4, atol=1e-4)


@METHOD
def test_conv1d_in_bf16(method, seed):
    model = adapted(conv1d(torch.bfloat16), conv1d_config(method))
    expected = step(model, rows(torch.bfloat16))
    assert_near(step(peftkern.accelerate(model), rows(torch.bfloat16)), expected, 2**-6)  # bf16 on both sides
    assert_all_fast(model)


def test_conv1d_s_weight_gets_its_gradient(seed):
    model = adapted(conv1d(), conv1d_config("lora"))
    for at in (0, 2):
        model.base_model.model[at].base_layer.weight.requires_grad_()
    expected = step(model, rows())
    assert expected["base_model.model.0.base_layer.weight"].shape == (64, 128)
    assert_near(step(peftkern.accelerate(model), rows()), expected, 5e-6)
    assert_all_fast(model)


def test_conv1d_s_weight_is_not_copied(seed):
    model = peftkern.accelerate(adapted(conv1d(), conv1d_config("lora")))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        model(rows()).sum().backward()
    events = profile.key_averages(group_by_input_shape=True)
    assert "peftkern::lora_linear_backward" in {event.key for event in events}
    weights = [[64, 128], [128, 64]]
    copied = {event.key for event in events if event.input_shapes and event.input_shapes[0] in weights}
    assert not copied & {"aten::clone", "aten::copy_", "aten::contiguous"}


def test_dora_that_reads_the_weight_the_other_way_is_peft_s(seed):
    model = adapted(conv1d(), conv1d_config("dora"))
    model.base_model.model[0].lora_magnitude_vector["default"].fan_in_fan_out = False
    peftkern.accelerate(model)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        model(rows())
    assert "DoRA with fan_in_fan_out=False on Conv1D" in next(iter(calls(model).values())).stock


def test_gpt2_is_accelerated(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config).eval(),
        peft.LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=False),
    )
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    torch.testing.assert_close(peftkern.accelerate(model)(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls(model)) == 8 and all(c == (1, {}) for c in calls(model).values())


# Several adapters, some of which drop


def several(*dropouts: float, **options: object) -> nn.Module:
    model = adapted(dense(), *(lora(lora_dropout=p, lora_alpha=3 + i, **options) for i, p in enumerate(dropouts)))
    model.base_model.set_adapter(["default", *map(str, range(1, len(dropouts)))])
    return model


@pytest.mark.parametrize("dropouts", [(0.5, 0.5), (0.0, 0.5, 0.0), (0.5, 0.0)])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_several_adapters_with_dropout(dropouts, p, seed):
    """With everything or nothing dropped the masks cannot differ."""
    model = several(*dropouts, lora_bias=True)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = p
    expected = step(model, rows())
    ours = step(peftkern.accelerate(model), rows())
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    assert_all_fast(model)


def test_each_of_several_adapters_has_a_mask_of_its_own(seed):
    model = peftkern.accelerate(several(0.5, 0.5))
    layer, x = model.base_model.model[0], torch.ones(1, 64)
    alone = {}
    for name in ("default", "1"):
        layer.set_adapter([name])
        layer.eval()
        alone[name] = layer(x) - layer.base_layer(x)
        layer.train()
    layer.set_adapter(["default", "1"])
    deltas = torch.stack([layer(x)[0] - layer.base_layer(x)[0] for _ in range(2000)])
    # 2000 draws, whose spread is about that of one draw: 1 / sqrt(2000) of it, five times.
    assert ((deltas.mean(0) - sum(alone.values())[0]).abs() < 5 * deltas.std(0) / 2000**0.5).all()
    seen = []
    for name in ("default", "1"):
        layer.lora_B[name].weight.data.zero_()
        torch.manual_seed(0)
        seen.append(layer(x) - layer.base_layer(x))
    assert seen[0].norm() > 0.1 and seen[1].norm() < 1e-4


# torch.compile


def disabled() -> nn.Module:
    model = adapted(dense(), lora())
    model.base_model.disable_adapter_layers()
    return model


def merged() -> nn.Module:
    model = adapted(dense(), lora())
    model.merge_adapter()
    return model


def hooked() -> nn.Module:
    model = adapted(dense(), lora())
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    return model


COMPILED = {
    **{method: lambda make=make: adapted(dense(), make()) for method, make in CONFIGS.items()},
    **{f"{method} on Conv1D": lambda method=method: adapted(conv1d(), conv1d_config(method)) for method in CONFIGS},
    "dropout": lambda: adapted(dense(), lora(lora_dropout=0.5)),
    "several with dropout": lambda: several(0.5, 0.0),
    "disabled": disabled,
    "merged": merged,
    "with hooks": hooked,
}


@pytest.mark.parametrize("case", COMPILED)
def test_no_more_graph_breaks_than_peft_s(case, seed):
    model = COMPILED[case]()
    counts = []
    for change in (peftkern.restore, peftkern.accelerate):
        torch._dynamo.reset()
        counts.append(torch._dynamo.explain(change(model))(rows()).graph_break_count)
    assert counts[1] <= counts[0]
    assert counts[1] == 0


# Layers that are too small


@pytest.fixture
def with_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peft_small, "LEAST", LEAST)


def ran(layer: nn.Module) -> list[str]:
    """What a layer met since the last look: "fast" or reasons."""
    counts = layer.__dict__.pop("_peftkern_calls", {})
    return list(counts)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_small_products_are_peft_s(method, seed, with_limits):
    model = adapted(dense(), CONFIGS[method]())
    expected = step(model, rows())
    record = peftkern.explain(peftkern.accelerate(model))[0]
    torch.testing.assert_close(step(model, rows()), expected, rtol=0, atol=0)
    layer = model.base_model.model[0]
    assert ran(layer) == [_peft_small.TOO_SMALL]
    products = LEAST[record.op, torch.float32].products
    least = products // (64 * 128)
    assert f"PEFT's own below {least} rows" in record.reason and record.implementation == "cpu"
    for count, met in ((least - 1, _peft_small.TOO_SMALL), (least, "fast")):
        layer(torch.randn(count, 64))
        assert ran(layer) == [met]


def test_dropout_and_few_rows_have_limits_of_their_own(seed, with_limits):
    model = peftkern.accelerate(adapted(dense(), lora(lora_dropout=0.5)))
    layer, x = model.base_model.model[0], torch.randn(32, 64)
    layer(x)
    assert ran(layer) == ["fast"]
    layer.eval()(x)
    assert ran(layer) == [_peft_small.TOO_SMALL]
    wide = peft.get_peft_model(nn.Sequential(nn.Linear(2048, 2048)), peft.LoraConfig(target_modules=["0"]))
    layer = peftkern.accelerate(wide).base_model.model[0]
    for count, met in ((7, _peft_small.TOO_SMALL), (8, "fast")):
        layer(torch.randn(count, 2048))
        assert ran(layer) == [met]


@pytest.mark.parametrize("case", ["dora", "4-bit", "autocast", "float16", "compiled"])
def test_nothing_is_too_small_for_the_rest(case, seed, with_limits):
    base = {"4-bit": lambda: nn.Sequential(peftkern.nn.NF4Linear.from_linear(nn.Linear(64, 128)), *dense()[1:])}
    model = adapted(base.get(case, dense)(), lora(use_dora=case == "dora"))
    layer, x = peftkern.accelerate(model).base_model.model[0], rows()
    if case == "float16":
        layer.base_layer.half()
        x = x.half()
    if case == "compiled":
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
            graphs.append(graph)
            return graph.forward

        torch.compile(layer, backend=keep, fullgraph=True)(x)
        assert any("lora_linear" in str(node.target) for graph in graphs for node in graph.graph.nodes)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        layer(x)
    assert ran(layer) == ["fast"]


def test_small_layers_with_ia3_twice(seed, with_limits):
    model = adapted(dense(), ia3(), ia3())
    model.base_model.set_adapter(["default", "1"])
    expected = model(rows())
    torch.testing.assert_close(peftkern.accelerate(model)(rows()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_unknown_backend_is_refused_whatever_the_size(method, monkeypatch, seed, with_limits):
    layer = peftkern.accelerate(adapted(dense(), CONFIGS[method]())).base_model.model[0]
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpuu")
    for count in (2, 1 << 14):
        with pytest.raises(ValueError, match=rf"{method}_linear: backend must be one of .*, got 'cpuu'"):
            layer(torch.randn(count, 64))
