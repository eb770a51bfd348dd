"""What the tokenizers of all models share: reading their files, and a tokenizer that runs a pipeline of `tokenizers`.

The files come from anywhere, so everything in them is checked before it is used.

B: prompts   L: tokens per prompt
"""

import base64
import contextlib
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from dm_generations.errors import UserError, one_line
from dm_generations.weights.mmap import refuse_lfs_pointer

MAX_BYTES = 64 << 20  # the largest tokenizers in use have 20 MB
MAX_ID = int(np.iinfo(np.int32).max)
MAX_GROWTH = 1000  # how many times longer the steps of a tokenizer.json may make a text

MAX_STEPS = 100  # in a tokenizer.json; those in use have about ten
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NESTED = ("normalizers", "pretokenizers", "processors", "decoders")

# vocab.json and merges.txt, which may share an ending, as min-dalle's vocab_mini.json and merges_mini.txt do.
VOCAB_OR_MERGES_NAME = re.compile(r"vocab(.*)\.json|merges(.*)\.txt")

Merges = list[tuple[str, str]]


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        UserError: It is missing, unreadable, far too large for a tokenizer's or a pointer of Git LFS.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MiB, not a tokenizer's file")
    refuse_lfs_pointer(path, data)
    return data


def read_maybe_gzipped(path: Path) -> bytes:
    """Read a whole file, and decompress it if it is a .gz.

    Raises:
        UserError: It is missing, a broken .gz or far too large for a tokenizer's.
    """
    data = read_bytes(path)
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken .gz ({one_line(error)})") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB, not a tokenizer's file")
    return data


def decode_utf8(data: bytes, name: str | Path) -> str:
    r"""Decode UTF-8 text, with "\n" at line ends.

    Raises:
        UserError: It is not UTF-8. The error names `name`.
    """
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start:,})") from error


def parse_json(data: bytes, name: str | Path) -> Any:
    """Parse a JSON document.

    Raises:
        UserError: It is broken, or nested too deeply.
    """
    try:
        return json.loads(decode_utf8(data, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken JSON ({one_line(error)})") from error


def parse_vocab(data: bytes, name: str | Path) -> dict[str, int]:
    """Parse a vocab.json.

    Returns:
        The id of each token.

    Raises:
        UserError: It is anything else than tokens and ids of int32.
    """
    vocab = parse_json(data, name)
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"{name}: not a vocabulary, expected an object of tokens and their ids")
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index <= MAX_ID:
            raise UserError(f"{name}: token {_quote(token)} has id {_quote(index)}, expected a whole number from 0")
        if not _is_unicode(token):
            raise UserError(f"{name}: token {_quote(token)} is not valid Unicode")
    return vocab


def parse_merges(text: str, name: str | Path, vocab: dict[str, int]) -> Merges:
    """Parse a merges.txt. A first line with `#version` is skipped.

    Returns:
        Pairs of tokens, the first to be merged first.

    Raises:
        UserError: A line is not a pair, or the vocabulary lacks a token of it or the two joined.
    """
    lines = text.rstrip("\n").split("\n")
    has_header = "#version" in lines[0]
    merges = []
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{name}: line {number} is {_quote(line)}, expected two tokens")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise UserError(f"{name}: line {number} names the token {_quote(token)}, which the vocabulary lacks")
        merges.append((pair[0], pair[1]))
    return merges


def find_token_id(vocab: dict[str, int], token: str, name: str | Path) -> int:
    """Look up a token that this kind of tokenizer needs.

    Raises:
        UserError: The vocabulary lacks it.
    """
    if token not in vocab:
        raise UserError(f"{name}: has no token {token!r}, not the vocabulary of this kind of model")
    return vocab[token]


def read_vocab_and_merges(path: Path) -> tuple[Path, dict[str, int], Merges]:
    """Read vocab.json and merges.txt.

    Args:
        path: The folder of the two files, or one of them.

    Returns:
        The path of vocab.json, the id of each token, and the merges.

    Raises:
        UserError: A file is missing or broken.
    """
    found = None if path.is_dir() else VOCAB_OR_MERGES_NAME.fullmatch(path.name)
    folder, ending = (path.parent, found[1] or found[2] or "") if found else (path, "")
    vocab_path, merges_path = folder / f"vocab{ending}.json", folder / f"merges{ending}.txt"
    vocab = parse_vocab(read_bytes(vocab_path), vocab_path)
    return vocab_path, vocab, parse_merges(decode_utf8(read_bytes(merges_path), merges_path), merges_path, vocab)


def build_bpe(path: Path, vocab: dict[str, int], merges: Merges, **options: str | bool) -> models.BPE:
    """Build the library's byte pair model.

    Raises:
        UserError: The library refuses these files. The error names `path`.
    """
    with wrap_library_errors(path, "not a vocabulary"):
        return models.BPE(vocab, merges, **options)


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Merges skipped at random (`dropout`, for training) are switched off.

    Raises:
        UserError: It is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder needs its tokenizer.json")
    document = parse_json(read_bytes(path), path)
    _check_memory(document, path)
    with wrap_library_errors(path, "not a tokenizer file"):
        pipeline = tokenizers.Tokenizer.from_str(json.dumps(document))  # what was checked, without keys that come twice
    if isinstance(pipeline.model, models.BPE):
        pipeline.model.dropout = None
    return pipeline


def read_pipeline(path: Path, build: Callable[[Path], tokenizers.Tokenizer]) -> tuple[Path, tokenizers.Tokenizer]:
    """Read tokenizer.json, or vocab.json and merges.txt if there is no tokenizer.json.

    Args:
        path: The folder of the files, or one of them.
        build: Makes a tokenizer of the path of a vocab.json or merges.txt.

    Returns:
        A file that the tokenizer comes from, and the tokenizer.

    Raises:
        UserError: The files are missing or broken.
    """
    if path.is_dir():
        json_path = path / "tokenizer.json"
        if not json_path.is_file() and not (path / "vocab.json").is_file():
            raise UserError(f"{path}: has no tokenizer.json, nor vocab.json and merges.txt, for the prompts")
        path = json_path if json_path.is_file() else path / "vocab.json"
    return path, build(path) if VOCAB_OR_MERGES_NAME.fullmatch(path.name) else read_tokenizer_json(path)


def import_optional(name: str) -> ModuleType:
    """Import a library that only the tokenizers of public checkpoints need.

    Raises:
        UserError: It is not installed. The error says how to get it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this model's text needs the library {name}: pip install 'dm-generations[checkpoints]'"
        ) from error


@contextlib.contextmanager
def wrap_library_errors(path: Path, problem: str) -> Iterator[None]:
    """Turn whatever the `tokenizers` library makes of a bad file into "path: problem (its words)"."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises the bare Exception, and its panics are not even that
        raise UserError(f"{path}: {problem} ({one_line(error)})") from error


def _check_memory(document: Any, path: Path) -> None:
    """Refuse a tokenizer.json that would end the process: the library takes any memory that a file asks for.

    Raises:
        UserError: It has more than MAX_STEPS steps, a text may grow more than MAX_GROWTH times, or a character map is
            said to be larger than it is.
    """
    growth, count = 1, 0
    pending = [document.get(part) for part in _PARTS] if isinstance(document, dict) else []
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            count += 1
            growth *= _growth(step, path)
            lists = (step.get(name) for name in _NESTED)
            pending += [nested for steps in lists if isinstance(steps, list) for nested in steps]
        if growth > MAX_GROWTH or count > MAX_STEPS:
            raise UserError(
                f"{path}: can make a text more than {MAX_GROWTH:,} times longer, or has more than {MAX_STEPS} steps: "
                "not a tokenizer's file"
            )


def _growth(step: dict[str, Any], path: Path) -> int:
    """Return how many times longer a step of a pipeline can make a text, and 1 or more."""
    pattern, content, added = step.get("pattern"), step.get("content"), step.get("prepend")
    if isinstance(pattern, dict) and isinstance(content, str):
        text = pattern.get("String")
        if isinstance(text, str) and text:
            return max(1, -(-_byte_count(content) // _byte_count(text)))
        return 1 + _byte_count(content)  # a regular expression may match between any two characters
    if isinstance(added, str):
        return 1 + _byte_count(added)
    if step.get("type") == "ByteLevel":  # it writes bytes as characters of two bytes
        return 2
    if isinstance(encoded := step.get("precompiled_charsmap"), str):
        with contextlib.suppress(ValueError):  # the library says what is wrong
            charsmap = base64.b64decode(encoded)
            trie = int.from_bytes(charsmap[:4], "little")
            if trie > len(charsmap):
                raise UserError(f"{path}: damaged, its precompiled_charsmap is cut off")
            return max(1, *map(len, charsmap[4 + trie :].split(b"\0")))
    specials, template = step.get("special_tokens"), step.get("single")
    if isinstance(specials, dict) and isinstance(template, list):
        ids = (token.get("ids") for token in specials.values() if isinstance(token, dict))
        return 1 + len(template) * max((len(each) for each in ids if isinstance(each, list)), default=0)
    return 1


def _byte_count(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quote(value: object) -> str:
    quoted = ascii(value) if isinstance(value, str | int) else type(value).__name__
    return quoted if len(quoted) <= 40 else quoted[:40] + "..."


class PromptTokenizer:
    """Gives `<bos> text <eos> <pad> ...` of a fixed length, for BART's and CLIP's tokenizers.

    bos and eos are what the file puts around an empty text. pad is its padding's id, else that of `<pad>`, else eos
    (as CLIP pads). The ids in a DALL-E mini config.json are NOT these: they belong to the image tokens. A text that
    spells a special token ("</s>") gives that token if the file lists it as an added token, as in transformers.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pipeline: tokenizers.Tokenizer | None = None,
        normalize: Callable[[str], str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Set up a tokenizer.

        Args:
            folder: Has the tokenizer.json. With `pipeline`, the file or folder that it was made from.
            pipeline: A ready tokenizer of the library. Its padding and truncation are switched off.
            normalize: Applied to every text first, but not to the unconditional prompt (None).
            vocab_size: Rows of the model's text embedding. None leaves ids unchecked.

        Raises:
            UserError: The file is missing or broken, or has no start and end token.
        """
        self.path = Path(folder)
        if pipeline is None:
            self.path = self.path / "tokenizer.json"
            pipeline = read_tokenizer_json(self.path)
        self._pipeline = pipeline
        self._normalize = normalize
        padding = pipeline.padding or {}
        pipeline.no_padding()
        pipeline.no_truncation()

        with wrap_library_errors(self.path, "cannot tokenize"):
            ends = pipeline.encode("").ids
        if len(ends) != 2:
            raise UserError(f"{self.path}: puts {len(ends)} tokens around a text, expected a start and an end")
        self.unknown_ids = find_unknown_ids(pipeline)
        self.bos_id: int = ends[0]
        self.eos_id: int = ends[1]
        pad_id: int | None = padding.get("pad_id", pipeline.token_to_id("<pad>"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size = vocab_size
        if vocab_size is not None and max(self.bos_id, self.eos_id, self.pad_id) >= vocab_size:
            raise UserError(
                f"{self.path}: special ids {self.bos_id}, {self.eos_id}, {self.pad_id} are not all below "
                f"{vocab_size}, the number of tokens of the model"
            )

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode prompts. A longer text loses its tail; the end token stays last.

        Args:
            texts: B prompts. None is the model's own unconditional prompt: the empty text, not normalized.
            length: L, at least 2.

        Returns:
            input_ids and attention_mask (1 up to the end token, then 0), both int32 (B, L).

        Raises:
            UserError: A text has a token that the model lacks.
            ValueError: The length leaves no room for the start and the end token.
        """
        if length < 2:
            raise ValueError(f"length (={length}) must leave room for the start and the end token")
        ids = [[self.bos_id, *inner, self.eos_id] for inner in self._encode_inner(texts, length)]
        return pad_ids(ids, length, self.pad_id, self.vocab_size, self.path)

    def find_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, None if there is none."""
        return self._pipeline.token_to_id(token)

    def round_trip(self, text: str, length: int) -> str:
        """Encode a text and decode its ids, without special tokens.

        CLIP's text comes back in lower case, for instance, and cut where `encode` cuts it.
        """
        (ids,) = self._encode_inner([text], length)
        with wrap_library_errors(self.path, "cannot turn tokens into text"):
            decoded: str = self._pipeline.decode(ids, skip_special_tokens=True)
        suffix: str | None = getattr(self._pipeline.model, "end_of_word_suffix", None)
        # CLIP marks where a word ends ("cat</w>"); transformers turns the marks into spaces the same way.
        return decoded.replace(suffix, " ").strip() if suffix else decoded

    def _encode_inner(self, texts: Sequence[str | None], length: int) -> list[list[int]]:
        """Encode each text without start and end token, as at most length - 2 ids."""
        normalize = self._normalize or (lambda text: text)
        normalized = ["" if text is None else normalize(replace_surrogates(text)) for text in texts]
        return [ids[: length - 2] for ids in encode_texts(self._pipeline, normalized, self.path)]


def find_unknown_ids(pipeline: tokenizers.Tokenizer) -> set[int]:
    """Return the ids that stand for parts of unknown characters: the single bytes, of byte-level BPE, beyond ASCII."""
    vocab = pipeline.get_vocab()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not vocab.keys() >= set(alphabet):
        return set()
    # The characters that stand for bytes: ASCII for itself, spaces and all others for what is beyond.
    names = [name + end for name in alphabet if not name.isascii() for end in ("", "</w>")]
    return {vocab[name] for name in names if name in vocab}


def encode_texts(
    pipeline: tokenizers.Tokenizer, texts: Sequence[str] | Sequence[list[str]], path: Path, *, is_split: bool = False
) -> list[list[int]]:
    """Encode texts without putting special tokens around them.

    Args:
        pipeline: A tokenizer of the library.
        texts: Texts without lone surrogates. With `is_split`, the words of each.
        path: The tokenizer's file, for the error.
        is_split: The texts are split into words already.

    Raises:
        UserError: The tokenizer's file cannot serve.
    """
    with wrap_library_errors(path, "cannot tokenize"):
        encodings = pipeline.encode_batch(list(texts), is_pretokenized=is_split, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def pad_ids(
    ids: Sequence[Sequence[int]], length: int, pad_id: int, vocab_size: int | None, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Cut and pad token ids to one length.

    Args:
        ids: The ids of B prompts.
        length: L, the number of tokens per prompt.
        pad_id: The id that fills up shorter prompts.
        vocab_size: Rows of the model's text embedding. None leaves ids unchecked.
        path: The tokenizer's file, for the error.

    Returns:
        input_ids and attention_mask (1 where there are ids, then 0), both int32 (B, L).

    Raises:
        UserError: An id is not below vocab_size.
    """
    limit = MAX_ID + 1 if vocab_size is None else vocab_size
    highest = max(pad_id, *(max(row[:length], default=0) for row in ids)) if ids else pad_id
    if highest >= limit:
        raise UserError(
            f"{path}: gives the token id {highest:,}, the model has only {limit:,} tokens: "
            "this is not the tokenizer it was trained with"
        )
    input_ids = np.full((len(ids), length), pad_id, np.int32)
    attention_mask = np.zeros((len(ids), length), np.int32)
    for index, row in enumerate(ids):
        row = row[:length]
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask


def replace_surrogates(text: str) -> str:
    """Replace every lone surrogate with U+FFFD and join pairs of them; other characters stay.

    Such strings come from broken archives and argument lists, and have no UTF-8 form to tokenize.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
