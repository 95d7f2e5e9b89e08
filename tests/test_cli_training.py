"""The parts of `peftkern finetune`: text and its split, windows, bits per byte, files."""

import json
import math
import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from peftkern.cli import data, report, training
from peftkern.cli.errors import UsageError

SEED = 20


class PairTokenizer:
    """A token is two characters; lossless and nothing like bytes."""

    unk_token_id = None

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [hash(text[i : i + 2]) % 500 for i in range(0, len(text), 2)]


def uniform(input_ids, use_cache):
    return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 512))


@pytest.mark.parametrize("eos", [None, 511])
def test_bits_per_byte_counts_every_token_of_the_text_once(eos):
    text = data.Split(train=["ab" * 40], held_out=["é" * 42, "xy" * 13, "tail"])
    tokens = data.tokenize(text, PairTokenizer(eos))
    model = torch.nn.Module()
    model.forward = uniform
    settings = SimpleNamespace(batch_size=2, sequence_length=8)
    got = training.bits_per_byte(model, tokens, text.held_out_bytes, settings)
    assert text.held_out_bytes == 84 + 26 + 4
    assert got == pytest.approx((21 + 13 + 2) * math.log2(512) / 114, rel=1e-6)
    assert tokens.inputs[0] == tokens.train[-1]
    assert len(tokens.targets) == 21 + 1 + 13 + 1 + 2
    assert (tokens.targets == data.IGNORED).sum() == 2


@pytest.mark.parametrize(
    "documents",
    [["line\n" * 100], ["x" * 1000], [f"document {i}\n" for i in range(50)], ["short", "y" * 5000], ["z" * 5000, "a"]],
)
def test_split_holds_out_the_end_and_loses_nothing(documents):
    text = data.split(documents)
    assert "".join(text.train + text.held_out) == "".join(documents)
    characters = sum(map(len, documents))
    assert 0.04 * characters <= sum(map(len, text.held_out)) <= 0.1 * characters
    assert all(text.held_out)


def test_split_of_a_large_text_is_capped():
    assert data.split(["word " * 500_000]).held_out_bytes == data.HELD_OUT_CHARACTERS


def test_jsonl_documents_keep_their_characters(tmp_path):
    texts = ["one\u2028two", "", "  three\n", "\N{GRINNING FACE}"]
    file = tmp_path / "data.jsonl"
    file.write_text(
        "\ufeff" + "\r\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts), "utf-8"
    )
    assert data.read_documents(file) == texts


def test_every_epoch_visits_every_window_once():
    starts = data.window_starts(tokens=101, steps=10, batch_size=4, sequence_length=5, seed=SEED)
    assert starts.shape == (10, 4)
    first, second = starts.flatten().split(20)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(0, 100, 5))
    assert first.tolist() != second.tolist()
    again = data.window_starts(tokens=101, steps=10, batch_size=4, sequence_length=5, seed=SEED)
    assert torch.equal(starts, again)


def test_missing_topics_name_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="--data"):
        data.topics()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    training.write_file(file, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            training.write_file(file, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"old"


def test_slow_steps_are_shown_one_by_one(monkeypatch, capsys):
    """The first at once, and then none is more than some seconds behind, in a log as well."""
    now = 100.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    with report.progress("name", steps=100) as display:
        for step in range(1, 7):
            now += 1 if step <= 3 else report.PLAIN_SECONDS
            display.update(step, 1.0, 10.0)
    shown = [line.split("/")[0].rpartition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1", "4", "5", "6"]
