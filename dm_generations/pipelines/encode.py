"""Put images with captions into an archive, as the tokens of a codec, for `train` and all that reads archives.

A row's key is the start of the SHA-256 of the image's file. So a file that is encoded already is known by its content,
and a run that was stopped goes on where it was.

S: pixels a side of the codec's images   L: tokens of an image
"""

import contextlib
import csv
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dm_generations.archive import Archive, GroupKey, NewImage, Selection
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.archive.selection import compile_selection
from dm_generations.errors import UserError, one_line, short_repr
from dm_generations.inference.encoder import Encoder
from dm_generations.models.loading import Checkpoint
from dm_generations.models.tokenization import replace_surrogates
from dm_generations.pipelines.embed import IMAGE_SUFFIXES, list_images
from dm_generations.pipelines.init_tokens import read_image
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.sampling.params import SamplingParams
from dm_generations.weights import tar

PATH_NAMES: Final = ("path", "file_name", "file", "image")  # of a column or key, the first that is there
CAPTION_NAMES: Final = ("caption", "text", "prompt")
MAX_FILE_BYTES: Final = 256 << 20
_LIST_SUFFIXES: Final = (".jsonl", ".csv")
_MAX_CAPTION: Final = 100_000  # characters
_MAX_LINE: Final = 1 << 20  # characters of a list, or bytes of a text in a tar
_LOG_EVERY: Final = 1000  # images
_TABLE_ROWS: Final = 256  # of a Parquet file, read at a time

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """An image file with its caption."""

    name: Path  # for messages
    caption: str | None
    read: Callable[[], bytes]


class Columns(NamedTuple):
    """Names of the columns of a table, or keys of JSON lines; None is one of the usual names."""

    image: str | None = None
    caption: str | None = None


@dataclass
class EncodeReport:
    """What was encoded, in images.

    Attributes:
        added_count: Added to the archive.
        existing_count: Skipped, because the archive had them before.
        problems: A line for each image that was left out.
    """

    added_count: int = 0
    existing_count: int = 0
    problems: list[str] = field(default_factory=list)


@memory_errors("use a smaller --batch-size")
def encode_images(
    source: Path,
    db: Path,
    codec: Checkpoint,
    batch_size: int,
    columns: Columns,
) -> EncodeReport:
    """Encode images and add them to an archive, each batch in a transaction.

    Args:
        source: A folder of images with a `.txt` of the same name beside each; a `.jsonl` or `.csv` of paths and
            captions; a WebDataset's `.tar`; a `.parquet` of the Hugging Face hub.
        db: The archive; made if there is none.
        codec: It has an encoder.
        batch_size: Images at a time.
        columns: Of a `.jsonl`, `.csv` or `.parquet`.

    Raises:
        UserError: The source cannot be read as a whole, or the archive has images of another codec.
    """
    items = open_source(source, columns)
    encoder, report = Encoder(codec), EncodeReport()
    compile_cache.enable()
    with Archive.open_or_create(db) as archive:
        store = _Store(archive, codec, encoder, batch_size)
        for done, item in enumerate(items, start=1):
            try:
                report.existing_count += store.add(item)
            except UserError as error:
                report.problems.append(str(error))
            if store.is_full:
                report.added_count += store.flush()
            if done % _LOG_EVERY == 0:
                logger.info("%s images so far", f"{done:,}")
        report.added_count += store.flush()
        report.existing_count += store.repeated_count
    return report


class _Store:
    """Images on their way into an archive: read, encoded in batches of one size, and stored."""

    def __init__(self, archive: Archive, codec: Checkpoint, encoder: Encoder, batch_size: int):
        self._archive, self._codec, self._encoder, self._batch_size = archive, codec, encoder, batch_size
        info = codec.model_info()
        for model in archive.models().values():
            if model.kind != "codec" or model.matches(info):
                continue
            if archive.count(compile_selection(archive, Selection.of(codec=model.sha256))):
                raise UserError(
                    f"{archive.path} holds images of codec {model.name!r:.100}, not of {codec.name!r}: use another --db"
                )
        self._prompt_ids = {text: row_id for row_id, text in archive.prompts().items()}
        self._pending: list[tuple[np.ndarray, str, tuple[int, int]]] = []
        self.repeated_count = 0

    @property
    def is_full(self) -> bool:
        return len(self._pending) == self._batch_size

    def add(self, item: Item) -> bool:
        """Read an image; returns whether the archive has it already. Raises UserError for one that cannot be used."""
        caption = (item.caption or "").strip()
        if not caption or "\x00" in caption or len(caption) > _MAX_CAPTION:
            raise UserError(f"{str(item.name)!r} has no caption, or one of more than {_MAX_CAPTION:,} characters")
        if replace_surrogates(caption) != caption:
            raise UserError(f"{str(item.name)!r} has a caption that is not valid Unicode; give it another")
        content = item.read()
        digest = hashlib.sha256(content).digest()
        key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
        prompt_id = self._prompt_ids.get(caption)
        if prompt_id is not None:
            group = GroupKey(prompt_id, 1, SamplingParams())
            if key in self._archive.existing_keys(group, None):
                return True
        size = self._codec.config.image_size
        self._pending.append((read_image(item.name, size, content=content), caption, key))
        return False

    def flush(self) -> int:
        """Encode and store what is pending; returns how many images were new."""
        if not self._pending:
            return 0
        count, time_start = len(self._pending), time.time()
        pixels = np.stack([pixels for pixels, _, _ in self._pending])
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], self._batch_size - count, axis=0)])
        tokens = self._encoder.encode(padded)[:count]
        time_end = time.time()
        images = [
            NewImage(
                caption,
                None,
                SamplingParams(),
                *key,
                quantvec=row.astype(TOKEN_DTYPE).tobytes(),
                time_start=time_start,
                time_end=time_end,
            )
            for row, (_, caption, key) in zip(tokens, self._pending, strict=True)
        ]
        with self._archive.transaction():
            codec_id = self._archive.add_model(self._codec.model_info())
            added = self._archive.add_images(images, None, codec_id, None, None)
        self.repeated_count += count - added
        self._pending.clear()
        return added


def open_source(source: Path, columns: Columns) -> Iterator[Item]:
    """Return the images of a source, in order; see `encode_images`.

    Raises:
        UserError: It cannot be read as a whole.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        return map(_beside_text, list_images(source))
    if not source.is_file():
        raise UserError(f"{str(source)!r}: no such file or folder")
    if suffix in _LIST_SUFFIXES:
        return _read_list(source, columns)
    if suffix == ".tar":
        return _read_tar(source)
    if suffix == ".parquet":
        return _read_parquet(source, columns)
    raise UserError(f"{str(source)!r} is no folder of images, .jsonl, .csv, .tar or .parquet")


def _beside_text(path: Path) -> Item:
    text, caption = path.with_suffix(".txt"), None
    with contextlib.suppress(OSError, ValueError, UserError):
        # A link may lead to where the image is, if that is one too: not to any file, whose text others would read.
        if text.resolve() in (text.parent.resolve() / text.name, path.resolve().with_suffix(".txt")):
            caption = _read_file(text)[: 4 * _MAX_CAPTION + 4].decode("utf-8-sig")
    return Item(path, caption, lambda: _read_file(path))


def _read_list(source: Path, columns: Columns) -> Iterator[Item]:
    """Yield the images that a list names; their paths are relative to it, and stay in its folder."""
    folder = source.parent.resolve()
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            lines = iter(lambda: file.readline(_MAX_LINE), "")
            rows: Iterable[Any] = csv.DictReader(lines) if source.suffix.lower() == ".csv" else map(json.loads, lines)
            for number, row in enumerate(rows, start=1):
                if not isinstance(row, dict):
                    raise UserError(f"{source}: line {number} is {short_repr(row)}, not an object")
                name = _value(row, columns.image, PATH_NAMES, f"{source}: line {number}")
                caption = _value(row, columns.caption, CAPTION_NAMES, f"{source}: line {number}")
                path = folder / name
                if not path.resolve().is_relative_to(folder):
                    raise UserError(f"{source}: line {number} names {name!r:.100}, outside its folder; move the list")
                yield Item(path, caption, functools.partial(_read_file, path))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"cannot read {source}: {one_line(error)}") from error


def _value(row: dict[str, Any], name: str | None, usual: tuple[str, ...], where: str) -> str:
    found = next((each for each in ([name] if name else usual) if each in row), None)
    if found is None or not isinstance(row[found], str):
        wanted = repr(name) if name else " or ".join(usual)
        raise UserError(f"{where} has no text {wanted}; name the columns with --columns IMAGE CAPTION")
    return row[found]


def _read_tar(source: Path) -> Iterator[Item]:
    """Yield the images of a WebDataset: files of one name up to its first dot, one after the other."""
    try:
        with open(source, "rb") as file:
            key, image, caption = "", None, None
            for archive, member in tar.iterate(file):
                stem, _, ending = os.path.basename(member.name).partition(".")
                name = f"{os.path.dirname(member.name)}/{stem}"
                if name != key:
                    if image is not None:
                        yield _item_of(source, image, caption)
                    key, image, caption = name, None, None
                is_image = f".{ending}".lower() in IMAGE_SUFFIXES
                if is_image and member.isfile() and member.size <= MAX_FILE_BYTES:
                    image = member.name, archive.extractfile(member).read()  # type: ignore[union-attr]
                elif ending in ("txt", "json") and member.isfile() and member.size <= _MAX_LINE:
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    caption = _caption_of(content, ending) or caption
            if image is not None:
                yield _item_of(source, image, caption)
    except (OSError, *tar.DAMAGED) as error:
        raise UserError(f"cannot read {source}: {one_line(error)}") from error


def _item_of(source: Path, image: tuple[str, bytes], caption: str | None) -> Item:
    return Item(source / image[0].lstrip("/"), caption, lambda: image[1])


def _caption_of(content: bytes, ending: str) -> str | None:
    try:
        text = content.decode("utf-8-sig")
        values = {"caption": text} if ending == "txt" else json.loads(text)
        return next((values[name] for name in CAPTION_NAMES if isinstance(values.get(name), str)), None)
    except (ValueError, AttributeError, RecursionError):
        return None


def _read_parquet(source: Path, columns: Columns) -> Iterator[Item]:
    """Yield the images of a Parquet file: bytes, or a struct with `bytes` as on the Hugging Face hub."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'dm-generations[tables]'") from error
    try:
        with parquet.ParquetFile(source) as file:
            names = set(file.schema_arrow.names)
            image = columns.image or next((name for name in PATH_NAMES[::-1] if name in names), "image")
            caption = columns.caption or next((name for name in CAPTION_NAMES if name in names), "caption")
            if missing := sorted({image, caption} - names):
                raise UserError(
                    f"{source} has no column {missing[0]!r}; name its columns with --columns IMAGE CAPTION, of "
                    f"{', '.join(sorted(names))}"
                )
            number = 0
            for batch in file.iter_batches(_TABLE_ROWS, columns=[image, caption]):
                for row in batch.to_pylist():
                    number += 1
                    value = row[image].get("bytes") if isinstance(row[image], dict) else row[image]
                    content = value if isinstance(value, bytes) else b""
                    text = row[caption][0] if isinstance(row[caption], list) and row[caption] else row[caption]
                    text = text if isinstance(text, str) else None
                    yield Item(source / f"row {number}", text, functools.partial(bytes, content))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {source}: {one_line(error)}") from error


def _read_file(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{str(path)!r} has more than {MAX_FILE_BYTES >> 20} MiB; make it smaller first")
    return content
