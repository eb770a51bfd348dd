"""The SQL of an archive, and how many rows are read. Older files are read through views with the same columns."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from dm_generations.archive.connection import ArchiveError, Connection, Row, is_damage
from dm_generations.archive.records import (
    GROUP_COLUMNS,
    IMAGE_COLUMNS,
    INSERT_COLUMNS,
    ImageRow,
    ModelInfo,
    parse_image,
)

CHUNK_ROWS: Final = 512  # read by one query, or fewer
CHUNK_BYTES: Final = 32 * 2**20  # of their values

_GROUP: Final = ", ".join(GROUP_COLUMNS)
_IN_GROUP: Final = " AND ".join(f"{name} = ?" for name in GROUP_COLUMNS)
_VALUES: Final = ", ".join("?" * len(INSERT_COLUMNS))
_INSERT_IMAGE: Final = f"INSERT INTO images ({', '.join(INSERT_COLUMNS)}) VALUES ({_VALUES})"

SELECT_MODELS: Final = f"SELECT id, {', '.join(ModelInfo.__dataclass_fields__)} FROM models ORDER BY id"
SELECT_CLASSES: Final = """
SELECT id, vocabulary_id, class_label FROM prompts WHERE vocabulary_id IS NOT NULL OR class_label IS NOT NULL
"""
JUDGES: Final = "SELECT model_id FROM scorers UNION SELECT model_id FROM vectors"
FIND_MODEL: Final = "SELECT id FROM models WHERE kind = ? AND sha256 = ? AND config = ?"
INSERT_MODEL: Final = """
INSERT INTO models (kind, sha256, config, name, codebook_size, token_shape, image_shape) VALUES (?, ?, ?, ?, ?, ?, ?)
"""

# By group. `{table}` is images, or a temporary table with the same index where a file has none; `{where}` a selection,
# `{rank}` a score.
COUNT_GROUPS: Final = f"""
SELECT {_GROUP}, count(*) FROM {{table}} WHERE {{where}} GROUP BY {_GROUP} ORDER BY {_GROUP}
"""
IDS_BEST_FIRST: Final = f"""
SELECT id FROM {{table}} WHERE {" AND ".join(f"{name} = :{name}" for name in GROUP_COLUMNS)} AND {{where}}
ORDER BY {{rank}} DESC, id  -- NULL comes last; id breaks ties, so a rerun picks the same images
LIMIT :limit
"""
ALL_IDS_BEST_FIRST: Final = f"""
SELECT id FROM {{table}} WHERE {{where}} ORDER BY {_GROUP}, {{rank}} DESC, id LIMIT :limit
"""
# The score of any judge: of the table, or of the columns if they are a CLIP's own.
SCORE_OF_IMAGE: Final = """coalesce(
    (SELECT value FROM scores WHERE scorer_id = :rank_scorer AND image_id = images.id),
    CASE clip_id WHEN :rank_model THEN {column} END
)"""
KEYS_OF_GROUP: Final = f"""
SELECT key0, key1 FROM images
WHERE {_IN_GROUP} AND generator_id IS ? AND (? IS NULL OR sampler_version = ?) AND init_md5 = ?
    AND typeof(key0) = 'integer' AND typeof(key1) = 'integer'
"""

# By id.
SELECT_IMAGES: Final = f"SELECT {', '.join(IMAGE_COLUMNS)} FROM images WHERE id IN (SELECT value FROM json_each(?))"
_HAS_SCORE: Final = """EXISTS (
    SELECT 1 FROM scores JOIN scorers ON scorers.id = scorer_id
    WHERE image_id = images.id AND model_id = {model_id} AND reads = '{reads}'
)"""
_LACKS_SCORE: Final = "(clip_score_input IS NULL OR clip_score_tokenized IS NULL)"
# Whether the columns of an image take scores of the CLIP :clip_id: they are empty, or they are its own and not whole.
COLUMNS_DUE: Final = f"""(
    (clip_score_input IS NULL AND clip_score_tokenized IS NULL) OR ({_LACKS_SCORE} AND clip_id = :clip_id)
    OR (:rescore AND clip_id IS NOT :clip_id)
)"""
# Whether the table of scores takes them: the columns are another CLIP's.
SCORES_DUE: Final = f"""(
    ({_LACKS_SCORE} OR :adds) AND clip_id IS NOT :clip_id
    AND NOT {_HAS_SCORE.format(model_id=":clip_id", reads="input")}
)"""
TO_SCORE: Final = f"""(
    {COLUMNS_DUE} OR {SCORES_DUE}
    OR (:head_id IS NOT NULL AND NOT {_HAS_SCORE.format(model_id=":head_id", reads="image")})
    OR (:vectors AND NOT EXISTS (SELECT 1 FROM vectors WHERE model_id = :clip_id AND image_id = images.id))
)"""

# Writing. The same sample is stored once; unlike OR IGNORE, this still refuses bad values.
INSERT_IMAGE: Final = f"{_INSERT_IMAGE} ON CONFLICT DO NOTHING"
# A sample that the target has without scores gets the source's, if the tokens are the same: on other hardware, or with
# another dtype, the same key can give other tokens.
INSERT_OR_FILL_SCORES: Final = f"""
{_INSERT_IMAGE}
ON CONFLICT DO UPDATE SET clip_score_input = excluded.clip_score_input,
    clip_score_tokenized = excluded.clip_score_tokenized, clip_id = excluded.clip_id,
    time_scored = excluded.time_scored
WHERE clip_score_input IS NULL AND excluded.clip_score_input IS NOT NULL AND quantvec_md5 = excluded.quantvec_md5
"""
SET_SCORES: Final = """
UPDATE images SET clip_score_input = ?, clip_score_tokenized = ?, clip_id = ?, time_scored = ? WHERE id = ?
"""

# About all images, or those of a selection.
COUNT_LENGTHS: Final = """
SELECT length(quantvec), count(*) FROM {images} WHERE typeof(quantvec) = 'blob' GROUP BY 1 ORDER BY 1
"""
RANGE: Final = """
SELECT count({column}), min({column}), avg({column}), max({column}) FROM {images}
WHERE typeof({column}) IN ('real', 'integer')
"""
COUNT_DTYPES: Final = """
SELECT substr(dtype, 1, 40), count(*) FROM {images} WHERE typeof(dtype) = 'text' GROUP BY 1 ORDER BY 1
"""
COUNT_CONTINUED: Final = "SELECT count(*) FROM {images} WHERE init_count > 0"
COUNT_BY: Final = "SELECT {column}, count(*) FROM {images} WHERE typeof({column}) = 'integer' GROUP BY 1"
FIRST_TIME: Final = "SELECT min(time_start) FROM {images} WHERE typeof(time_start) = 'real'"
LAST_TIME: Final = "SELECT max(time_end) FROM {images} WHERE typeof(time_end) = 'real'"
USUAL_LENGTH: Final = """
SELECT length(quantvec) FROM images WHERE typeof(quantvec) = 'blob' AND codec_id IS NULL
GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1
"""


# Many rows, in small pieces, so that no query stays open between two rows.


def read_rows(connection: Connection, ids: Iterable[int]) -> Iterator[ImageRow]:
    """Yield images in the order of `ids`; see `Archive.read_rows`."""
    chunk: list[int] = []
    for row_id in ids:
        chunk.append(row_id)
        if len(chunk) == CHUNK_ROWS:
            yield from _read_chunk(connection, chunk)
            chunk = []
    yield from _read_chunk(connection, chunk)


def scan(
    connection: Connection, columns: Sequence[str], condition: str, parameters: dict[str, Any], table: str = "images"
) -> Iterator[Row]:
    """Yield these columns of the rows that meet a condition, by id; see `Archive.scan`."""
    query = (
        f"SELECT {', '.join(('id', *columns))} FROM {table} WHERE id > :after AND ({condition})"
        f" ORDER BY id LIMIT {CHUNK_ROWS}"
    )
    after: float = -math.inf  # below every id
    while rows := _limited(connection, query, {**parameters, "after": after}):
        for row in rows:
            if not isinstance(row[0], int) or row[0] <= after:
                raise ArchiveError(f"{connection.path}: the ids of {table} do not ascend at {row[0]!r:.40}")
            after = row[0]
        yield from (row[1:] for row in rows)


def _read_chunk(connection: Connection, ids: list[int]) -> Iterator[ImageRow]:
    """Yield rows in the order of `ids`, in halves where a page is damaged or the rows are too large together."""
    try:
        rows = _find_rows(connection, ids)
    except ArchiveError as error:
        if not is_damage(error):
            raise
        if len(ids) == 1:
            yield parse_image((ids[0], *[None] * (len(IMAGE_COLUMNS) - 1)))
            return
        rows = None
    if rows is None:
        middle = len(ids) // 2
        yield from _read_chunk(connection, ids[:middle])
        yield from _read_chunk(connection, ids[middle:])
        return
    for row_id in ids:
        if row_id in rows:
            yield parse_image(rows[row_id])


def _find_rows(connection: Connection, ids: list[int]) -> dict[int, Row] | None:
    """Return rows by id; None if they are more than one and more than CHUNK_BYTES."""
    found: dict[int, Row] = {}
    byte_count = 0
    for row in connection.rows(SELECT_IMAGES, [json.dumps(ids)]):
        found[row[0]] = row
        byte_count += sum(map(sys.getsizeof, row))
        if byte_count > CHUNK_BYTES and len(ids) > 1:
            return None
    return found


def _limited(connection: Connection, query: str, parameters: dict[str, Any]) -> list[Row]:
    """Return the first rows of a query, up to CHUNK_BYTES and at least one."""
    found: list[Row] = []
    byte_count = 0
    for row in connection.rows(query, parameters):
        found.append(row)
        byte_count += sum(map(sys.getsizeof, row))
        if byte_count > CHUNK_BYTES:
            break
    return found
