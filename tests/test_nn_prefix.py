"""nn.Prefix: what it gives each layer, named prefixes, PEFT's layout, the reparametrisation."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peftkern import prefix_attention
from peftkern.nn import Prefix


def prefix(**options: Any) -> Prefix:
    return Prefix(num_layers=3, kv_heads=2, head_dim=4, **{"length": 5, "init": "normal", **options})


@pytest.mark.parametrize("hidden", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_has_its_own(hidden: int | None, dtype: torch.dtype, seed: int) -> None:
    module = prefix(hidden=hidden, dtype=dtype)
    pairs = [module(layer) for layer in range(3)]
    assert all(part.shape == (2, 5, 4) and part.dtype == dtype for pair in pairs for part in pair)
    assert len({part.sum().item() for pair in pairs for part in pair}) == 6
    query, key = torch.randn(1, 4, 6, 4, dtype=dtype), torch.randn(1, 2, 6, 4, dtype=dtype)
    for pair in pairs:
        prefix_attention(query, key, key, *pair, is_causal=True, enable_gqa=True).float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_initial_values(seed: int) -> None:
    drawn = prefix(length=500).prompt_embeddings("default")
    assert drawn.mean().abs() < 0.05 and (drawn.std() - 1).abs() < 0.05
    for hidden in (None, 7):
        zero = prefix(init="zero", hidden=hidden)
        assert not zero.prompt_embeddings("default").any()
    assert zero.encoders["default"].embedding.any()


@pytest.mark.parametrize("hidden", [None, 7])
def test_prompt_embeddings_are_layer_by_layer_and_key_before_value(hidden: int | None, seed: int) -> None:
    module = prefix(hidden=hidden)
    embeddings = module.prompt_embeddings("default")
    assert embeddings.shape == (5, 3 * 2 * 2 * 4)
    as_peft_views_it = embeddings.view(5, 6, 2, 4).permute(1, 2, 0, 3)
    for layer in range(3):
        for part, expected in zip(module(layer), as_peft_views_it[2 * layer :]):
            assert torch.equal(part, expected)
    other = prefix()
    other.set_prompt_embeddings("default", embeddings)
    assert torch.equal(other.prompt_embeddings("default"), embeddings)


def test_the_reparametrisation_can_be_dropped(seed: int) -> None:
    module = prefix(hidden=7)
    expected = module.prompt_embeddings("default")
    names = set(module.reparametrisation("default"))
    assert names == {"embedding", "hidden_weight", "hidden_bias"} | {
        f"{kind}.{layer}" for kind in ("weights", "biases") for layer in range(3)
    }
    module.drop_reparametrisation("default")
    assert torch.equal(module.prompt_embeddings("default"), expected)
    assert module.reparametrisation("default") is None and module.settings["default"].hidden is None
    assert (
        all(p.requires_grad and p.shape == (2, 5, 4) for p in module.parameters())
        and len(list(module.parameters())) == 6
    )


def test_dropout_only_in_training(seed: int) -> None:
    module = prefix(dropout=0.5)
    dropped = module(0)[0]
    assert 0 < (dropped == 0).float().mean() < 1
    module.eval()
    assert torch.equal(module(0)[0], module.encoders["default"].keys[0])


def test_named_prefixes(seed: int) -> None:
    module = prefix()
    module.add_adapter("other", length=2, init="normal", hidden=3)
    assert module.active_adapter == "default" and module.length == 5
    assert not any(p.requires_grad for p in module.adapter_parameters("other"))
    first = module(1)[0]
    module.set_adapter("other")
    assert module.length == 2 and module(1)[0].shape == (2, 2, 4)
    assert not any(p.requires_grad for p in module.adapter_parameters("default"))
    module.disable_adapters()
    assert module(1) is None and module.length == 0
    module.enable_adapters()
    module.set_adapter("default")
    assert torch.equal(module(1)[0], first)
    module.delete_adapter("default")
    assert module.active_adapter is None and module(1) is None and list(module.settings) == ["other"]
    with pytest.raises(ValueError, match="no adapter 'default'; there is 'other'"):
        module.set_adapter("default")


def test_state_dict_and_copies(seed: int) -> None:
    for hidden in (None, 7):
        module, other = prefix(hidden=hidden), prefix(hidden=hidden)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.prompt_embeddings("default"), module.prompt_embeddings("default"))
        copied = copy.deepcopy(module)
        with torch.no_grad():
            next(copied.parameters()).add_(1)
        assert not torch.equal(copied.prompt_embeddings("default"), module.prompt_embeddings("default"))


def test_the_mlp_is_no_linear_layer_of_the_model() -> None:
    """Which LoRA and others would wrap."""
    assert not any(isinstance(module, nn.Linear) for module in prefix(hidden=6).modules())


def test_repr() -> None:
    text = repr(prefix())
    assert "num_layers=3, kv_heads=2, head_dim=4, adapters=(default: length=5), active=default" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be positive, got 0"),
        ({"length": 2.0}, TypeError, r"length must be an int, got 2\.0"),
        ({"hidden": 0}, ValueError, "hidden must be positive, got 0"),
        ({"hidden": True}, TypeError, "hidden must be an int, got True"),
        ({"init": "text"}, ValueError, "init must be 'normal' or 'zero', got 'text'"),
        ({"dropout": 2}, ValueError, "dropout must be from 0 to 1, got 2"),
        ({"dropout": "a"}, TypeError, "dropout must be a number, got 'a'"),
        ({"adapter_name": "a.b"}, ValueError, r"adapter_name must be a name without '\.'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of .*, got torch.int8"),
    ],
)
def test_bad_arguments_raise(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"Prefix: {message}"):
        prefix(**options)
    module = prefix()
    with pytest.raises(error, match=f"Prefix: {message}"):
        module.add_adapter(**{"adapter_name": "other", **options})
    assert list(module.settings) == list(module.encoders) == ["default"]


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="Prefix: num_layers must be positive, got 0"):
        Prefix(0, 1, 1)
    with pytest.raises(TypeError, match=r"Prefix: head_dim must be an int, got 1\.5"):
        Prefix(1, 1, 1.5)  # type: ignore[arg-type]
    module = prefix(hidden=3)
    with pytest.raises(ValueError, match="adapter 'default' exists already"):
        module.add_adapter("default")
    with pytest.raises(ValueError, match=r"prompt_embeddings must have shape \[5, 48\], got \[5, 47\]"):
        module.set_prompt_embeddings("default", torch.ones(5, 47))
    with pytest.raises(RuntimeError, match="a reparametrised prefix takes no prompt_embeddings"):
        module.set_prompt_embeddings("default", torch.ones(5, 48))
