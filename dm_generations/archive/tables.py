"""Images with their texts, models and scores in place of ids: what `export` writes and `import` reads back.

A table holds some images as columns, of the names in TABLE_COLUMNS. Models are in it by name and hash, for people, and
by an id; the facts of a set have the whole models by this id, and the labels of vocabularies. Facts are JSON:

    version         of the archive format
    models          [{"id", "kind", "name", "sha256", "config", "token_shape", "codebook_size", "image_shape"}], as in
                    the table of an archive
    vocabularies    {name: [label, ...]}

The vectors and ratings of images are not in it.
"""

import functools
import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.connection import ArchiveError, Row
from dm_generations.archive.queries import SELECT_MODELS
from dm_generations.archive.records import (
    CHECKED_COLUMNS,
    INSERT_COLUMNS,
    MODEL_KINDS,
    PARAM_COLUMNS,
    ClassLabel,
    ModelInfo,
    check_image,
    init_md5,
    model_values,
    parse_model,
)
from dm_generations.archive.schema import SCHEMA_VERSION
from dm_generations.archive.scores import READS, scorer_id
from dm_generations.archive.selection import EVERY, Where
from dm_generations.archive.vocabulary import add_vocabulary, read_classes, read_vocabularies
from dm_generations.errors import one_line, short_repr

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

Table = Mapping[str, Sequence[Any]]  # values by column, all columns of one length

MODELS: Final = {"model": "generator_id", "codec": "codec_id", "clip": "clip_id"}  # columns of names, and of ids
CODEC_COLUMNS: Final = ("token_shape", "codebook_size", "image_shape")
SCORE_FIELDS: Final = ("scorer", "sha256", "reads", "value", "time", "model_id")  # of each in the column scores
TABLE_COLUMNS: Final = (
    *("id", "prompt", "sc_prompt", *PARAM_COLUMNS, "extra_settings", "key0", "key1"),
    *("clip_score_input", "clip_score_tokenized", "scores", "log_prob", "tokens", *CODEC_COLUMNS, "quantvec_md5"),
    *("init_count", "dtype", "sampler_version", "time_start", "time_end", "time_scored", "vocabulary", "class_label"),
    *(name for model in MODELS for name in (model, f"{model}_sha256", MODELS[model])),
)
# What an image is made of again. Tokens are bytes, as in an archive.
NEEDED_COLUMNS: Final = (
    *("prompt", "sc_prompt", *PARAM_COLUMNS, "extra_settings", "key0", "key1"),
    *("clip_score_input", "clip_score_tokenized", "scores", "log_prob", "tokens", "quantvec_md5"),
    *("init_count", "dtype", "sampler_version", "time_start", "time_end", "time_scored", "vocabulary", "class_label"),
    *MODELS.values(),
)
_MODEL_FIELDS: Final = tuple(ModelInfo.__dataclass_fields__)
_MAX_REMEMBERED: Final = 100_000  # prompts
_SCORES: Final = """
SELECT image_id, scorer_id, value, time FROM scores WHERE image_id BETWEEN ? AND ? ORDER BY image_id, scorer_id
"""
_INSERT: Final = f"""
INSERT INTO images (id, {", ".join(INSERT_COLUMNS)}) VALUES (?{", ?" * len(INSERT_COLUMNS)}) ON CONFLICT DO NOTHING
"""
# Of an image that was not inserted there is no row.
_INSERT_SCORE: Final = """
INSERT INTO scores (image_id, scorer_id, value, time) SELECT id, ?, ?, ? FROM images WHERE id = ?
ON CONFLICT DO NOTHING
"""


class TableReader:
    """Reads the images of an archive as tables."""

    def __init__(self, archive: "Archive", where: Where = EVERY):
        """Read the texts and models.

        Args:
            archive: Open in any mode.
            where: Which images.
        """
        self._archive, self._where = archive, where
        self._prompts, self._sc_prompts = archive.prompts(), archive.sc_prompts()
        self._classes = read_classes(archive.connection) if archive.version >= 3 else {}
        self.models: dict[Any, ModelInfo] = dict(archive.models().items())
        scorers = archive.connection.rows("SELECT id, model_id, reads FROM scorers")
        self._scorers = {row_id: (model_id, reads) for row_id, model_id, reads in scorers}

    def facts(self) -> dict[str, Any]:
        """Return the facts of the set."""
        rows = self._archive.connection.rows(SELECT_MODELS)
        return {
            "version": SCHEMA_VERSION,
            "models": [dict(zip(("id", *_MODEL_FIELDS), row, strict=True)) for row in rows],
            "vocabularies": read_vocabularies(self._archive.connection),
        }

    def read(self, row_count: int) -> Iterator[Table]:
        """Yield the images by id, `row_count` in a table, and fewer in the last.

        Raises:
            ArchiveError: A row has a value that `verify` would report.
        """
        rows = self._archive.scan(("id", *INSERT_COLUMNS), where=self._where)
        while chunk := list(itertools.islice(rows, row_count)):
            yield self._table(dict(zip(("id", *INSERT_COLUMNS), zip(*chunk, strict=True), strict=True)))

    def _table(self, columns: dict[str, Any]) -> Table:
        ids = columns["id"]
        table = {name: columns[name] for name in TABLE_COLUMNS if name in columns} | {"tokens": columns["quantvec"]}
        table["quantvec_md5"] = [*self._checked(columns)]
        table["prompt"] = self._look_up(self._prompts, columns, "prompt_id")
        table["sc_prompt"] = self._look_up(self._sc_prompts, columns, "sc_prompt_id")
        classes = [self._classes.get(row_id) for row_id in columns["prompt_id"]]
        table["vocabulary"] = [each and each.vocabulary for each in classes]
        table["class_label"] = [None if each is None else each.label for each in classes]
        for name, column in MODELS.items():
            for suffix, field in (("", "name"), ("_sha256", "sha256")):
                values = {row_id: getattr(model, field) for row_id, model in self.models.items()} | {None: None}
                table[f"{name}{suffix}"] = self._look_up(values, columns, column)
        shapes = {row_id: _codec_values(model) for row_id, model in self.models.items()} | {None: (None, None, None)}
        found = self._look_up(shapes, columns, "codec_id")
        table |= zip(CODEC_COLUMNS, zip(*found, strict=True), strict=True)
        scores = self._read_scores(ids[0], ids[-1]) if self._scorers else {}
        table["scores"] = [scores.get(row_id, []) for row_id in ids]
        return {name: table[name] for name in TABLE_COLUMNS}

    def _checked(self, columns: dict[str, Any]) -> Iterator[str]:
        rows = zip(columns["id"], columns["codec_id"], *(columns[name] for name in CHECKED_COLUMNS), strict=True)
        for row_id, codec_id, *values in rows:
            try:
                yield check_image(self.models.get(codec_id), *values)
            except ArchiveError as error:
                raise self._error(row_id, str(error)) from error

    def _look_up(self, values: Mapping[Any, Any], columns: dict[str, Any], name: str) -> list[Any]:
        ids = columns[name]
        try:
            if ids.count(ids[0]) == len(ids):  # as of most models
                return [values[ids[0]]] * len(ids)
            return [values[row_id] for row_id in ids]
        except KeyError:
            row_id, wrong = next((i, v) for i, v in zip(columns["id"], ids, strict=True) if v not in values)
            raise self._error(row_id, f"{name} {wrong!r:.40} has no row") from None

    def _read_scores(self, first_id: int, last_id: int) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {}
        for row_id, scorer, value, time in self._archive.connection.rows(_SCORES, (first_id, last_id)):
            model_id, reads = self._scorers.get(scorer, (None, None))
            model = self.models.get(model_id)
            if model is None or reads not in READS:
                raise self._error(row_id, f"its scorer {scorer!r:.40} is missing or wrong")
            entry = (model.name, model.sha256, reads, value, time, model_id)
            found.setdefault(row_id, []).append(dict(zip(SCORE_FIELDS, entry, strict=True)))
        return found

    def _error(self, row_id: object, what: str) -> ArchiveError:
        return ArchiveError(f"{self._archive.path}: image {row_id!r:.40}: {what}; run `verify` on it")


def _codec_values(model: ModelInfo) -> tuple[Any, ...]:
    codebook_size, token_shape, image_shape = model_values(model)[4:]
    return token_shape, codebook_size, image_shape


class TableWriter:
    """Adds tables to a new archive, inside a transaction."""

    def __init__(self, archive: "Archive", facts: Mapping[str, Any], source: str):
        """Add the models and vocabularies of a set.

        Args:
            archive: Open for writing.
            facts: Of the set.
            source: Names the set in messages.

        Raises:
            ArchiveError: The facts are not as `TableReader.facts` gives them.
        """
        self._archive, self._source = archive, source
        self._last_id = archive.connection.value("SELECT max(id) FROM images") or 0
        self._row_number = 0  # of the last row of the set that was begun
        self._prompt_ids: dict[Any, int] = {}
        self._models: dict[Any, ModelInfo] = {}
        self._model_ids: dict[Any, int | None] = {None: None}
        self._scorers: dict[tuple[Any, Any], int] = {}
        try:
            if facts["version"] > SCHEMA_VERSION:
                raise ArchiveError(f"it has format {facts['version']}; install a newer dm_generations")
            for values in facts["models"]:
                model = parse_model(tuple(values[name] for name in _MODEL_FIELDS))
                self._models[values["id"]] = model
                self._model_ids[values["id"]] = archive.model_id(model)
            for name, labels in facts["vocabularies"].items():
                add_vocabulary(archive.connection, name, labels)
        except (ArchiveError, KeyError, TypeError, AttributeError) as error:
            raise ArchiveError(f"{source}: what it says of its models is wrong: {one_line(error)}") from error

    def add(self, table: Table) -> int:
        """Add the images of a table, without those that are there.

        Args:
            table: With NEEDED_COLUMNS.

        Returns:
            How many were new.

        Raises:
            ArchiveError: A value is wrong; the message has the number of its row, from 1.
        """
        scores: list[Row] = []
        try:
            count = self._archive.connection.write_many(_INSERT, self._rows(table, scores))
            self._archive.connection.write_many(_INSERT_SCORE, scores)
        except ArchiveError as error:
            what = one_line(error.__cause__) if isinstance(error.__cause__, sqlite3.IntegrityError) else str(error)
            raise ArchiveError(f"{self._source}: row {self._row_number:,}: {what}") from error
        return count

    def _rows(self, table: Table, scores: list[Row]) -> Iterator[Row]:
        """Yield the values of `_INSERT`, and put those of `_INSERT_SCORE` into `scores`. All maps advance together."""
        tokens, counts = table["tokens"], table["init_count"]
        columns: dict[str, Iterable[Any]] = {name: table[name] for name in INSERT_COLUMNS if name in table}
        columns["prompt_id"] = map(self._prompt_id, table["prompt"], table["vocabulary"], table["class_label"])
        columns["sc_prompt_id"] = map(self._sc_prompt_id, table["sc_prompt"])
        columns["quantvec"], columns["init_md5"] = tokens, map(init_md5, tokens, counts)
        checked = (tokens, table["quantvec_md5"], counts, table["extra_settings"], table["codec_id"])
        columns["quantvec_md5"] = map(self._checked_md5, *checked)
        for name in MODEL_KINDS:
            columns[name] = map(functools.partial(self._model_id, name), table[name])
        rows = zip(*(columns[name] for name in INSERT_COLUMNS), strict=True)
        for row_id, values, said in zip(self._new_ids(len(tokens)), rows, table["scores"], strict=True):
            scores += self._scores(row_id, said)
            yield row_id, *values

    def _new_ids(self, count: int) -> Iterator[int]:
        for _ in range(count):
            self._row_number += 1
            yield self._last_id + self._row_number

    def _checked_md5(self, quantvec: bytes, md5: str | None, init_count: int, extra_settings: str, codec: Any) -> str:
        init = init_md5(quantvec, init_count)
        return check_image(self._models.get(codec), quantvec, md5, init_count, init, extra_settings)

    def _sc_prompt_id(self, text: str | None) -> int:
        return 1 if text is None else self._text_id("sc_prompts", text)

    def _prompt_id(self, text: str | None, vocabulary: str | None, label: int | None) -> int:
        if vocabulary is None or label is None:
            if (vocabulary, label) != (None, None):
                raise ArchiveError(f"vocabulary is {vocabulary!r:.100}, class_label {label!r:.40}: one is missing")
            return self._text_id("prompts", text or "")
        return self._archive.prompt_id(ClassLabel(vocabulary, label))

    def _text_id(self, table: str, text: str) -> int:
        if (found := self._prompt_ids.get((table, text))) is None:
            if len(self._prompt_ids) >= _MAX_REMEMBERED:
                self._prompt_ids.clear()
            found = self._prompt_ids[table, text] = self._archive.text_id(table, text)
        return found

    def _model_id(self, column: str, row_id: Any) -> int | None:
        if row_id is not None and (row_id not in self._models or self._models[row_id].kind != MODEL_KINDS[column]):
            raise ArchiveError(f"{column} is {row_id!r:.40}, which is not a {MODEL_KINDS[column]} of the set")
        return self._model_ids[row_id]

    def _scores(self, row_id: int, said: Iterable[Mapping[str, Any]] | None) -> Iterator[Row]:
        for score in said or ():
            model_id, reads = score["model_id"], score["reads"]
            if model_id not in self._models or reads not in READS:
                raise ArchiveError(f"scores: {short_repr(score)} is not of a model of the set")
            if (scorer := self._scorers.get((model_id, reads))) is None:
                target_id = self._model_ids[model_id]
                assert target_id is not None, "only None is None"
                scorer = self._scorers[model_id, reads] = scorer_id(self._archive, target_id, reads)
            yield scorer, score["value"], score["time"], row_id
