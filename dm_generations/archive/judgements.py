"""What was said about images (`scores`, `vectors`, `ratings`): how `merge` copies and `verify` checks these tables."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dm_generations.archive.connection import ArchiveError, Row
from dm_generations.archive.database import Archive
from dm_generations.archive.records import GROUP_COLUMNS
from dm_generations.archive.schema import ADDED_TABLES
from dm_generations.archive.scores import READS, scorer_id
from dm_generations.archive.selection import Where

PAIR_VALUES: Final = ("first", "second", "tie", "bad")
RATING_KINDS: Final = ("pair", "score", "favourite", "tag")
SCORER_KINDS: Final = ("clip", "scorer")  # of models
TABLES: Final = ("scores", "vectors", "ratings")
CHUNK_ROWS: Final = 512
_SAMPLE: Final = (*GROUP_COLUMNS, "key0", "key1", "generator_id", "sampler_version", "init_md5", "quantvec_md5")
_READ_SAMPLES: Final = f"""
SELECT id, {{where}}, {", ".join(_SAMPLE)} FROM images WHERE id IN (SELECT value FROM json_each(:ids))
"""
# By the unique index of samples. The tokens have to be the same: on other hardware one key can give others.
_FIND_SAMPLE: Final = f"""
SELECT id FROM images
WHERE {" AND ".join(f"{name} = :{name}" for name in (*GROUP_COLUMNS, "key0", "key1"))}
  AND coalesce(generator_id, 0) = coalesce(:generator_id, 0)
  AND coalesce(sampler_version, 0) = coalesce(:sampler_version, 0) AND init_md5 = :init_md5
  AND CASE WHEN generator_id IS NULL THEN quantvec_md5 ELSE '' END
    = CASE WHEN :generator_id IS NULL THEN :quantvec_md5 ELSE '' END
  AND quantvec_md5 = :quantvec_md5
"""

NewIds = Mapping[str, Mapping[Any, int | None]]  # by column, then by id of the source


def copy_judgements(source: Archive, where: Where, target: Archive, new_ids: NewIds) -> int:
    """Copy what the source says about images that the target has; return how many rows were new.

    Args:
        source: Open for reading; its images have been merged already.
        where: Of which of its images.
        target: Inside a transaction.
        new_ids: The target's ids of prompts, unconditional prompts and models.

    Raises:
        ArchiveError: A row refers to one that is missing, or has a value that the format does not allow.
    """
    scorers = {}
    for row_id, model_id, reads in source.scan(ADDED_TABLES["scorers"], table="scorers"):
        scorers[row_id] = scorer_id(target, _look_up(source, "scorers", row_id, new_ids["model_id"], model_id), reads)
    added_count = 0
    for table in TABLES:
        columns = ADDED_TABLES[table]
        insert = (
            f"INSERT INTO {table} ({', '.join(columns[1:])}) VALUES ({', '.join('?' * (len(columns) - 1))})"
            " ON CONFLICT DO NOTHING"
        )
        rows = source.scan(columns, table=table)
        while chunk := [dict(zip(columns, row, strict=True)) for row in itertools.islice(rows, CHUNK_ROWS)]:
            images = _find_images(source, where, target, chunk, new_ids)
            maps = {"image_id": images, "other_id": images, "scorer_id": scorers, "model_id": new_ids["model_id"]}
            values = list(_translate(source, table, chunk, maps))
            added_count += target.connection.write_many(insert, values)
    return added_count


def _find_images(
    source: Archive, where: Where, target: Archive, chunk: list[dict[str, Any]], new_ids: NewIds
) -> dict[Any, Any]:
    """Return the target's id of each image of a chunk; None if it is not selected, or the target has other tokens."""
    ids = {row[name] for row in chunk for name in ("image_id", "other_id") if row.get(name) is not None}
    if not all(isinstance(row_id, int) for row_id in ids):
        raise ArchiveError(f"{source.path}: an image_id is not a whole number; run `verify` on it")
    found: dict[Any, Any] = {None: None}
    query, parameters = _READ_SAMPLES.format(where=where.sql), {**where.parameters, "ids": json.dumps(sorted(ids))}
    for row_id, is_selected, *values in source.connection.rows(query, parameters):
        found[row_id] = None
        if not is_selected:
            continue
        sample = dict(zip(_SAMPLE, values, strict=True))
        for name in ("prompt_id", "sc_prompt_id", "generator_id"):
            sample[name] = new_ids["model_id" if name == "generator_id" else name][sample[name]]
        found[row_id] = target.connection.value(_FIND_SAMPLE, sample)
    return found


def _translate(source: Archive, table: str, chunk: list[dict[str, Any]], maps: NewIds) -> Iterator[Row]:
    for row in chunk:
        row_id = row.pop("id")
        for name, ids in maps.items():
            if name in row:
                old = row[name]
                row[name] = _look_up(source, table, row_id, ids, old)
                if row[name] is None and old is not None:
                    break  # the target's tokens are others
        else:
            yield tuple(row.values())


def _look_up(source: Archive, table: str, row_id: object, ids: Mapping[Any, Any], old: object) -> Any:
    if old not in ids:
        raise ArchiveError(f"{source.path}: {table} {row_id!r:.40} refers to {old!r:.40}, which is missing")
    return ids[old]


def find_wrong_judgements(archive: Archive, model_kinds: Mapping[Any, str]) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (table, id, what, kind) of what `verify` reports about these tables.

    Args:
        archive: Open for reading.
        model_kinds: Kind by id of the models.
    """
    scorers = set()
    for row_id, model_id, reads in archive.scan(ADDED_TABLES["scorers"], table="scorers"):
        scorers.add(row_id)
        if model_kinds.get(model_id) not in SCORER_KINDS:
            yield "scorers", row_id, f"model_id {model_id!r:.40} is not a clip or scorer in models", "model_id"
        if reads not in READS:
            yield "scorers", row_id, f"reads is {reads!r:.40}, not one of {', '.join(READS)}", "reads"
    sizes: dict[Any, int] = {}
    for table in TABLES:
        columns = ADDED_TABLES[table]
        rows = archive.scan(columns, table=table)
        while chunk := [dict(zip(columns, row, strict=True)) for row in itertools.islice(rows, CHUNK_ROWS)]:
            ids = [row[name] for row in chunk for name in ("image_id", "other_id") if isinstance(row.get(name), int)]
            sql = "SELECT id FROM images WHERE id IN (SELECT value FROM json_each(?))"
            images = {row_id for (row_id,) in archive.connection.rows(sql, [json.dumps(ids)])}
            for row in chunk:
                for kind, what in _find_wrong(table, row, images, scorers, model_kinds, sizes):
                    yield table, row["id"], what, kind


def _find_wrong(
    table: str,
    row: dict[str, Any],
    images: set[int],
    scorers: set[Any],
    model_kinds: Mapping[Any, str],
    sizes: dict[Any, int],
) -> Iterator[tuple[str, str]]:
    if row["image_id"] not in images:
        yield "image_id", f"image_id {row['image_id']!r:.40} is not in images"
    if table != "vectors" and not _is_number(row["time"]) and (table == "ratings" or row["time"] is not None):
        yield "time", f"time is {row['time']!r:.40}, not a number"
    if table == "scores":
        if row["scorer_id"] not in scorers:
            yield "scorer_id", f"scorer_id {row['scorer_id']!r:.40} is not in scorers"
        if not _is_number(row["value"]):
            yield "value", f"value is {row['value']!r:.40}, not a number"
    elif table == "vectors":
        vector, model_id = row["vector"], row["model_id"]
        if model_kinds.get(model_id) not in SCORER_KINDS:
            yield "model_id", f"model_id {model_id!r:.40} is not a clip or scorer in models"
        if not isinstance(vector, bytes) or not vector or len(vector) % 2:
            yield "vector", "the vector is not a blob of float16"
        elif len(vector) != sizes.setdefault(model_id, len(vector)):
            yield "vector", f"the vector has {len(vector)} bytes, others of its model {sizes[model_id]}"
    else:
        yield from _find_wrong_rating(row, images)


def _find_wrong_rating(row: dict[str, Any], images: set[int]) -> Iterator[tuple[str, str]]:
    kind, value = row["kind"], row["value"]
    if not isinstance(row["rater"], str) or not row["rater"]:
        yield "rater", f"rater is {row['rater']!r:.40}, not a text"
    if kind == "pair" and (row["other_id"] not in images or row["other_id"] == row["image_id"]):
        yield "other_id", f"other_id {row['other_id']!r:.40} is not another image"
    if kind != "pair" and row["other_id"] is not None:
        yield "other_id", f"other_id {row['other_id']!r:.40} belongs to pairs only"
    if (what := wrong_rating(kind, value)) is not None:
        yield ("value" if kind in RATING_KINDS else "kind"), what


def wrong_rating(kind: object, value: object) -> str | None:
    """Return what is wrong with a rating's value, None if nothing is."""
    match kind:
        case "pair":
            return None if value in PAIR_VALUES else f"a pair's value is {value!r:.40}, not {', '.join(PAIR_VALUES)}"
        case "score":
            is_valid = type(value) is int and 1 <= value <= 10
            return None if is_valid else f"a score is {value!r:.40}, not a whole number from 1 to 10"
        case "favourite":
            is_valid = type(value) is int and value in (0, 1)
            return None if is_valid else f"a favourite's value is {value!r:.40}, not 0 or 1"
        case "tag":
            return None if isinstance(value, str) and value else f"a tag is {value!r:.40}, not a text"
    return f"kind is {kind!r:.40}, not one of {', '.join(RATING_KINDS)}"


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
