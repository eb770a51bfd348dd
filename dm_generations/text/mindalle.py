"""minDALL-E's tokenizer: byte pairs of characters, where the end of a word is part of its last piece.

Rules after `build_tokenizer` of minDALL-E (https://github.com/kakaobrain/minDALL-E), which is the library's
CharBPETokenizer in lower case. It puts no tokens around a text, and its pads are attended to.
"""

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from dm_generations.errors import UserError, one_line
from dm_generations.text.byte_level import byte_pairs
from dm_generations.text.files import MAX_BYTES, parse_merges, parse_vocab, read_bytes, special_id
from dm_generations.text.rows import padded_rows
from dm_generations.text.tokenizer import plain_ids, well_formed

VOCAB, MERGES = "bpe-16k-vocab.json", "bpe-16k-merges.txt"
PAD, UNKNOWN = "[PAD]", "[UNK]"


class MinDalleETokenizer:
    """path: the tokenizer's folder, the folder that holds it, one of its files, or a .tar.gz of it.

    vocab_size: rows of the model's text table. Raises UserError for files that are missing or broken, and for ids
    that the model lacks.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.path, vocab_data, merges_data = _read_pair(path)
        vocab = parse_vocab(vocab_data, self.path / VOCAB)
        merges = parse_merges(merges_data, self.path / MERGES, vocab)
        special_id(vocab, UNKNOWN, self.path / VOCAB)
        self._tokenizer = Tokenizer(byte_pairs(self.path, vocab, merges, unk_token=UNKNOWN, end_of_word_suffix="</w>"))
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]  # this order keeps the accents
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.add_special_tokens([UNKNOWN, PAD])  # a vocabulary without a pad gets one at its end
        self.pad_id = self._tokenizer.token_to_id(PAD)
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str | None], length: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, attention_mask (1 where there is text, then 0), both int32 (B, L) with L = length.

        None, like the empty text, is pads alone.
        """
        ids = plain_ids(self._tokenizer, [well_formed(text or "") for text in texts], self.path)
        return padded_rows(ids, length, self.pad_id, self.vocab_size, self.path)


def _read_pair(path: Path) -> tuple[Path, bytes, bytes]:
    """Where the two files were found, the vocabulary's bytes, the merges' bytes."""
    if path.name in (VOCAB, MERGES):
        path = path.parent
    places = (path, path / "tokenizer", path / "tokenizer.tar.gz")
    path = next((place for place in places if place.is_file() or (place / VOCAB).is_file()), path)
    if path.is_file():
        files = _unpacked(path)
        return path, files[VOCAB], files[MERGES]
    return path, read_bytes(path / VOCAB), read_bytes(path / MERGES)


class _Bounded:
    """A stream that ends in a UserError after MAX_BYTES: compressed, a terabyte of zeros is a small file."""

    def __init__(self, stream: BinaryIO, path: Path):
        self._stream = stream
        self._path = path
        self._left = MAX_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"{self._path}: unpacks to more than {MAX_BYTES >> 20} MiB; give the unpacked folder")
        return data


def _unpacked(path: Path) -> dict[str, bytes]:
    """The two files of a .tar.gz, in memory. UserError for an archive with anything but plain files and folders."""
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file, gzip.GzipFile(fileobj=file) as stream:
            with tarfile.open(fileobj=_Bounded(stream, path), mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise UserError(f"{path}: holds {ascii(member.name)[:100]}, a path out of its folder")
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{path}: holds {ascii(member.name)[:100]}, which is no plain file")
                    if name.name in found:
                        raise UserError(f"{path}: holds {name.name} twice")
                    if name.name in (VOCAB, MERGES):
                        found[name.name] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a .tar.gz of a tokenizer ({one_line(error)})") from error
    for name in (VOCAB, MERGES):
        if name not in found:
            raise UserError(f"{path}: holds no {name}")
    return found
