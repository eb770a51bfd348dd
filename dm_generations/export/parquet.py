"""A data set of Parquet files for the Hugging Face hub, pandas, polars, DuckDB and others, with its card.

    README.md                           the card: YAML for the hub, what is in the set, the command that made it
    data/train-00000-of-00002.parquet   rows by the images' id, in files of about 500 MB

Files get their names when all of them are whole; the names tell how many there are.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dm_generations import __version__
from dm_generations.archive import Archive
from dm_generations.archive.arrow import import_pyarrow, make_schema, to_arrow
from dm_generations.archive.selection import ALL, Selection, compile_nonempty
from dm_generations.archive.tables import Table, TableReader
from dm_generations.atomic_io import TemporaryFile, remove_stale_temporaries, write_atomic
from dm_generations.errors import UserError, defer_sigint, printable

if TYPE_CHECKING:
    import pyarrow

FOLDER: Final = "data"
CARD: Final = "README.md"
FILE_BYTES: Final = 500_000_000
_ROWS: Final = 20_000  # read and written at a time, a row group of a file; the hub reads a group at once
_ROWS_WITH_IMAGES: Final = 1_000
_LICENCE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_SIZES: Final = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
_MAX_LISTED: Final = 20  # models on the card

MakeImages = Callable[[Table], Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class ParquetOptions:
    """How to write a data set.

    Attributes:
        folder: New, or without a data set.
        selection: Which images.
        licence: As the hub names it.
        command: That makes the set, for its card.
        file_bytes: A file ends when it has so many.
    """

    folder: Path
    selection: Selection = ALL
    licence: str = "unknown"
    command: str = ""
    file_bytes: int = FILE_BYTES


def write_parquet(
    archive: Archive,
    options: ParquetOptions,
    make_images: MakeImages | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a data set, all of it or nothing.

    Args:
        archive: The archive.
        options: What to write, and where.
        make_images: Returns the files of a table's images; None is a set without images.
        on_progress: Called with how many images are done, and of how many.

    Returns:
        How many files of data there are.

    Raises:
        UserError: Nothing is selected, a row is damaged, the folder has a data set, or the disk takes no more.
    """
    check_folder(options)
    where = compile_nonempty(archive, options.selection)
    reader, total = TableReader(archive, where), archive.count(where)
    if not total:
        raise UserError(f"{archive.path} holds no images; `python -m dm_generations generate` adds some")
    schema = make_schema(reader.facts(), make_images is not None)
    folder = options.folder / FOLDER
    try:
        _claim(folder)
        done = 0
        with contextlib.closing(_Files(folder, schema, options.file_bytes)) as files, ThreadPoolExecutor(1) as thread:
            written: Future | None = None  # while the next rows are read
            for table in reader.read(_ROWS if make_images is None else _ROWS_WITH_IMAGES):
                images = () if make_images is None else make_images(table)
                arrow = to_arrow(table, schema, images)
                if written is not None:
                    written.result()
                with defer_sigint():
                    written = thread.submit(files.add, arrow)
                done += len(table["id"])
                on_progress(done, total)
            if written is not None:
                written.result()
            count = files.publish()
        write_atomic(options.folder / CARD, _card(archive, reader, options, done).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {options.folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
            options.folder.rmdir()
    return count


def check_folder(options: ParquetOptions) -> None:
    """Check what can be known before any row is read.

    Raises:
        UserError: pyarrow is not installed, the licence is not the name of one, or the folder has a data set.
    """
    import_pyarrow()
    if not _LICENCE.fullmatch(options.licence):
        raise UserError(f"--license {options.licence!r:.80} is not a licence as the hub names it, as cc0-1.0 or mit")
    if any((options.folder / FOLDER).glob("*.parquet")) or (options.folder / CARD).exists():
        raise UserError(f"{options.folder} has a data set already; choose another folder with --out")


def _claim(folder: Path) -> None:
    """Make the folder of the files, which no other export may have. Raises UserError."""
    remove_stale_temporaries(folder)
    with contextlib.suppress(OSError):  # there is none, or it is not empty
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise UserError(f"{folder} is there already, or another export writes it; choose another --out") from error


class _Files:
    """The files of a set, under temporary names until `publish`."""

    def __init__(self, folder: Path, schema: "pyarrow.Schema", file_bytes: int):
        self._folder, self._schema, self._file_bytes = folder, schema, file_bytes
        self._files = [TemporaryFile(folder)]  # at once: it tells that the folder is taken
        self._writer: Any = None

    def add(self, table: "pyarrow.Table") -> None:
        """Append a row group to the last file, or to a new one."""
        import_pyarrow()
        from pyarrow.parquet import ParquetWriter

        if self._writer is None:
            if self._files[-1].file.closed:
                self._files.append(TemporaryFile(self._folder))
            self._writer = ParquetWriter(
                self._files[-1].file, self._schema, compression="zstd", compression_level=1, write_page_index=True
            )
        self._writer.write_table(table, row_group_size=len(table))
        if self._files[-1].file.tell() >= self._file_bytes:
            self._end_file()

    def publish(self) -> int:
        """Give all files their names; return how many there are."""
        self._end_file()
        count = len(self._files)
        for number in range(count):
            self._files.pop(0).rename(self._folder / f"train-{number:05d}-of-{count:05d}.parquet")
        return count

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._files[-1].file.close()
            self._writer = None

    def close(self) -> None:
        """Leave nothing of files without a name."""
        with contextlib.suppress(Exception):  # there may be no room for what is still to be written
            self._end_file()
        for file in self._files:
            file.discard()


def _card(archive: Archive, reader: TableReader, options: ParquetOptions, count: int) -> str:
    """Return the card. All text of others is in blocks of code, a line each."""
    size = next((name for name, limit in _SIZES if count < limit), "n>10M")
    models = [
        f"    {model.kind:<9}  {printable(model.name)}  sha256 {printable(model.sha256)}"
        for model in list(reader.models.values())[:_MAX_LISTED]
    ]
    return "\n".join(
        (
            "---",
            f"license: {options.licence}",
            "task_categories:\n- text-to-image",
            "tags:\n- dm-generations",
            f"size_categories:\n- {size}",
            f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {FOLDER}/*.parquet",
            "---",
            "# Images as tokens\n",
            f"{count:,} images of a text-to-image model. Each row has an image's prompt, settings, random key, scores "
            "and tokens, and the names and hashes of the models; with the codec below the tokens become the image.\n",
            *(("Models:\n", *models, "") if models else ()),
            f"Made by dm_generations {__version__} of the archive `{_code(archive.path.name)}`:\n",
            f"    {printable(options.command, 4_000)}\n",
            "Back to an archive, with the same rows:\n",
            "    python -m dm_generations import FOLDER --into new.db\n",
        )
    )


def _code(text: str) -> str:
    return printable(text).replace("`", "'")
