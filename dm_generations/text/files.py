"""Reading the files of a tokenizer. They come from anywhere, so nothing in them is believed before it is checked."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np

from dm_generations.errors import UserError, one_line

MAX_BYTES = 64 << 20  # the largest tokenizers in use have 20 MB
MAX_ID = np.iinfo(np.int32).max


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises UserError if it is missing, unreadable or far too large for a tokenizer's."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MiB, not a tokenizer's file")
    return data


def decode(data: bytes, name: str | Path) -> str:
    """UTF-8 text with "\\n" at line ends. `name` is for the error: UserError if it is no UTF-8."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start:,})") from error


def parse_json(data: bytes, name: str | Path) -> object:
    """A JSON document. Raises UserError if it is none, or nested beyond reason."""
    try:
        return json.loads(decode(data, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken JSON ({one_line(error)})") from error


def parse_vocab(data: bytes, name: str | Path) -> dict[str, int]:
    """{piece: id} of a vocab.json. Raises UserError for anything else than text and ids of int32."""
    vocab = parse_json(data, name)
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"{name}: not a vocabulary, expected an object of pieces and their ids")
    for piece, index in vocab.items():
        if type(index) is not int or not 0 <= index <= MAX_ID:
            raise UserError(f"{name}: piece {_shown(piece)} has id {_shown(index)}, expected a whole number from 0")
        if not _is_unicode(piece):
            raise UserError(f"{name}: piece {_shown(piece)} is not valid Unicode")
    return vocab


def parse_merges(data: bytes, name: str | Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of a merges.txt, the first to be merged first; a first line with `#version` is skipped.

    Raises UserError for a line that is no pair, or whose pieces or their union `vocab` lacks.
    """
    lines = decode(data, name).rstrip("\n").split("\n")
    is_headed = "#version" in lines[0]
    merges = []
    for number, line in enumerate(lines[is_headed:], start=1 + is_headed):
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{name}: line {number} is {_shown(line)}, expected two pieces")
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise UserError(f"{name}: line {number} names the piece {_shown(piece)}, which the vocabulary lacks")
        merges.append((pair[0], pair[1]))
    return merges


def special_id(vocab: dict[str, int], piece: str, name: str | Path) -> int:
    """The id of a piece that this kind of tokenizer cannot do without; UserError if there is none."""
    if piece not in vocab:
        raise UserError(f"{name}: has no piece {piece!r}, not the vocabulary of this kind of model")
    return vocab[piece]


def optional_module(name: str) -> ModuleType:
    """A library that only the tokenizers of public checkpoints need; UserError says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this model's text needs the library {name}: pip install 'dm-generations[checkpoints]'"
        ) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    shown = ascii(value) if isinstance(value, str | int) else type(value).__name__
    return shown if len(shown) <= 40 else shown[:40] + "..."
