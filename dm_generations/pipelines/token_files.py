"""Files of others that hold tokens, as tables: JSON lines, WebDataset, NumPy arrays and safetensors.

    .jsonl              an object a line with `tokens`, a list of whole numbers, flat or in rows, and what else is known
                        by the names of COLUMNS
    .tar                WebDataset: for each sample KEY.json, such an object, and KEY.txt, the prompt, if there is one
    .npy, .safetensors  arrays of whole numbers, of one image or of many, one after the other
    a folder of .npy    an image each

Arrays have their prompts in a CSV file of labels, which has a line of names: `prompt`, and others of COLUMNS. For a
folder `file_name` says whose they are; else line after line is the labels of image after image.

What is not known has the value of a setting that is off. All tokens are checked against the codec.

L: tokens of an image
"""

import array
import csv
import itertools
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from dm_generations.archive import ArchiveError, ModelInfo
from dm_generations.archive.records import (
    TOKEN_DTYPE,
    check_tokens,
    count_tokens,
    format_shape,
    model_values,
)
from dm_generations.archive.schema import SCHEMA_VERSION
from dm_generations.archive.tables import NEEDED_COLUMNS, Table
from dm_generations.errors import UserError, one_line, short_repr
from dm_generations.weights import tar
from dm_generations.weights.native import read_safetensors

SUFFIXES: Final = (".jsonl", ".tar", ".npy", ".safetensors")
_CODEC_ID: Final = 1
_MAX_BYTES: Final = 1 << 26  # of one object of JSON
_END: Final = bytes(2 * tarfile.BLOCKSIZE)  # of a tar file
# What a file may say of an image, with what it is otherwise.
_DEFAULTS: Final[Mapping[str, Any]] = {
    **{"prompt": "", "sc_prompt": None, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "cond_scale": 1.0},
    **{"extra_settings": "", "key0": 0, "key1": 0, "clip_score_input": None, "clip_score_tokenized": None},
    **{"log_prob": None, "dtype": None, "init_count": 0, "time_start": None, "time_end": None, "time_scored": None},
    "quantvec_md5": None,
}
COLUMNS: Final = ("tokens", *_DEFAULTS, "codec_sha256")
_TYPES: Final[Mapping[str, type]] = {
    **dict.fromkeys(("top_k", "key0", "key1", "init_count"), int),
    **dict.fromkeys(("prompt", "sc_prompt", "extra_settings", "dtype", "quantvec_md5"), str),
}  # others are float

Record = Mapping[str, Any]


class TokenFiles:
    """Reads such files."""

    def __init__(self, codec: str | None, labels: "Labels | None" = None):
        """Take a codec, which is loaded when it is needed, and labels."""
        self._codec_path, self._labels = codec, labels

    @cached_property
    def _codec(self) -> ModelInfo:
        from dm_generations.models.loading import load_checkpoint  # JAX takes seconds, which Parquet of our own saves

        return load_checkpoint(self._codec_path, "codec").model_info()

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of a set of these tables."""
        kind, sha256, config, name, codebook_size, token_shape, image_shape = model_values(self._codec)
        model = {"id": _CODEC_ID, "kind": kind, "name": name, "sha256": sha256, "config": config}
        model |= {"token_shape": token_shape, "codebook_size": codebook_size, "image_shape": image_shape}
        return {"version": SCHEMA_VERSION, "models": [model], "vocabularies": {}}

    def read(self, path: Path, row_count: int) -> Iterator[Table]:
        """Yield the tables of a file, or of a folder of `.npy` files.

        Raises:
            UserError: It is damaged, cut short, or holds something else.
        """
        if path.is_dir() or path.suffix in (".npy", ".safetensors"):
            records = self._read_arrays(path)
        elif self._labels is not None:
            raise UserError(f"{path}: --labels has no effect here: prompts are in the file; leave it out")
        else:
            records = _read_json_lines(path) if path.suffix == ".jsonl" else _read_samples(path)
        return self.to_tables(path, records, row_count)

    def to_tables(self, path: Path, records: Iterable[Record], row_count: int) -> Iterator[Table]:
        """Yield tables of records, which have names of COLUMNS; others are left out.

        Raises:
            UserError: A value is wrong.
        """
        rows = (self._to_row(path, number, record) for number, record in enumerate(records, 1))
        while chunk := list(itertools.islice(rows, row_count)):
            columns = dict(zip(("tokens", *_DEFAULTS), zip(*chunk, strict=True), strict=True))
            table: dict[str, Sequence[Any]] = dict.fromkeys(NEEDED_COLUMNS, (None,) * len(chunk))
            yield {**table, **columns, "codec_id": (_CODEC_ID,) * len(chunk)}

    def _to_row(self, path: Path, number: int, record: Record) -> tuple[Any, ...]:
        try:
            self._check_codec(record)
            blob = _to_blob(record.get("tokens"))
            check_tokens(blob, self._codec)
            return blob, *(_convert(name, record.get(name), default) for name, default in _DEFAULTS.items())
        except ArchiveError as error:
            raise UserError(f"{path}: row {number:,}: {error}") from error

    def _check_codec(self, record: Record) -> None:
        """Check that a record that names its codec, as our own files do, names this one."""
        named = record.get("codec")
        digest = record.get("codec_sha256") or (named.get("sha256") if isinstance(named, dict) else None)
        if digest not in (None, self._codec.sha256):
            raise ArchiveError(
                f"its codec has SHA-256 {short_repr(digest)}, codec {self._codec.name!r:.100} another; "
                "name the right one by --codec"
            )

    def _read_arrays(self, path: Path) -> Iterator[Record]:
        assert self._codec.token_shape is not None, "of a codec"
        token_count = count_tokens(self._codec.token_shape)
        if path.is_dir():
            for file in sorted(path.rglob("*.npy")):
                tokens = read_npy(file)
                if tokens.size != token_count:
                    raise self._wrong_shape(file, tokens)
                name = file.relative_to(path).as_posix()
                yield {**(self._labels.named(name) if self._labels else {}), "tokens": tokens}
            return
        arrays = [read_npy(path)] if path.suffix == ".npy" else read_safetensors(path).values()
        for tokens in arrays:
            if not tokens.size or tokens.size % token_count:
                raise self._wrong_shape(path, tokens)
            for row in tokens.reshape(-1, token_count):
                yield {**(self._labels.next() if self._labels else {}), "tokens": row}

    def _wrong_shape(self, path: Path, tokens: np.ndarray) -> UserError:
        assert self._codec.token_shape is not None, "of a codec"
        return UserError(
            f"{path}: its array has shape {tokens.shape}, codec {self._codec.name!r:.100} takes "
            f"{format_shape(self._codec.token_shape)} tokens an image; name another by --codec"
        )


class Labels:
    """A CSV file of labels of images."""

    def __init__(self, path: Path):
        """Read it.

        Raises:
            UserError: It is missing, not CSV in UTF-8, or lacks the column `prompt`.
        """
        self._path = path
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                self._rows = [{str(name): text for name, text in row.items()} for row in reader]
                names = reader.fieldnames or ()
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read as CSV: {one_line(error)}") from error
        if "prompt" not in names:
            raise UserError(f"{path}: its first line has no name prompt; it has {', '.join(names):.200}")
        self._by_name = {row.get("file_name"): row for row in self._rows}
        self._used_count = 0

    def named(self, name: str) -> Record:
        """Return the labels of a file. Raises UserError if there are none."""
        if name not in self._by_name:
            raise UserError(f"{self._path}: there is no row with file_name {name!r:.200}")
        self._used_count += 1
        return cast(Record, self._by_name[name])

    def next(self) -> Record:
        """Return the labels of the next image. Raises UserError if there are no more."""
        if self._used_count == len(self._rows):
            raise UserError(f"{self._path}: there are more images than its {len(self._rows):,} rows")
        self._used_count += 1
        return cast(Record, self._rows[self._used_count - 1])

    def check_all_used(self) -> None:
        """Check that each row was of an image. Raises UserError."""
        if self._used_count != len(self._rows):
            raise UserError(f"{self._path}: it has {len(self._rows):,} rows, there are {self._used_count:,} images")


def _convert(name: str, value: Any, default: Any) -> Any:
    """Return a value of a file, which in CSV is a text, in the type of its column.

    Raises:
        ArchiveError: It is something else.
    """
    kind = _TYPES.get(name, float)
    if value is None or (value == "" and kind is not str):
        return default
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is not str and isinstance(value, str | int | float) and not isinstance(value, bool):
            number = float(value) if kind is float else int(value)
            if kind is float or isinstance(value, str) or number == value:
                return number
    except (ValueError, OverflowError):
        pass
    what = {str: "a text", int: "a whole number", float: "a number"}[kind]
    raise ArchiveError(f"{name} is {short_repr(value)}, not {what}")


def _to_blob(tokens: Any) -> bytes:
    """Return tokens as an archive stores them: an array, or a list, flat or of rows.

    Raises:
        ArchiveError: They are not whole numbers from 0 to 65,535.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iu" or (tokens.size and (tokens.min() < 0 or tokens.max() > 0xFFFF)):
            raise ArchiveError(f"its tokens, {tokens.dtype}, are not whole numbers from 0 to 65,535")
        return tokens.astype(TOKEN_DTYPE).tobytes()
    if not isinstance(tokens, list) or not tokens:
        raise ArchiveError(f"tokens is {short_repr(tokens)}, not a list of whole numbers")
    if isinstance(tokens[0], list):
        tokens = [token for row in tokens if isinstance(row, list) for token in row]
    try:
        words = array.array("H", tokens)
    except (TypeError, OverflowError):
        raise ArchiveError("its tokens are not whole numbers from 0 to 65,535") from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def read_npy(file: Path) -> np.ndarray:
    """Return the array of a `.npy` file, mapped.

    Raises:
        UserError: It is damaged, or something else.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: its size is compared with the header
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged or not an array of NumPy: {one_line(error)}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file}: not an array of NumPy")
    return array


def _read_json_lines(path: Path) -> Iterator[Record]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_BYTES), b""), 1):
                if line.strip():
                    yield _parse(line, f"{path}: line {number:,}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text) if len(text) < _MAX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON, or cut short: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not an object of JSON of less than {_MAX_BYTES >> 20} MiB")
    return record


def _read_samples(path: Path) -> Iterator[Record]:
    """Yield the samples of a WebDataset shard. Members of one have the same name up to its first dot."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_END)))
            if file.read() != _END:
                raise UserError(f"{path}: this tar file is cut short, compressed or something else")
            file.seek(0)
            members = (
                (_sample_key(member.name), shard, member) for shard, member in tar.iterate(file) if member.isreg()
            )
            for key, group in itertools.groupby(members, lambda item: item[0]):
                parts = {member.name.rpartition(".")[2]: _read_member(shard, member) for _, shard, member in group}
                yield _to_record(parts, f"{path}: sample {key!r:.200}")
    except (OSError, *tar.DAMAGED) as error:
        raise UserError(f"{path}: damaged or not a tar file: {one_line(error)}") from error


def _sample_key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _read_member(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.name.endswith((".json", ".txt")):
        return b""
    if member.size >= _MAX_BYTES:
        raise UserError(f"{member.name!r:.200} in a tar file has {member.size:,} bytes, too many")
    return tar.read_member(shard, member)


def _to_record(parts: Mapping[str, bytes], where: str) -> Record:
    if "json" not in parts:
        raise UserError(f"{where} has no .json with its tokens")
    record = _parse(parts["json"], where)
    if "prompt" not in record and "txt" in parts:
        record["prompt"] = parts["txt"].decode("utf-8", "replace")
    return record
