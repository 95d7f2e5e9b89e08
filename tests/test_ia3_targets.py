"""Where (IA)^3 goes by default: keys, values and the feed-forward block's inner activations of each architecture."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.methods.ia3 import DEFAULT_TARGETS
from peftkern.nn import IA3Linear

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = {**SIZES, "num_key_value_heads": 2}
T5 = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", GQA),
    "mistral": ("MistralConfig", "AutoModelForCausalLM", GQA),
    "qwen2": ("Qwen2Config", "AutoModelForCausalLM", GQA),
    "qwen3": ("Qwen3Config", "AutoModelForCausalLM", {**GQA, "head_dim": 8}),
    "gemma": ("GemmaConfig", "AutoModelForCausalLM", {**GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "AutoModelForCausalLM", {**GQA, "head_dim": 8}),
    "gemma3_text": ("Gemma3TextConfig", "AutoModelForCausalLM", {**GQA, "head_dim": 8}),
    "phi": ("PhiConfig", "AutoModelForCausalLM", SIZES),
    "opt": (
        "OPTConfig",
        "AutoModelForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "gptj": (
        "GPTJConfig",
        "AutoModelForCausalLM",
        {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "AutoModelForCausalLM",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global"], 2]],
            "max_position_embeddings": 64,
        },
    ),
    "bert": ("BertConfig", "AutoModelForMaskedLM", SIZES),
    "roberta": ("RobertaConfig", "AutoModelForMaskedLM", SIZES),
    "electra": ("ElectraConfig", "AutoModelForMaskedLM", {**SIZES, "embedding_size": 32}),
    "t5": ("T5Config", "AutoModelForSeq2SeqLM", T5),
    "mt5": ("MT5Config", "AutoModelForSeq2SeqLM", {**T5, "feed_forward_proj": "gated-gelu"}),
}
# Whole paths below the layer's number: (keys and values, second layer of the feed-forward block).
_LLAMA = (r"self_attn\.(k|v)_proj", r"mlp\.down_proj")
_BERT = (r"attention\.self\.(key|value)", r"output\.dense")
_T5 = (r"layer\.\d\.(SelfAttention|EncDecAttention)\.(k|v)", r"layer\.\d\.DenseReluDense\.wo")
EXPECTED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "phi": (r"self_attn\.(k|v)_proj", r"mlp\.fc2"),
    "opt": (r"self_attn\.(k|v)_proj", "fc2"),
    "gptj": (r"attn\.(k|v)_proj", r"mlp\.fc_out"),
    "gpt_neo": (r"attn\.attention\.(k|v)_proj", r"mlp\.c_proj"),
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT),
    **dict.fromkeys(
        ("t5", "mt5"), (r"layer\.\d\.(SelfAttention|EncDecAttention)\.(k|v)", r"layer\.\d\.DenseReluDense\.wo")
    ),
}


def build(kind: str) -> nn.Module:
    config, auto, sizes = MODELS[kind]
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(getattr(transformers, config)(**sizes)).eval()


def inputs_for(kind: str) -> dict[str, Tensor]:
    ids = torch.arange(4, 16).view(2, 6)
    return {"input_ids": ids, "decoder_input_ids": ids} if kind in ("t5", "mt5") else {"input_ids": ids}


@pytest.mark.parametrize("kind", DEFAULT_TARGETS)
def test_default_targets(kind: str, seed: int) -> None:
    """None else, each on the right side; the model computes the same, and merged what unmerged does."""
    if kind == "mixtral":
        pytest.skip("its experts are no linear layers in transformers 5")
    model = build(kind)
    assert model.config.model_type == kind
    with torch.no_grad():
        expected = model(**inputs_for(kind)).logits
    peftkern.tune(model, "ia3")
    scaled = {path: module for path, module in model.named_modules() if isinstance(module, IA3Linear)}
    outputs, inputs = EXPECTED[kind]
    for path, module in scaled.items():
        below = re.sub(r"^.*?\.\d+\.", "", path, count=1)
        wanted = inputs if module.settings["default"].is_feedforward else outputs
        assert re.fullmatch(wanted, below), path
    stacks = 2 if kind in ("t5", "mt5") else 1
    attentions = 3 if kind in ("t5", "mt5") else 1  # of the encoder, of the decoder, and across
    assert len(scaled) == 2 * (2 * attentions + stacks)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_for(kind)).logits, expected)
        for module in scaled.values():
            nn.init.normal_(module.scale("default"), 1, 0.2)
        moved = model(**inputs_for(kind)).logits
        assert not torch.allclose(moved, expected)
        peftkern.merge(model)
        torch.testing.assert_close(model(**inputs_for(kind)).logits, moved, rtol=1e-4, atol=1e-5)
        peftkern.unmerge(model)
        assert torch.equal(model(**inputs_for(kind)).logits, moved)


def test_t_few_s_formula_on_t5(seed: int) -> None:
    """Keys and values scaled after projection, and what goes into wo (arXiv 2205.05638, section 3.3)."""
    model = build("t5")
    block = model.encoder.block[0].layer[1].DenseReluDense
    x = torch.randn(2, 3, 32)
    peftkern.tune(model, "ia3")
    scale = block.wo.scale("default")
    nn.init.normal_(scale, 1, 0.2)
    expected = nn.functional.linear(nn.functional.relu(block.wi(x)) * scale.flatten(), block.wo.base_layer.weight)
    torch.testing.assert_close(block(x), expected)


def test_an_architecture_without_defaults_needs_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"ia3: target_modules must be given for model_type None; .* llama, mistral"):
        peftkern.tune(model, "ia3")
    assert model[0].weight.requires_grad
    peftkern.tune(model, "ia3", target_modules=["0"])
    assert isinstance(model[0], IA3Linear)


def test_feedforward_modules_are_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match='feedforward_modules must be among target_modules, "1" is not'):
        peftkern.tune(model, "ia3", target_modules=["0"], feedforward_modules=["1"])
    with pytest.raises(ValueError, match="feedforward_modules must come with target_modules"):
        peftkern.tune(model, "ia3", feedforward_modules=["1"])
