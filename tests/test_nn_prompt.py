"""PromptEmbedding and PromptEncoder by themselves: inits, names, prompts of samples, templates, encoders."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern import prompt_embedding
from peftkern.nn import PromptEmbedding, PromptEncoder
from peftkern.nn.prompt import INITS

VOCABULARY, FEATURES, ROWS = 40, 12, 5
PSEUDO = VOCABULARY + 3


def embedding_of(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    return nn.Embedding(VOCABULARY, FEATURES).to(dtype).requires_grad_(False)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


@pytest.mark.parametrize("init", INITS)
def test_inits(init: str, seed: int) -> None:
    embedding = embedding_of()
    token_ids = [3, 1, 3] if init == "text" else None
    module = PromptEmbedding(embedding, 4096, init, token_ids)
    prompt = module.prompt("default")
    assert prompt.dtype == torch.float32 and prompt.requires_grad and module.settings["default"].init == init
    low, high, mean = prompt.min().item(), prompt.max().item(), prompt.mean().item()
    if init == "uniform":
        assert -0.5 <= low < -0.49 and 0.49 < high <= 0.5 and abs(mean) < 0.01
    elif init == "uniform_positive":
        assert 0.0 <= low < 0.01 and 0.49 < high < 0.5 and abs(mean - 0.25) < 0.01
    elif init == "normal":
        assert abs(mean) < 0.02 and abs(prompt.std().item() - 1) < 0.02
    elif init == "sampled_vocab":
        nearest = torch.cdist(prompt.detach(), embedding.weight).argmin(1)
        assert torch.equal(prompt, embedding.weight[nearest]) and len(nearest.unique()) == VOCABULARY
    else:
        assert torch.equal(prompt[:4], embedding.weight[[3, 1, 3, 3]])


def test_text_is_cut_or_repeated(seed: int) -> None:
    embedding = embedding_of()
    for rows, ids in ((2, [7, 8]), (5, [7, 8, 9, 7, 8])):
        for given in ([7, 8, 9], torch.tensor([7, 8, 9])):
            module = PromptEmbedding(embedding, rows, "text", given)
            assert torch.equal(module.prompt("default"), embedding.weight[ids])


def test_vocabulary_is_what_the_module_gives(seed: int) -> None:
    scaled = ScaledEmbedding(VOCABULARY, FEATURES)
    module = PromptEmbedding(scaled, 2, "text", [5, 6])
    assert torch.equal(module.prompt("default"), scaled.weight[[5, 6]] * 3)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(module(ids, scaled).inputs_embeds[0, 2:], scaled(ids)[0])


def test_forward_is_the_op(seed: int) -> None:
    embedding, ids = embedding_of(torch.bfloat16), torch.randint(VOCABULARY, (3, 4))
    module = PromptEmbedding(embedding, ROWS)
    extras = torch.ones(3, 4).long(), torch.randint(9, (3, 4)), torch.arange(4)[None]
    for ours, theirs in zip(
        module(ids, embedding, *extras),
        prompt_embedding(ids, embedding.weight, module.prompt("default"), None, *extras),
    ):
        assert torch.equal(ours, theirs)
    embedded = module(None, embedding, inputs_embeds=embedding(ids)).inputs_embeds
    assert torch.equal(embedded, module(ids, embedding).inputs_embeds)


def test_an_embedding_with_a_hook_is_called(seed: int) -> None:
    """transformers' enable_input_require_grads is one."""
    embedding, ids = embedding_of(), torch.randint(VOCABULARY, (2, 3))
    module = PromptEmbedding(embedding, ROWS)
    embedding.register_forward_hook(lambda _, __, output: output + 1)
    assert torch.equal(module(ids, embedding).inputs_embeds[:, ROWS:], embedding.weight[ids] + 1)


@pytest.mark.parametrize("module_type", [PromptEmbedding, PromptEncoder])
def test_named_prompts(module_type: Any, seed: int) -> None:
    embedding, ids = embedding_of(), torch.randint(VOCABULARY, (3, 4))
    module = module_type(embedding, ROWS, adapter_name="first")
    module.add_adapter("second", embedding, ROWS)
    trainable = {n.split(".")[1] for n, p in module.named_parameters() if p.requires_grad}
    assert module.active_adapter == "first" and trainable == {"first"}
    first = module(ids, embedding).inputs_embeds
    module.set_adapter("second")
    second = module(ids, embedding).inputs_embeds
    trainable = {n.split(".")[1] for n, p in module.named_parameters() if p.requires_grad}
    assert not torch.equal(first, second) and trainable == {"second"}

    mixed = module(ids, embedding, prompt_ids=["second", "first", "second"]).inputs_embeds
    assert torch.equal(mixed, torch.stack((second[0], first[1], second[2])))
    same = module(ids, embedding, prompt_ids=torch.tensor([1, 0, 1])).inputs_embeds
    assert torch.equal(mixed, same)
    mixed.sum().backward()
    assert all((p.grad is not None) == ("second" in n) for n, p in module.named_parameters())

    module.delete_adapter("second")
    assert list(module.settings) == ["first"] and module.active_adapter is None and not module.prompting
    assert not any("second" in name for name in module.state_dict())
    with pytest.raises(RuntimeError, match="no adapter is active"):
        module(ids, embedding)
    with pytest.raises(ValueError, match="no adapter 'second'; there is 'first'"):
        module(ids, embedding, prompt_ids=["first", "second", "first"])


def test_per_sample_prompts_have_one_length(seed: int) -> None:
    embedding = embedding_of()
    module = PromptEmbedding(embedding, 3, adapter_name="short")
    module.add_adapter("long", embedding, 4)
    with pytest.raises(ValueError, match=r"prompt_ids needs prompts of one length, got {'short': 3, 'long': 4}"):
        module(torch.zeros(1, 2).long(), embedding, prompt_ids=["short"])


@pytest.mark.parametrize("hidden_size", [None, 7])
def test_lstm_encoder_is_the_authors(hidden_size: int | None, seed: int) -> None:
    """THUDM's PromptEncoder, written out: LSTM of half the features, two layers both ways, then d -> d -> d."""
    module = PromptEncoder(embedding_of(), ROWS, "lstm", hidden_size)
    hidden = hidden_size or FEATURES // 2
    lstm = nn.LSTM(FEATURES, hidden, num_layers=2, bidirectional=True, batch_first=True)
    mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, FEATURES))
    encoder: Any = module.encoders["default"]
    lstm.load_state_dict(encoder.lstm_head.state_dict())
    mlp.load_state_dict(encoder.mlp_head.state_dict())
    expected = mlp(lstm(encoder.embedding(torch.arange(ROWS)).unsqueeze(0))[0]).squeeze(0)
    torch.testing.assert_close(module.prompt("default"), expected)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_encoder_is_peft_s(kind: str, seed: int) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=ROWS,
        token_dim=FEATURES,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=9,
        encoder_num_layers=2,
    )
    theirs = peft.PromptEncoder(config)
    module = PromptEncoder(embedding_of(), ROWS, kind, 9)
    module.encoders["default"].load_state_dict(theirs.state_dict())
    torch.testing.assert_close(module.prompt("default"), theirs(torch.arange(ROWS).unsqueeze(0))[0])


def test_encoder_dropout_is_for_training(seed: int) -> None:
    module = PromptEncoder(embedding_of(), ROWS, dropout=0.5)
    assert not torch.equal(module.prompt("default"), module.prompt("default"))
    module.eval()
    assert torch.equal(module.prompt("default"), module.prompt("default"))


def test_template(seed: int) -> None:
    """Pseudo tokens anywhere, differently in each sample; a token that the vocabulary need not have."""
    embedding = embedding_of()
    module = PromptEncoder(embedding, 3, pseudo_token_id=PSEUDO)
    ids = torch.tensor([[PSEUDO, 4, PSEUDO, PSEUDO, 5, 6], [1, PSEUDO, 2, PSEUDO, 3, PSEUDO]])
    labels, mask, positions = ids.clone(), torch.ones_like(ids), torch.arange(6)[None]
    result = module(ids, embedding, mask, labels, positions)
    prompt = module.prompt("default")
    for sample in range(2):
        row = 0
        for place, token in enumerate(ids[sample].tolist()):
            wanted = prompt[row] if token == PSEUDO else embedding.weight[token]
            assert torch.equal(result.inputs_embeds[sample, place], wanted)
            assert result.labels[sample, place] == (-100 if token == PSEUDO else token)
            row += token == PSEUDO
    assert torch.equal(result.attention_mask, mask) and torch.equal(result.position_ids, positions)
    assert module.prefix_length == 0 and module.pseudo_token_id == PSEUDO
    grads = torch.autograd.grad(result.inputs_embeds.sum(), module.encoders["default"].parameters())  # type: ignore
    assert all(grad.any() for grad in grads)

    with pytest.raises(ValueError, match="must have pseudo_token_id 43 3 times, sample 1 has it 2 times"):
        module(ids.clone().index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(0)), embedding)
    with pytest.raises(ValueError, match="inputs_embeds have none"):
        module(None, embedding, inputs_embeds=F.embedding(ids[:, :2].clamp(max=5), embedding.weight))


@pytest.mark.parametrize("module_type", [PromptEmbedding, PromptEncoder])
def test_state_dict_and_copies(module_type: Any, seed: int) -> None:
    embedding = embedding_of()
    module, other = (module_type(embedding, ROWS) for _ in range(2))
    other.load_state_dict(module.state_dict())
    for each in (other, copy.deepcopy(module)):
        assert torch.equal(each.prompt("default"), module.prompt("default"))
    assert "default" in repr(module)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda e: PromptEmbedding(e, 0), ValueError, "num_virtual_tokens must be positive, got 0"),
        (lambda e: PromptEmbedding(e, 2.0), TypeError, "num_virtual_tokens must be an int, got 2.0"),
        (lambda e: PromptEmbedding(e, 2, "vocab"), ValueError, r"got 'vocab'; did you mean .*'sampled_vocab'"),
        (lambda e: PromptEmbedding(e, 2, "zzz"), ValueError, "init must be one of uniform, .*text, got 'zzz'$"),
        (lambda e: PromptEmbedding(e, 2, "text"), ValueError, "token_ids are the tokens of init='text', and none were"),
        (lambda e: PromptEmbedding(e, 2, "normal", [1]), ValueError, "token_ids are .* and init is 'normal'"),
        (lambda e: PromptEmbedding(e, 2, "text", [1, 40]), ValueError, "token_ids must be from 0 to 39, got 40"),
        (lambda e: PromptEmbedding(e, 2, "text", []), ValueError, "token_ids must be from 0 to 39, got none"),
        (lambda e: PromptEmbedding(e.weight, 2), TypeError, "embedding must be an embedding module, got Parameter"),
        (lambda e: PromptEmbedding(e, 2, dtype=torch.half), TypeError, "dtype must be torch.float32 or .* got"),
        (lambda e: PromptEmbedding(e, 2, adapter_name="a.b"), ValueError, "adapter_name must be a name"),
        (lambda e: PromptEncoder(e, 2, "lstn"), ValueError, "encoder must be one of .*; did you mean 'lstm'"),
        (lambda e: PromptEncoder(e, 2, hidden_size=0), ValueError, "hidden_size must be positive, got 0"),
        (lambda e: PromptEncoder(e, 2, num_layers=None), TypeError, "num_layers must be an int, got None"),
        (lambda e: PromptEncoder(e, 2, dropout=2), ValueError, "dropout must be from 0 to 1, got 2"),
        (lambda e: PromptEncoder(e, 2, dropout="x"), TypeError, "dropout must be a number, got 'x'"),
        (lambda e: PromptEncoder(e, 2, pseudo_token_id="x"), TypeError, "pseudo_token_id must be an int, got 'x'"),
    ],
)
def test_bad_arguments_raise(build: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        build(embedding_of())


def test_bad_additions_change_nothing() -> None:
    module = PromptEmbedding(embedding_of(), 2)
    with pytest.raises(ValueError, match="adapter 'default' exists already"):
        module.add_adapter("default", embedding_of())
    with pytest.raises(ValueError, match="embedding must have 12 features, got 3"):
        module.add_adapter("other", nn.Embedding(4, 3))
    with pytest.raises(ValueError, match="token_ids must be"):
        module.add_adapter("other", embedding_of(), 2, "text", [99])
    assert list(module.settings) == ["default"] == list(module.prompts)
