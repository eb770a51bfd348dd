"""DALLE-pytorch's tokenizers: which one a model was trained with is not in its file, only what it reads.

    simple          OpenAI's byte pairs: bpe_simple_vocab_16e6.txt, or the .txt.gz of CLIP (the default there)
    Hugging Face    a tokenizer.json, whatever its name
    YouTokenToMe    a .model of numbers
    Chinese         the vocab.txt of bert-base-chinese

Rules after `tokenizer.py` of DALLE-pytorch (https://github.com/lucidrains/DALLE-pytorch). All pad with 0, which
the model reads as "nothing here" wherever it occurs, and put no tokens around a text. A text that is too long is
cut (`truncate_text=True` there).
"""

import html
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dm_generations.errors import UserError, one_line
from dm_generations.text.bpe import byte_alphabet, merge, rules_of
from dm_generations.text.files import (
    MAX_BYTES,
    decode,
    optional_module,
    parse_json,
    parse_merges,
    read_bytes,
    special_id,
)
from dm_generations.text.rows import padded_rows
from dm_generations.text.tokenizer import plain_ids, read_pipeline, well_formed
from dm_generations.text.youtokentome import YouTokenToMe

PAD_ID = 0
SIMPLE_MERGES = 49_152 - 256 - 2  # OpenAI's file lists far more than its vocabulary takes
SIMPLE_ENDS = ("<|startoftext|>", "<|endoftext|>")
ENDINGS = (".json", ".model", ".bpe", ".yttm", ".txt", ".txt.gz")  # of files that may be tokenizers
MERGES_OF_A_PAIR = "merges.txt"  # headed like OpenAI's file, but nothing without its vocab.json


class TextToIds(Protocol):
    def ids(self, text: str, limit: int) -> list[int]:
        """The ids of a well-formed text; those after the first `limit` may be missing."""


class DallePytorchTokenizer:
    """path: a tokenizer's file, or the one folder it is in; its kind is seen from what is in it.

    vocab_size: the model's `num_text_tokens`. lower: put texts in lower case first, as the DALL-3 fork's
    program does. Raises UserError for files that are missing, broken or of no known kind.
    """

    def __init__(self, path: Path, vocab_size: int, *, lower: bool = False):
        self.path = _find(path) if path.is_dir() else path
        kind = _kind(self.path)
        if kind is None:
            raise UserError(
                f"{self.path}: not a tokenizer that DALLE-pytorch knows (OpenAI's BPE text, a Hugging Face JSON, "
                "a YouTokenToMe model or a BERT vocab.txt)"
            )
        self._kind: TextToIds = kind(self.path)
        self._lower = lower
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask (1 where the id is not 0), both int32 (B, L) with L = length.

        None, like the empty text, is zeros alone.
        """
        texts = [well_formed(text or "") for text in texts]
        ids = [self._kind.ids(text.lower() if self._lower else text, length) for text in texts]
        input_ids, _ = padded_rows(ids, length, PAD_ID, self.vocab_size, self.path)
        return input_ids, (input_ids != PAD_ID).astype(np.int32)


class SimpleTokenizer:
    """CLIP's first tokenizer: repaired text in lower case, cut into words, bytes merged within each.

    Letters and digits are what Python's Unicode tables say; DALLE-pytorch asks those of the `regex` library.
    """

    def __init__(self, path: Path):
        self._fix_text = optional_module("ftfy").fix_text
        lines = decode(_gunzipped(path), path).rstrip("\n").split("\n")[: 1 + SIMPLE_MERGES]
        self._byte_pieces = byte_alphabet()
        pieces = sorted(self._byte_pieces)
        pieces += [piece + "</w>" for piece in pieces]
        pieces += [line.replace(" ", "") for line in lines[1:]] + list(SIMPLE_ENDS)
        self._id = {piece: index for index, piece in enumerate(pieces)}
        self._rules = rules_of(parse_merges("\n".join(lines).encode(), path, self._id))

    def ids(self, text: str, limit: int) -> list[int]:
        text = html.unescape(html.unescape(self._fix_text(text)))
        ids: list[int] = []
        for word in _words(text.lower()):
            if len(ids) >= limit:
                break
            ids += [self._id[piece] for piece in self._pieces(word)]
        return ids

    def _pieces(self, word: str) -> list[str]:
        if word in SIMPLE_ENDS:
            return [word]
        pieces = [self._byte_pieces[byte] for byte in word.encode()]
        return merge([*pieces[:-1], pieces[-1] + "</w>"], self._rules, whole_passes=True)


class HuggingFaceTokenizer:
    """The file's pipeline without what it puts around a text, its padding and its truncation."""

    def __init__(self, path: Path):
        self._path = path
        self._tokenizer = read_pipeline(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def ids(self, text: str, limit: int) -> list[int]:
        return plain_ids(self._tokenizer, [text], self._path)[0]


class ChineseTokenizer:
    """BERT's word pieces with upper case kept, as for bert-base-chinese; a piece's id is its line, from 0."""

    def __init__(self, path: Path):
        self._path = path
        pieces = decode(read_bytes(path), path).removesuffix("\n").split("\n")
        vocab = {piece: index for index, piece in enumerate(pieces)}
        special_id(vocab, "[UNK]", path)
        self._tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        specials = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
        self._tokenizer.add_special_tokens([piece for piece in specials if piece in vocab])

    def ids(self, text: str, limit: int) -> list[int]:
        return plain_ids(self._tokenizer, [text], self._path)[0]


def _find(folder: Path) -> Path:
    """The one file of a folder that is a tokenizer. UserError if there is none, or if there are several."""
    try:
        files = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS) and path.is_file())
        files = [path for path in files if path.stat().st_size <= MAX_BYTES and path.name != MERGES_OF_A_PAIR]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    found = {path: kind for path in files if (kind := _kind(path)) is not None}
    chinese = [path for path, kind in found.items() if kind is ChineseTokenizer]
    paths = chinese or list(found)  # a BERT folder has its tokenizer.json too, which puts tokens around a text
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"{folder}: needs one tokenizer for the prompts, found {names}; give the file itself")
    return paths[0]


def _kind(path: Path) -> type[TextToIds] | None:
    """What reads this file, None if nothing here does."""
    data = _gunzipped(path)
    head = data[:4096]
    first_line, _, rest = head.partition(b"\n")
    if b"#version" in first_line:
        return SimpleTokenizer
    if data.lstrip()[:1] == b"{":
        document = parse_json(data, path)
        has_model = isinstance(document, dict) and isinstance(document.get("model"), dict)
        return HuggingFaceTokenizer if has_model and "vocab" in document["model"] else None
    if re.fullmatch(rb"\d+ \d+\s*", first_line) and re.match(rb"\d+ \d+\s", rest):
        return YouTokenToMe
    if b"\n[UNK]" in b"\n" + head.replace(b"\r", b""):
        return ChineseTokenizer
    return None


def _gunzipped(path: Path) -> bytes:
    """A file's bytes, unpacked if it is a .gz. UserError if that is broken, or far too large for a tokenizer."""
    data = read_bytes(path)
    if data[:2] != b"\x1f\x8b":
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise UserError(f"{path}: broken .gz ({one_line(error)})") from error
    if unpacker.unconsumed_tail:
        raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB, not a tokenizer's file")
    if not unpacker.eof:
        raise UserError(f"{path}: the .gz is cut off")
    return data


# A mark, whose upper case is a letter: `regex`, told to ignore case, takes it for neither, and so drops it.
IOTA_BELOW = "\N{COMBINING GREEK YPOGEGRAMMENI}"
SPECIAL_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)


def _words(text: str) -> Iterator[str]:
    """CLIP's words: contractions' ends, runs of letters, single digits, runs of other marks; spaces are dropped."""
    start = 0
    while start < len(text):
        kind = _character_kind(text[start])
        if special := SPECIAL_WORDS.match(text, start):
            end = special.end()
        else:
            end = start + 1
            while kind != "number" and end < len(text) and _character_kind(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[start:end]
        start = end


def _character_kind(character: str) -> str:
    if character.isspace() or character == IOTA_BELOW:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "mark")
