"""`merge`: adds the images of several archives to one."""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dm_generations.archive.connection import ArchiveError, Row, new_file
from dm_generations.archive.database import Archive
from dm_generations.archive.judgements import NewIds, copy_judgements
from dm_generations.archive.queries import INSERT_OR_FILL_SCORES, JUDGES
from dm_generations.archive.records import (
    CHECKED_COLUMNS,
    INSERT_COLUMNS,
    MODEL_KINDS,
    check_image,
)
from dm_generations.archive.selection import ALL, EVERY, Selection, Where, check_known, compile_known
from dm_generations.archive.vocabulary import add_vocabulary, read_classes, read_vocabularies
from dm_generations.atomic_io import remove_stale_temporaries
from dm_generations.errors import one_line

_T = TypeVar("_T")


@dataclass(frozen=True)
class SourceReport:
    """What `merge` did with one source.

    Attributes:
        path: The source.
        image_count: Its images.
        added_count: Those that the target did not have.
        scored_count: Images that the target had, but without the scores that this source has.
        judgement_count: Scores of other judges, vectors and ratings that the target did not have.
    """

    path: str
    image_count: int
    added_count: int
    scored_count: int
    judgement_count: int


def merge(
    sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str], selection: Selection = ALL
) -> list[SourceReport]:
    """Add the images of all sources to `target`, all of them or none.

    Prompts and models get new ids; an image that the target has already is not added twice.

    Args:
        sources: Archives of any version, or of 2022.
        target: An archive, made if it does not exist.
        selection: Which images of the sources. A prompt or a model need not be in each source, but in one of them.

    Returns:
        A report for each source.

    Raises:
        UserError: A prompt or a model is in no source, or nothing is selected.
        ArchiveError: A source cannot be opened, or has a row that `verify` would report.
    """
    target = Path(target)
    check_known(selection, _open_each(sources))  # also finds what cannot be opened, before the work
    if not target.exists():
        remove_stale_temporaries(target.parent)
        with new_file(target) as temporary, Archive.create(temporary) as archive:
            return _add_all(sources, selection, archive)
    for source in sources:
        if os.path.samefile(source, target):
            raise ArchiveError(f"{target}: this archive is both a source and the target")
    with Archive.open(target, "w") as archive:
        return _add_all(sources, selection, archive)


def _open_each(sources: Iterable[str | os.PathLike[str]]) -> Iterator[Archive]:
    """Open one at a time: there can be more than a process may have open."""
    for path in sources:
        with Archive.open(path) as source:
            yield source


def _add_all(sources: Sequence[str | os.PathLike[str]], selection: Selection, target: Archive) -> list[SourceReport]:
    with target.transaction():
        reports = [_add(source, compile_known(source, selection), target) for source in _open_each(sources)]
        if not selection.is_all and not any(report.image_count for report in reports):
            names = ", ".join(map(str, sources))
            raise ArchiveError(f"{names}: no images of this selection; `info` lists what they hold")
    return reports


def _add(source: Archive, where: Where, target: Archive) -> SourceReport:
    rows = _Rows(source, where, target)  # adds prompts and models
    count_before = target.count()
    try:
        changed_count = target.connection.write_many(INSERT_OR_FILL_SCORES, rows)
    except ArchiveError as error:
        if isinstance(error.__cause__, sqlite3.IntegrityError):
            reason = one_line(error.__cause__)
            raise ArchiveError(f"{source.path}: image {rows.current_id} is not valid: {reason}") from error
        raise
    added_count = target.count() - count_before
    new_ids: NewIds = {"prompt_id": rows.prompt_ids, "sc_prompt_id": rows.sc_prompt_ids, "model_id": rows.model_ids}
    judgement_count = copy_judgements(source, where, target, new_ids)
    return SourceReport(str(source.path), rows.count, added_count, changed_count - added_count, judgement_count)


class _Rows:
    """The rows of a source with the ids of the target, to be inserted; `current_id` is the last row's own id."""

    def __init__(self, source: Archive, where: Where, target: Archive):
        self.source = source
        self.where = where
        self.current_id: int | None = None
        self.count = 0
        # Unchanged, also with NUL bytes: an archive can have prompts that `generate` refuses.
        for name, labels in read_vocabularies(source.connection).items():
            add_vocabulary(target.connection, name, labels)
        classes = read_classes(source.connection) if source.version >= 3 else {}
        self.prompt_ids = {
            i: target.prompt_id(classes[i]) if i in classes else target.text_id("prompts", text or "")
            for i, text in self._used("prompt_id", source.prompts())
        }
        self.sc_prompt_ids = {
            i: 1 if text is None else target.text_id("sc_prompts", text)
            for i, text in self._used("sc_prompt_id", source.sc_prompts())
        }
        judges = {row_id for (row_id,) in source.connection.rows(JUDGES)}
        models = dict(self._used("generator_id, codec_id, clip_id", source.models(), judges))
        self.codecs = {i: model for i, model in models.items() if model.kind == "codec"}
        self.model_ids: dict[int | None, int | None] = {i: target.model_id(model) for i, model in models.items()}
        self.model_ids[None] = None

    def _used(self, columns: str, things: dict[int, _T], others: Set[int] = frozenset()) -> Iterator[tuple[int, _T]]:
        """Yield those that the selected images refer to in these columns, or all for all images; and `others`."""
        if self.where == EVERY:
            return iter(things.items())
        query = f"SELECT DISTINCT {columns} FROM images WHERE {self.where.sql}"
        used = {row_id for row in self.source.connection.rows(query, self.where.parameters) for row_id in row} | others
        return ((row_id, thing) for row_id, thing in things.items() if row_id in used)

    def __iter__(self) -> Iterator[Row]:
        columns = ("id", *INSERT_COLUMNS)
        for values in self.source.scan(columns, where=self.where):
            row = dict(zip(columns, values, strict=True))
            self.current_id = row.pop("id")
            self.count += 1
            row["prompt_id"] = self._new_id(self.prompt_ids, row, "prompt_id")
            row["sc_prompt_id"] = self._new_id(self.sc_prompt_ids, row, "sc_prompt_id")
            try:
                codec = self.codecs.get(row["codec_id"])
                row["quantvec_md5"] = check_image(codec, *(row[name] for name in CHECKED_COLUMNS))
            except ArchiveError as error:
                raise self._error(str(error)) from error
            for name in MODEL_KINDS:
                row[name] = self._new_id(self.model_ids, row, name)
            yield tuple(row.values())

    def _new_id(self, new_ids: Mapping[Any, int | None], row: dict[str, Any], name: str) -> int | None:
        if row[name] not in new_ids:
            raise self._error(f"{name} {row[name]!r:.40} has no row")
        return new_ids[row[name]]

    def _error(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self.source.path}: image {self.current_id}: {what}; run `verify` on it")
