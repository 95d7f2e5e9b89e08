"""LoRAAttention, LoRAMLP and fuse_blocks: transformers' models compute the same, keep their names, and can go back."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.nn import DoRALinear, LoRAAttention, LoRALinear, LoRAMLP, NF4Linear
from peftkern.nn._fused_block import FusedBlock

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GATED = ("Llama", "Mistral", "Qwen2", "Gemma")


def make(name: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A small random model; Bert is the decoder-only encoder, the others are causal LMs."""
    if name == "Bert":
        config = transformers.BertConfig(**SIZES, num_attention_heads=4, attention_probs_dropout_prob=0.0, **options)
        config.hidden_dropout_prob = 0.0
        model = transformers.BertForMaskedLM._from_config(config, attn_implementation=attention)
    else:
        extra = {"head_dim": 8} if name == "Gemma" else {}
        config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **extra, **options)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=attention)
    return model.eval()


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """With adapters that do something."""
    peftkern.add_lora(model, rank=4, **options)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.factors("default")[1], std=0.3)
    return model


def batch() -> dict[str, Tensor]:
    """Two sequences, one of them padded."""
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def results(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of the tokens that count, and every gradient."""
    model.zero_grad()
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    logits.float().square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert set(actual) == set(expected) and len(actual) > 1
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm()
        assert error <= tolerance * value.double().norm() + 1e-12, name


class Calls:
    """Counts the calls of the two ops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"lora_qkv": 0, "lora_mlp": 0}
        for module, name in (("attention", "lora_qkv"), ("mlp", "lora_mlp")):
            path = f"peftkern.nn.{module}.{name}"
            monkeypatch.setattr(path, self.counting(name, getattr(peftkern, name)))

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return function(*args, **kwargs)

        return call

    def take(self) -> tuple[int, int]:
        """The counts since the last time."""
        counts = self.counts["lora_qkv"], self.counts["lora_mlp"]
        self.counts.update(lora_qkv=0, lora_mlp=0)
        return counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*GATED, "Bert"])
@pytest.mark.parametrize("quantized", [False, True])
def test_same_logits_and_gradients(name: str, attention: str, quantized: bool, calls: Calls, seed: int) -> None:
    """Also with Qwen2's biases, Gemma's gelu, grouped queries, a padded batch and fp32 adapters on 4 bits."""
    model = make(name, attention)
    if quantized:
        peftkern.quantize(model)
    adapted(model)
    inputs = batch()
    expected = results(model, inputs)
    assert calls.take() == (0, 0)
    assert peftkern.fuse_blocks(model) is model
    assert_near(results(model, inputs), expected)
    assert calls.take() == (2, 0 if name == "Bert" else 2)
    peftkern.unfuse_blocks(model)
    again = results(model, inputs)
    assert calls.take() == (0, 0) and all(torch.equal(again[n], value) for n, value in expected.items())


def test_bf16(seed: int) -> None:
    model = adapted(make("Llama").bfloat16())
    inputs = batch()
    expected = results(model, inputs)
    assert_near(results(peftkern.fuse_blocks(model), inputs), expected, 4e-2)


def test_dropout_masks_are_those_of_the_layers(calls: Calls, seed: int) -> None:
    model, inputs = adapted(make("Llama"), dropout=0.3).train(), batch()
    torch.manual_seed(7)
    expected = results(model, inputs)
    peftkern.fuse_blocks(model)
    torch.manual_seed(7)
    assert_near(results(model, inputs), expected)
    assert calls.take() == (2, 2)
    model.eval()
    assert not torch.allclose(results(model, inputs)["logits"], expected["logits"], rtol=1e-3)


@pytest.mark.parametrize("name", [*GATED])
def test_generation_with_a_cache(name: str, calls: Calls, seed: int) -> None:
    model = adapted(make(name))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = batch()
    expected = model.generate(**inputs, **options)
    assert torch.equal(peftkern.fuse_blocks(model).generate(**inputs, **options), expected)
    assert calls.take() == (12, 12)


def test_attention_maps_and_checkpointing(seed: int) -> None:
    """transformers finds the blocks by their class, and recomputes them in backward."""
    model, inputs = adapted(make("Llama", "eager")), batch()
    maps = model(**inputs, output_attentions=True).attentions
    expected = results(model, inputs)
    peftkern.fuse_blocks(model)
    for ours, theirs in zip(model(**inputs, output_attentions=True).attentions, maps, strict=True):
        torch.testing.assert_close(ours, theirs)
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ours = results(model, inputs)
    assert_near({name: ours[name] for name in expected}, expected)


def test_the_blocks_stay_what_they_are(tmp_path: Any, seed: int) -> None:
    """Same objects, classes, names and files."""
    model = adapted(make("Llama"))
    block, cls, names = model.model.layers[0].self_attn, type(model.model.layers[0].self_attn), list(model.state_dict())
    peftkern.save_adapter(model, tmp_path / "before")
    peftkern.fuse_blocks(model)
    assert model.model.layers[0].self_attn is block and isinstance(block, cls) and isinstance(block, LoRAAttention)
    assert isinstance(model.model.layers[0].mlp, LoRAMLP) and type(block).__name__ == "LoRALlamaAttention"
    assert list(model.state_dict()) == names
    peftkern.save_adapter(model, tmp_path / "after")
    before, after = ((tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("before", "after"))
    assert before == after
    peftkern.load_adapter(model, tmp_path / "after", adapter_name="second")
    assert block.q_proj.active_adapter == "second"
    peftkern.unfuse_blocks(model)
    assert type(block) is cls and "projections" not in vars(block)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module], calls: Calls, seed: int) -> None:
    model, inputs = peftkern.fuse_blocks(adapted(make("Llama"))), batch()
    expected = model(**inputs).logits
    calls.take()
    other = copied(model)
    assert torch.equal(other(**inputs).logits, expected) and calls.take() == (2, 2)
    assert peftkern.unfuse_blocks(other) is other and isinstance(model.model.layers[0].mlp, LoRAMLP)


def test_some_adapters(calls: Calls, seed: int) -> None:
    """Projections without one run in the same op; blocks without any as before, bit for bit."""
    model, inputs = adapted(make("Qwen2"), target_modules=["q_proj", "v_proj"]), batch()
    expected = results(model, inputs)
    assert_near(results(peftkern.fuse_blocks(model), inputs), expected)
    assert calls.take() == (2, 0)


def test_switching_merging_disabling(calls: Calls, seed: int) -> None:
    model, inputs = adapted(make("Llama")), batch()
    peftkern.add_lora(model, rank=2, adapter_name="second", target_modules=["q_proj", "down_proj"])
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    fused = peftkern.fuse_blocks(copy.deepcopy(model))
    others = [module for module in fused.modules() if isinstance(module, LoRALinear)]

    def logits_agree() -> bool:
        return torch.equal(model(**inputs).logits, fused(**inputs).logits)

    def each(act: Callable[[LoRALinear], Any]) -> tuple[int, int]:
        for layer in (*layers, *others):
            act(layer)
        with torch.no_grad():
            torch.testing.assert_close(fused(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        return calls.take()

    assert each(lambda layer: None) == (2, 2)
    assert each(lambda layer: layer.set_adapter("default")) == (2, 2)
    assert each(lambda layer: layer.disable_adapters()) == (0, 0) and logits_agree()
    assert each(lambda layer: layer.enable_adapters()) == (2, 2)
    assert each(lambda layer: layer.merge()) == (0, 0) and logits_agree()
    assert each(lambda layer: layer.unmerge()) == (2, 2)
    assert each(lambda layer: layer.set_adapter(None)) == (0, 0) and logits_agree()


def hook_a_layer(model: nn.Module) -> Any:
    return model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, y: 2 * y)


def replace_forward(model: nn.Module) -> Any:
    layer = model.model.layers[0].self_attn.v_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


def other_dropout(model: nn.Module) -> Any:
    layer = model.model.layers[0].self_attn.q_proj
    layer.add_adapter("own", dropout=0.5)
    layer.set_adapter("own")
    layer.train()


def subclass_a_layer(model: nn.Module) -> Any:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.model.layers[0].self_attn.q_proj = Doubling(32, 32)


def use_another_method(model: nn.Module) -> Any:
    model.model.layers[0].self_attn.q_proj = DoRALinear(nn.Linear(32, 32))


CHANGES = [hook_a_layer, replace_forward, other_dropout, subclass_a_layer, use_another_method]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_run_themselves(change: Callable[[nn.Module], Any], calls: Calls, seed: int) -> None:
    """Their block's forward calls each projection; the other blocks stay fused."""
    model, inputs = adapted(make("Llama")), batch()
    handle = change(model)
    torch.manual_seed(3)
    expected = results(model, inputs)
    peftkern.fuse_blocks(model)
    assert {r.op for r in peftkern.explain(model) if "layers.0.self_attn" in r.name}.isdisjoint({"lora_qkv"})
    torch.manual_seed(3)
    assert_near(results(model, inputs), expected)
    assert calls.take() == (1, 2)
    if handle is not None:
        handle.remove()
        results(model, inputs)
        assert calls.take() == (2, 2)


def test_hooks_of_the_block_run(seed: int) -> None:
    model, inputs, seen = peftkern.fuse_blocks(adapted(make("Llama"))), batch(), []
    for block in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
        block.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    model(**inputs)
    assert seen == ["LoRALlamaAttention", "LoRALlamaMLP"]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_a_block_of_ones_own(act: nn.Module, calls: Calls, seed: int) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 16), nn.Linear(16, 8), NF4Linear(8, 16, dtype=torch.float32)
            self.act_fn = act

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(self.act_fn(self.w1(x)) * self.w3(x))

    block, x = adapted(Mlp()), torch.randn(3, 8)
    expected = block(x)
    assert LoRAMLP.from_block(block, ("w1", "w3", "w2")) is block
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    assert calls.take() == (0, 0 if isinstance(act, nn.ReLU) else 1)
    block.undo()
    assert torch.equal(block(x), expected)


def test_compile_without_graph_breaks(seed: int) -> None:
    model = peftkern.fuse_blocks(adapted(make("Llama")))
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(9)[None])

    def run(hidden: Tensor) -> Tensor:
        layer = model.model.layers[0]
        return layer.mlp(layer.self_attn(hidden, position_embeddings=rotary, attention_mask=None)[0])

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(f(hidden).sum(), hidden) for f in (compiled, run))
    torch.testing.assert_close(ours, theirs)


def test_explain_names_the_fused_op(seed: int) -> None:
    model = peftkern.fuse_blocks(adapted(make("Llama")))
    said = {record.name: record for record in peftkern.explain(model)}
    assert said["model.layers.0.self_attn.q_proj"].op == "lora_qkv"
    assert said["model.layers.0.self_attn.o_proj"].op == "lora_linear"
    assert said["model.layers.1.mlp.down_proj"].op == "lora_mlp"
    assert {record.implementation for record in said.values()} == {"cpu"}
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    said = {record.name: record for record in peftkern.explain(model)}
    assert said["model.layers.1.mlp.down_proj"].op == "lora_linear"
    assert "lora" in str(peftkern.report(model)).lower()


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"fuse_blocks: model must be an nn\.Module, got int"):
        peftkern.fuse_blocks(1)
    with pytest.raises(ValueError, match="fuse_blocks: Linear has no block to fuse; these are: LlamaAttention"):
        peftkern.fuse_blocks(nn.Linear(2, 2))
    block = peftkern.fuse_blocks(make("Llama")).model.layers[0].self_attn
    with pytest.raises(TypeError, match=r"LoRAAttention\.from_block: block is a LoRALlamaAttention already"):
        LoRAAttention.from_block(block)
    with pytest.raises(TypeError, match=r"LoRAMLP\.from_block: block.gate_proj must be a module, got NoneType"):
        LoRAMLP.from_block(nn.Linear(2, 2))
