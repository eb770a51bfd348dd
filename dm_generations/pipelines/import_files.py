"""`import`: data sets into an archive: our own Parquet with all that it holds, and files of others with tokens.

All files become one new archive under a temporary name. It is the target, if that does not exist and all images are
wanted; else `merge` adds it to the target. So a target gets all of the files or nothing of them.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive import Archive, ArchiveError, Selection, merge
from dm_generations.archive.arrow import from_arrow, import_pyarrow, read_facts
from dm_generations.archive.connection import new_file, scratch_file
from dm_generations.archive.selection import ALL
from dm_generations.archive.tables import NEEDED_COLUMNS, Table, TableWriter
from dm_generations.atomic_io import remove_stale_temporaries
from dm_generations.errors import UserError, one_line
from dm_generations.pipelines.token_files import COLUMNS, SUFFIXES, Labels, TokenFiles

if TYPE_CHECKING:
    import pyarrow

_PARQUET: Final = ".parquet"
_DATA: Final = "data"  # folder of the files in a set of our own
_NUMBERED: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.parquet")
_ROWS: Final = 5_000  # of a table

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportOptions:
    """What to import.

    Attributes:
        codec: Whose tokens files of others hold: a folder, a file or a name on the hub; None is the one that ships.
        labels: A CSV file with the prompts of files that hold tokens alone.
        selection: Which images.
    """

    codec: str | None = None
    labels: Path | None = None
    selection: Selection = ALL


@dataclass(frozen=True)
class ImportReport:
    """What was done: how many images were wanted, and how many of them the target did not have."""

    image_count: int
    added_count: int


def import_files(
    sources: Sequence[Path],
    target: Path,
    options: ImportOptions,
    on_progress: OnProgress = lambda done, total: None,
) -> ImportReport:
    """Add the images of files to an archive, all of them or none.

    Args:
        sources: Files, and folders of Parquet or `.npy` files.
        target: An archive, made if it does not exist.
        options: What to take of them.
        on_progress: Called with how many images are read, and of how many, or 0 where that is unknown.

    Raises:
        UserError: A file is missing, damaged, of another form, or has no such images.
    """
    reader = _Reader(sources, options, on_progress)
    if target.parent.is_dir():
        remove_stale_temporaries(target.parent)
    if not target.exists() and options.selection.is_all:
        with new_file(target) as temporary:
            return reader.write(temporary)
    with scratch_file(target) as temporary:
        reader.write(temporary)
        try:
            (report,) = merge([temporary], target, options.selection)
        except UserError as error:  # it names the archive that is searched
            raise UserError(str(error).replace(str(temporary), ", ".join(map(str, sources)))) from error
    return ImportReport(report.image_count, report.added_count)


class _Reader:
    """Reads files into a new archive."""

    def __init__(self, sources: Sequence[Path], options: ImportOptions, on_progress: OnProgress):
        self._files = [file for source in sources for file in _list_files(source)]
        self._labels = None if options.labels is None else Labels(options.labels)
        self._tokens = TokenFiles(options.codec, self._labels)
        self._on_progress = on_progress
        is_counted = all(file.suffix == _PARQUET for file in self._files)
        self._total = sum(map(_count_rows, self._files)) if is_counted else 0

    def write(self, path: Path) -> ImportReport:
        """Make the archive."""
        count = added_count = 0
        with Archive.create(path) as archive, archive.transaction():
            for file in self._files:
                facts, tables = self._open(file)
                writer = TableWriter(archive, facts, str(file))
                for table in tables:
                    added_count += writer.add(table)
                    count += len(table["tokens"])
                    self._on_progress(count, self._total)
            if self._labels is not None:
                self._labels.check_all_used()
            if not count:
                raise UserError(f"{', '.join(map(str, self._files))}: there are no images")
        return ImportReport(count, added_count)

    def _open(self, file: Path) -> tuple[Mapping[str, Any], Iterator[Table]]:
        """Return the facts and the tables of a file."""
        if file.suffix != _PARQUET:
            return self._tokens.facts, self._tokens.read(file, _ROWS)
        with _opened(file) as parquet:
            facts, names = read_facts(parquet.schema_arrow), parquet.schema_arrow.names
        if facts is not None:
            _check_columns(file, NEEDED_COLUMNS, names)
            return facts, (_to_table(file, batch) for batch in _read_batches(file, NEEDED_COLUMNS))
        _check_columns(file, ["tokens"], names)
        batches = _read_batches(file, [name for name in COLUMNS if name in names])
        records = (record for batch in batches for record in batch.to_pylist())
        return self._tokens.facts, self._tokens.to_tables(file, records, _ROWS)


def _list_files(source: Path) -> list[Path]:
    """Return the files of a source; a folder of `.npy` files counts as one.

    Raises:
        UserError: There is none, or one of a numbered set is missing.
    """
    if source.is_dir():
        folder = source / _DATA if (source / _DATA).is_dir() else source
        found = sorted(folder.glob(f"*{_PARQUET}"))
        _check_numbers(folder, found)
        if found:
            return found
        if any(source.rglob("*.npy")):
            return [source]
    elif source.is_file() and source.suffix in (_PARQUET, *SUFFIXES):
        return [source]
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    raise UserError(
        f"{source}: not a file {_PARQUET} or {', '.join(SUFFIXES)}, or a folder of {_PARQUET} or .npy files; "
        "archives are joined by `merge`"
    )


def _check_numbers(folder: Path, files: Sequence[Path]) -> None:
    sets: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, (_NUMBERED.fullmatch(file.name) for file in files)):
        sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            name = f"{stem}-{missing[0]:05d}-of-{count:05d}{_PARQUET}"
            raise UserError(f"{folder}: {len(missing):,} of {count:,} files are missing, first {name}; get them too")


def _check_columns(file: Path, needed: Sequence[str], names: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in names]:
        raise UserError(
            f"{file}: this Parquet has no {'column' if len(missing) == 1 else 'columns'} {', '.join(missing)}; it has "
            f"{', '.join(names):.300}"
        )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Yield an open Parquet file; errors of reading become one line."""
    pyarrow = import_pyarrow()
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, pre_buffer=False) as parquet:  # else all that was read stays in memory
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged, cut short or not Parquet: {one_line(error)}") from error
    except ArchiveError as error:
        raise UserError(f"{file}: {error}") from error


def _count_rows(file: Path) -> int:
    with _opened(file) as parquet:
        return parquet.metadata.num_rows


def _read_batches(file: Path, columns: Sequence[str]) -> "Iterator[pyarrow.RecordBatch]":
    with _opened(file) as parquet:
        yield from parquet.iter_batches(_ROWS, columns=list(columns))


def _to_table(file: Path, batch: "pyarrow.RecordBatch") -> Table:
    try:
        return from_arrow(batch)
    except ArchiveError as error:
        raise UserError(f"{file}: {error}") from error
