"""Text in, token windows out: reading, the held-out split, and bits per byte that no tokenizer can flatter."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.cli.errors import UsageError

# 10 % of the text, at most 64 KiB: more costs time and changes the third digit of bits per byte at most.
HELD_OUT_FRACTION = 0.1
HELD_OUT_CHARACTERS = 65536
IGNORED = -100


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out, the end of the text."""

    train: list[str]
    held_out: list[str]

    @property
    def train_sha256(self) -> str:
        return _sha256(self.train)

    @property
    def held_out_sha256(self) -> str:
        return _sha256(self.held_out)

    @property
    def held_out_bytes(self) -> int:
        return sum(len(document.encode()) for document in self.held_out)


@dataclass(frozen=True)
class Tokens:
    """A split as token ids, all 1-D int64.

    Attributes:
        train: the documents one after another, a separator between them.
        inputs, targets: of the held-out text; target i is the token after input i, IGNORED where it is a separator.
            The first input is the last token of `train`, so that every held-out token is predicted once.
        unknown: held-out tokens that stand for text the tokenizer cannot write.
    """

    train: Tensor
    inputs: Tensor
    targets: Tensor
    unknown: int


def _sha256(documents: list[str]) -> str:
    return hashlib.sha256("".join(documents).encode()).hexdigest()


def topics() -> list[str]:
    """The help topics of the Python standard library, English prose that is on every machine."""
    try:
        from pydoc_data.topics import topics as by_name
    except ImportError as error:
        raise UsageError("this Python has no pydoc_data.topics, the default text; give a file with --data") from error
    return [by_name[name] for name in sorted(by_name)]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data: {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--data: {path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise UsageError(f"--data: {path} is binary, not text (zero byte at character {text.index(chr(0))})")
    if not text.strip():
        raise UsageError(f"--data: {path} is empty")
    return text


def _json_document(path: Path, number: int, line: str) -> str:
    where = f"--data: {path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where}: wanted an object with a string "text", got {line.strip()[:60]}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f'{where}: "text" has a lone surrogate at character {error.start}') from error
    return text


def read_documents(path: Path) -> list[str]:
    """A .txt file as one document, or a .jsonl file's "text" fields as one each; blank lines are skipped.

    Raises:
        UsageError: the file is missing, empty, binary, of another kind, or has a bad line (numbered from 1).
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"--data: {path} must be a .txt or .jsonl file, got {path.suffix or 'no extension'}")
    text = _read_text(path)
    if path.suffix == ".txt":
        return [text]
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = enumerate(text.split("\n"), start=1)
    documents = [_json_document(path, number, line) for number, line in lines if line.strip()]
    if not any(document.strip() for document in documents):
        raise UsageError(f'--data: {path}: every "text" is empty')
    return documents


def _cut(document: str, held_out: int) -> int:
    """Where the last `held_out` characters begin, moved to the next line's start unless that drops half of them."""
    position = len(document) - held_out
    newline = document.find("\n", position - 1, position + held_out // 2) if position else -1
    return position if newline < 0 else newline + 1


def split(documents: list[str]) -> Split:
    """Holds out the end of the text: whole documents from the last on, and the end of the one before them.

    Raises:
        UsageError: there is not one character to hold out.
    """
    characters = sum(map(len, documents))
    wanted = min(HELD_OUT_CHARACTERS, int(HELD_OUT_FRACTION * characters))
    if not wanted:
        raise UsageError(f"--data: too short: {characters} characters leave none to hold out")
    train, held_out = list(documents), list[str]()
    while wanted > 0:
        document = train.pop()
        cut = _cut(document, min(wanted, len(document)))
        held_out.insert(0, document[cut:])
        if cut:
            train.append(document[:cut])
        wanted -= len(document)
    return Split(train, held_out)


def _join(documents: list[Tensor], separator: Tensor) -> tuple[Tensor, Tensor]:
    """The token ids one after another, and whether each is a separator."""
    pieces = [piece for document in documents for piece in (document, separator)][:-1]
    separates = [torch.full_like(piece, piece is separator, dtype=torch.bool) for piece in pieces]
    return torch.cat(pieces), torch.cat(separates)


def tokenize(text: Split, tokenizer: Any) -> Tokens:
    """Encodes a split with a transformers tokenizer; documents are separated by its end-of-text token or a newline."""

    def encode(document: str) -> Tensor:
        return torch.tensor(tokenizer.encode(document, add_special_tokens=False), dtype=torch.int64)

    eos = tokenizer.eos_token_id
    separator = encode("\n") if eos is None else torch.tensor([eos])
    train, _ = _join([encode(document) for document in text.train], separator)
    held_out, separates = _join([encode(document) for document in text.held_out], separator)
    unknown = 0 if tokenizer.unk_token_id is None else int((held_out[~separates] == tokenizer.unk_token_id).sum())
    inputs = torch.cat([train[-1:], held_out[:-1]])
    return Tokens(train, inputs, held_out.masked_fill(separates, IGNORED), unknown)


def check_length(tokens: Tokens, batch_size: int, sequence_length: int) -> None:
    """Raises UsageError unless there is text for one batch, and one sequence held out."""
    wanted, got = batch_size * sequence_length + 1, len(tokens.train)
    if got < wanted:
        raise UsageError(
            f"--data: too short: one batch of {batch_size} x {sequence_length} needs {wanted} tokens "
            f"beside the held-out text, got {got}"
        )
    if len(tokens.targets) < sequence_length:
        raise UsageError(
            f"--data: too short: the held-out text has {len(tokens.targets)} tokens, fewer than one sequence of "
            f"{sequence_length}"
        )


def window_starts(tokens: int, steps: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """Where each window of each batch begins, int64 [steps, batch_size].

    Every epoch visits all whole windows of `sequence_length` + 1 tokens (the last is a target only) in an order of its
    own, that `seed` alone decides.
    """
    windows = (tokens - 1) // sequence_length
    epochs = -(-steps * batch_size // windows)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size) * sequence_length
