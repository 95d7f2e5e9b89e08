"""quantize and add_lora on whole models: what is swapped, what is kept, what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.model import lora_layers
from peftkern.nn import LoRALinear, NF4Linear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """An embedding, two blocks, an output head, and optionally a head tied to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.tied = nn.Linear(16, 10, bias=False)
        if tied:
            self.tied.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x) + self.tied(x)


IDS = torch.arange(10).view(2, 5)
LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")]


def types(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def assert_unchanged(model: nn.Module, before: nn.Module) -> None:
    """Modules, values and requires_grad are as in the copy made before."""
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    for (name, ours), (_, theirs) in zip(model.named_parameters(), before.named_parameters()):
        assert ours.requires_grad == theirs.requires_grad, name
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name


# quantize


def test_quantize_swaps_the_linears_and_keeps_the_head(seed):
    model = Model(tied=True).bfloat16().eval()
    biases = [layer.up.bias for layer in model.layers]
    weight = model.layers[0].up.weight.detach().clone()
    assert peftkern.quantize(model, block_size=32, double_quant=False) is model
    assert types(model, NF4Linear) == LINEARS
    assert types(model, nn.Linear) == ["lm_head", "tied"] and model.tied.weight is model.embed.weight
    layer = model.layers[0].up
    assert not layer.training and layer.weight_dtype == torch.bfloat16
    assert layer.block_size == 32 and not layer.double_quant
    assert all(block.up.bias is bias for block, bias in zip(model.layers, biases))
    assert (layer.dequantize().float() - weight.float()).norm() / weight.float().norm() < 0.15
    assert model(IDS).dtype == torch.bfloat16


def test_quantize_swaps_an_untied_linear_that_is_not_called_lm_head(seed):
    assert types(peftkern.quantize(Model()), NF4Linear) == [*LINEARS, "tied"]


def test_quantize_keeps_hooks(seed):
    model = Model()
    seen = []
    handle = model.layers[1].up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    peftkern.quantize(model)(IDS)
    assert seen == [NF4Linear]
    handle.remove()
    model(IDS)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "skip, kept",
    [
        ("down", ["layers.0.down", "layers.1.down"]),
        (["layers.0"], LINEARS[:2]),
        (["1.up", "tied"], ["layers.1.up", "tied"]),
        (["lm_head"], []),
    ],
)
def test_quantize_skips(skip, kept, seed):
    model = peftkern.quantize(Model(), skip)
    assert types(model, NF4Linear) == [name for name in [*LINEARS, "tied"] if name not in kept]


def test_quantize_leaves_subclasses(seed):
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Special(8, 8), "c": nn.MultiheadAttention(8, 2)})
    assert types(peftkern.quantize(model), NF4Linear) == ["a"]


def test_quantize_a_layer_held_twice_once(seed):
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, nn.ReLU(), nn.Sequential(linear))
    peftkern.quantize(model)
    assert type(model[0]) is NF4Linear and model[2][0] is model[0]


def test_quantize_on_meta():
    with torch.device("meta"):
        model = Model()
    peftkern.quantize(model)
    assert types(model, NF4Linear) == [*LINEARS, "tied"] and all(p.is_meta for p in model.parameters())


def test_the_output_embeddings_of_transformers_stay(seed):
    model = Model()
    model.get_output_embeddings = lambda: model.tied
    assert types(peftkern.quantize(model), NF4Linear) == LINEARS
    assert list(lora_layers(peftkern.add_lora(model))) == LINEARS


def nan_weight() -> nn.Module:
    model = Model()
    nn.init.constant_(model.tied.weight, float("nan"))
    return model


def int_weight() -> nn.Module:
    model = Model()
    model.tied.weight = nn.Parameter(torch.zeros(10, 16, dtype=torch.int32), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (Model, {"skip": "nothing"}, ValueError, "skip='nothing' matches no nn.Linear"),
        (Model, {"skip": ["up", "laye"]}, ValueError, "skip='laye'"),
        (Model, {"skip": ["layers", "tied"]}, ValueError, "Model has no nn.Linear to swap"),
        (Model, {"block_size": 48}, ValueError, "block_size must be one of .* got 48"),
        (nan_weight, {}, ValueError, '"tied.weight" must be finite'),
        (int_weight, {}, TypeError, '"tied.weight" must be .* got torch.int32'),
        (lambda: nn.Linear(4, 4), {}, ValueError, "Linear has no nn.Linear to swap"),
        (lambda: nn.ReLU(), {}, ValueError, "ReLU has no nn.Linear to swap"),
        (lambda: peftkern.add_lora(Model()), {}, ValueError, '"layers.0.up" has adapters already'),
    ],
)
def test_quantize_refuses_before_it_swaps(make, options, error, message, seed):
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        peftkern.quantize(model, **options)
    assert_unchanged(model, before)


# add_lora


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_add_lora_wraps_all_but_the_head(quantized, seed):
    model = Model(tied=True)
    if quantized:
        peftkern.quantize(model)
    expected = model(IDS)
    assert peftkern.add_lora(model, rank=4, alpha=12, dropout=0.1, use_rslora=True) is model
    assert list(lora_layers(model)) == LINEARS
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{factor}.default.weight" for name in LINEARS for factor in "AB"}
    layer = model.layers[1].up
    assert layer.scaling["default"] == 6.0 and layer.settings["default"].dropout == 0.1
    assert isinstance(layer.base_layer, NF4Linear) is quantized
    torch.testing.assert_close(model(IDS), expected)
    model(IDS).sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "targets, adapted",
    [
        (["up"], ["layers.0.up", "layers.1.up"]),
        (("0.up", "lm_head"), ["layers.0.up", "lm_head"]),
        (r"layers\.1\..*", LINEARS[2:]),
        ({"layers.1.down"}, ["layers.1.down"]),
    ],
)
def test_add_lora_targets(targets, adapted, seed):
    assert list(lora_layers(peftkern.add_lora(Model(), target_modules=targets))) == adapted


def test_add_lora_keeps_training_flag_hooks_and_sharing(seed):
    linear = nn.Linear(8, 8).eval()
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(module))
    model = nn.Sequential(linear, linear)
    peftkern.add_lora(model)
    assert model[0] is model[1] and not model[0].training
    model(torch.zeros(1, 8))
    assert seen == [model[0], model[0]]


def test_a_second_adapter(seed):
    model = peftkern.add_lora(Model(), rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.factors("default")[1])
    one = model(IDS)
    peftkern.add_lora(model, rank=3, target_modules=["up"], adapter_name="two")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"two"}
    active = {name: layer.active_adapter for name, layer in lora_layers(model).items()}
    assert active == {name: "two" if name.endswith("up") else None for name in [*LINEARS, "tied"]}
    assert not torch.equal(model(IDS), one)
    for layer in lora_layers(model).values():
        layer.set_adapter("default")
    assert torch.equal(model(IDS), one)


@pytest.mark.parametrize("change", [peftkern.quantize, peftkern.add_lora], ids=["quantize", "add_lora"])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_transformer_encoders_use_the_new_layers(change, padded, seed):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = change(nn.TransformerEncoder(layer, 2))
    for lora in lora_layers(model).values():
        nn.init.normal_(lora.factors("default")[1])
    x = torch.randn(2, 4, 16)
    mask = torch.tensor([[False, False, False, False], [False, False, True, True]]) if padded else None
    expected = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast, expected)


@pytest.mark.parametrize(
    "make, options, error, message",
    [
        (Model, {"target_modules": ["up", "q_proj"]}, ValueError, "target_modules 'q_proj' matches no module"),
        (Model, {"target_modules": "up"}, ValueError, "target_modules 'up' matches no module"),
        (Model, {"target_modules": []}, ValueError, "target_modules is empty"),
        (Model, {"target_modules": ["up", "embed"]}, TypeError, '"embed": .* got Embedding'),
        (Model, {"target_modules": ["layers"]}, TypeError, '"layers": .* got ModuleList'),
        (Model, {"rank": 0}, ValueError, "rank must be positive"),
        (Model, {"adapter_name": "a.b"}, ValueError, "adapter_name"),
        (Model, {"dtype": torch.uint8}, TypeError, "dtype must be one of"),
        (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, "Sequential has no linear layer"),
        (lambda: nn.Linear(4, 4), {}, ValueError, "Linear has no linear layer"),
        (lambda: peftkern.add_lora(Model()), {}, ValueError, "\"layers.0.up\" has an adapter 'default' already"),
    ],
)
def test_add_lora_refuses_before_it_wraps(make, options, error, message, seed):
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        peftkern.add_lora(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("change", [peftkern.quantize, peftkern.add_lora], ids=["quantize", "add_lora"])
def test_models_wrapped_by_peft_are_refused(change, seed):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=r'adapters of another library, ".*up.base_layer"'):
        change(model)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        change(3)


def test_quantized_model_learns(seed):
    model = peftkern.add_lora(peftkern.quantize(Model()), rank=4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten().roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(isinstance(layer, LoRALinear) for layer in lora_layers(model).values())
