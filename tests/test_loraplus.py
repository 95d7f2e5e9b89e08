"""loraplus_groups: PEFT's groups for the same model, and plain AdamW at ratio 1."""

from typing import Any

import pytest
import torch
from tiny_models import llama, loss, trainable
from torch import nn

import peftkern


def by_rate(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Parameter's name -> (learning rate, weight decay)."""
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm", "lm_head"]}])
def test_groups_are_peft_s(options, seed):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.up, self.norm, self.lm_head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 10)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.norm(self.up(self.embed(ids))))

    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["embed", "up"], **options))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = peftkern.loraplus_groups(model, 1e-3, 8.0, weight_decay=0.1, embedding_learning_rate=1e-5)
    assert by_rate(ours, names) == by_rate(optimizer.param_groups, names)
    assert by_rate(ours, names).keys() == trainable(model).keys()
    assert all(group["params"] for group in ours)


def test_groups_of_our_adapters(seed):
    model = peftkern.tune(llama(), "lora", target_modules=["q_proj"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = by_rate(peftkern.loraplus_groups(model, 1e-3, weight_decay=0.1), names)
    assert {name.split(".")[-3]: rate for name, rate in rates.items()} == {
        "lora_A": (1e-3, 0.1),
        "lora_B": (0.016, 0.1),
    }
    model = peftkern.tune(llama(), "bitfit")
    (group,) = peftkern.loraplus_groups(model, 1e-3, 4.0, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (4e-3, 0.0, 14)


def test_ratio_one_is_plain_adamw(seed):
    models = [peftkern.add_lora(llama()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        torch.optim.AdamW(trainable(models[0]).values(), lr=1e-2, weight_decay=0.0),
        torch.optim.AdamW(peftkern.loraplus_groups(models[1], 1e-2, ratio=1.0)),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    for ours, theirs in zip(trainable(models[1]).values(), trainable(models[0]).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0,), "learning_rate must be positive"),
        ((1e-3, -1.0), "ratio must be positive"),
        ((1e-3, float("inf")), "ratio must be positive and finite"),
        ((1e-3, 1.0, -0.1), "weight_decay must be finite and not negative"),
        ((1e-3, 1.0, 0.0, 0.0), "embedding_learning_rate must be positive"),
    ],
)
def test_what_is_refused(arguments, message, seed):
    with pytest.raises(ValueError, match=message):
        peftkern.loraplus_groups(peftkern.add_lora(llama()), *arguments)


def test_nothing_to_train(seed):
    with pytest.raises(ValueError, match="no trainable parameter"):
        peftkern.loraplus_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
