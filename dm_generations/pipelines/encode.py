"""Put images with captions into an archive, as the tokens of a codec, for `train` and all that reads archives.

A row's key is the start of the SHA-256 of the image's file. So a file that is encoded already is known by its content,
and a run that was stopped goes on where it was.

S: pixels a side of the codec's images   L: tokens of an image
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from dm_generations.archive import Archive, GroupKey, NewImage, Selection
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.archive.selection import compile_selection
from dm_generations.errors import UserError, one_line, short_repr
from dm_generations.inference.encoder import Encoder, check_encoder
from dm_generations.models.loading import Checkpoint
from dm_generations.models.tokenization import replace_surrogates
from dm_generations.pipelines.embed import IMAGE_SUFFIXES, list_images
from dm_generations.pipelines.generate import SMALLER_BATCH
from dm_generations.pipelines.init_tokens import read_image
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.sampling.params import SamplingParams
from dm_generations.weights import tar

if TYPE_CHECKING:
    from dm_generations.runtime.ray_pool import RayPool

PATH_NAMES: Final = ("path", "file_name", "file", "image")  # of a column or key, the first that is there
CAPTION_NAMES: Final = ("caption", "text", "prompt")
MAX_FILE_BYTES: Final = 256 << 20
_BATCH_BYTES: Final = 64 << 20  # of files that are encoded at a time, not many more
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


class _File(NamedTuple):
    """An image file that is to be encoded."""

    name: Path  # for messages
    content: bytes
    caption: str
    key: tuple[int, int]


# Names and contents of image files.
_Work = list[tuple[Path, bytes]]
# Of each its tokens as an archive has them, or what is wrong with it; when that began and ended, in seconds since 1970.
_Encoded = tuple[list[Any], float, float]


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


def encode_images(
    source: Path,
    db: Path,
    codec: Checkpoint,
    batch_size: int,
    columns: Columns,
    pool: "RayPool | None" = None,
) -> EncodeReport:
    """Encode images and add them to an archive, each batch in a transaction.

    Args:
        source: A folder of images with a `.txt` of the same name beside each; a `.jsonl` or `.csv` of paths and
            captions; a WebDataset's `.tar`; a `.parquet` of the Hugging Face hub.
        db: The archive; made if there is none.
        codec: It has an encoder.
        batch_size: Images at a time.
        columns: Of a `.jsonl`, `.csv` or `.parquet`.
        pool: What decodes image files and encodes; None is this process. Files are read, and the archive is written,
            here in any case.

    Raises:
        UserError: The source cannot be read as a whole, or the archive has images of another codec.
    """
    items = open_source(source, columns)
    check_encoder(codec)
    report = EncodeReport()
    with Archive.open_or_create(db) as archive:
        store = _Store(archive, codec, report)
        batches, sent = itertools.tee(store.batches(items, batch_size))
        work = ([(file.name, file.content) for file in batch] for batch in sent)
        make = functools.partial(_make_encoder, codec, batch_size)
        results = map(make(), work) if pool is None else pool.map(make, work)
        for encoded, batch in zip(results, batches, strict=False):
            store.add(batch, encoded)
    return report


def _make_encoder(codec: Checkpoint, batch_size: int) -> Callable[[_Work], _Encoded]:
    """Return what encodes up to `batch_size` image files, with the codec on the devices of this process."""
    compile_cache.enable()
    size = codec.config.image_size
    with memory_errors(SMALLER_BATCH):
        encoder = Encoder(codec)

    @memory_errors(SMALLER_BATCH)
    def encode(work: _Work) -> _Encoded:
        time_start = time.time()
        read = [_read_pixels(name, size, content) for name, content in work]
        images = [pixels for pixels in read if not isinstance(pixels, str)]
        if not images:
            return read, time_start, time_start
        tokens = iter(encoder.encode(np.stack([*images, *images[-1:] * (batch_size - len(images))])))
        found = [image if isinstance(image, str) else next(tokens).astype(TOKEN_DTYPE).tobytes() for image in read]
        return found, time_start, time.time()

    return encode


def _read_pixels(name: Path, size: int, content: bytes) -> np.ndarray | str:
    """Return the pixels (size, size, 3) uint8 of an image file, or what is wrong with it."""
    try:
        return read_image(name, size, content=content)
    except UserError as error:
        return str(error)


class _Store:
    """Image files that an archive does not have yet, and what becomes of them."""

    def __init__(self, archive: Archive, codec: Checkpoint, report: EncodeReport):
        self._archive, self._codec, self._report = archive, codec, report
        info = codec.model_info()
        for model in archive.models().values():
            if model.kind != "codec" or model.matches(info):
                continue
            if archive.count(compile_selection(archive, Selection.of(codec=model.sha256))):
                raise UserError(
                    f"{archive.path} holds images of codec {model.name!r:.100}, not of {codec.name!r}: use another --db"
                )
        self._prompt_ids = {text: row_id for row_id, text in archive.prompts().items()}

    def batches(self, items: Iterable[Item], size: int) -> Iterator[list[_File]]:
        """Yield files that are to be encoded, up to `size` at a time; the report gets the other images."""
        batch: list[_File] = []
        for done, item in enumerate(items, start=1):
            if (file := self._read(item)) is not None:
                batch.append(file)
            if len(batch) == size or sum(len(file.content) for file in batch) >= _BATCH_BYTES:
                yield batch
                batch = []
            if done % _LOG_EVERY == 0:
                logger.info("%s images so far", f"{done:,}")
        if batch:
            yield batch

    def _read(self, item: Item) -> _File | None:
        """Read an image's file; None if the archive has it, or it cannot be used."""
        try:
            caption = (item.caption or "").strip()
            if not caption or "\x00" in caption or len(caption) > _MAX_CAPTION:
                raise UserError(f"{str(item.name)!r} has no caption, or one of more than {_MAX_CAPTION:,} characters")
            if replace_surrogates(caption) != caption:
                raise UserError(f"{str(item.name)!r} has a caption that is not valid Unicode; give it another")
            content = item.read()
        except UserError as error:
            self._report.problems.append(str(error))
            return None
        digest = hashlib.sha256(content).digest()
        key = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
        prompt_id = self._prompt_ids.get(caption)
        if prompt_id is not None:
            group = GroupKey(prompt_id, 1, SamplingParams())
            if key in self._archive.existing_keys(group, None):
                self._report.existing_count += 1
                return None
        return _File(item.name, content, caption, key)

    def add(self, batch: Sequence[_File], encoded: _Encoded) -> None:
        """Store what became of files, in one transaction."""
        found, time_start, time_end = encoded
        images = [
            NewImage(
                file.caption,
                None,
                SamplingParams(),
                *file.key,
                quantvec=tokens,
                time_start=time_start,
                time_end=time_end,
            )
            for tokens, file in zip(found, batch, strict=True)
            if isinstance(tokens, bytes)
        ]
        with self._archive.transaction():
            codec_id = self._archive.add_model(self._codec.model_info())
            added = self._archive.add_images(images, None, codec_id, None, None)
        self._report.added_count += added
        self._report.existing_count += len(images) - added
        self._report.problems += [problem for problem in found if isinstance(problem, str)]


def open_source(source: Path, columns: Columns) -> Iterator[Item]:
    """Return the images of a source, in order; see `encode_images`.

    Raises:
        UserError: It cannot be read as a whole.
    """
    items = _open(source, columns)
    first = next(items, None)  # tells whether it can be read, before anything is made for it
    return items if first is None else itertools.chain([first], items)


def _open(source: Path, columns: Columns) -> Iterator[Item]:
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
                    image = member.name, tar.read_member(archive, member)
                elif ending in ("txt", "json") and member.isfile() and member.size <= _MAX_LINE:
                    content = tar.read_member(archive, member)
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
