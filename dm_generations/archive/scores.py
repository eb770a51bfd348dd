"""Scores of any number of judges: who they are, what they have not seen yet, and how their scores are stored.

The two CLIP columns of `images` are what images are ranked by. A CLIP fills those that are empty or its own; what
another CLIP or an aesthetic head says goes to the table `scores`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.queries import COLUMNS_DUE, SCORE_OF_IMAGE, SCORES_DUE
from dm_generations.archive.records import GROUP_COLUMNS, GroupKey, parse_group_key, parse_text

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

READS: Final = ("input", "tokenized", "image")  # a prompt as typed, one as CLIP reads it back, or no prompt
DEFAULT_RANK: Final = "clip_score_input"  # the column
LEAST_DIGEST: Final = 6  # hex digits that stand for a model
MAX_LISTED: Final = 20
_COLUMN_OF: Final[Mapping[str, str]] = {"input": "clip_score_input", "tokenized": "clip_score_tokenized"}
# Those of the table, and the CLIPs of the columns.
_SCORERS: Final = """
SELECT max(said.id), models.id, kind, name, sha256, reads
FROM (
    SELECT id, model_id, reads FROM scorers
    UNION ALL SELECT 0, id, 'input' FROM models WHERE kind = 'clip'
    UNION ALL SELECT 0, id, 'tokenized' FROM models WHERE kind = 'clip'
) AS said
JOIN models ON models.id = said.model_id
WHERE kind IN ('clip', 'scorer')
GROUP BY models.id, reads ORDER BY models.id, reads
"""
_INSERT: Final = "INSERT INTO scores (scorer_id, time, image_id, value) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
_AMONG: Final = "SELECT id FROM images WHERE id IN (SELECT value FROM json_each(:ids)) AND {condition}"


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A judge: a model, and what it reads besides the image.

    Attributes:
        id: In `scorers`; 0 for a CLIP whose scores are only in the columns of images.
        model_id: In `models`.
        kind: Of the model, `clip` or `scorer`.
        name: Of the model, for people.
        sha256: Of its weights.
        reads: One of READS.
    """

    id: int
    model_id: int
    kind: str
    name: str
    sha256: str
    reads: str

    def value_sql(self) -> tuple[str, dict[str, Any]]:
        """Return SQL of its score of a row of images, with named parameters: from the table, or the columns."""
        column = _COLUMN_OF.get(self.reads, "NULL") if self.kind == "clip" else "NULL"
        return SCORE_OF_IMAGE.format(column=column), {"rank_scorer": self.id, "rank_model": self.model_id}

    def __str__(self) -> str:
        number = f"id {self.id}, " if self.id else ""
        return f"{self.name!r:.100} reading {self.reads} ({number}sha256 {self.sha256[:12]!a})"


@dataclass(frozen=True, slots=True)
class Due:
    """What images may lack besides scores in their two columns.

    Attributes:
        adds: Scores of the CLIP in the table, where the columns are another one's.
        head_id: A score of this model, which reads the image alone; 0 for one that the archive does not have.
        vectors: The CLIP's vector.
    """

    adds: bool = False
    head_id: int | None = None
    vectors: bool = False

    def parameters(self, rescore: bool, clip_id: int | None) -> dict[str, Any]:
        """Return the parameters of `queries.TO_SCORE`. No row has a model with id 0."""
        named = {"adds": self.adds, "head_id": self.head_id, "vectors": self.vectors}
        return named | {"rescore": rescore, "clip_id": clip_id or 0}


BASIC: Final = Due()


def read_scorers(archive: "Archive") -> list[ScorerInfo]:
    """Return the judges of an archive, those of its CLIP columns too, by model."""
    scorers = []
    for row_id, model_id, kind, name, sha256, reads in archive.connection.rows(_SCORERS):
        if reads in READS:  # in a damaged archive it may be anything
            scorers.append(ScorerInfo(row_id, model_id, kind, parse_text(name) or "", parse_text(sha256) or "", reads))
    return scorers


def find_scorer(archive: "Archive", text: str) -> ScorerInfo | None:
    """Return the judge that a user names.

    Args:
        archive: Open in any mode.
        text: A model's name, the first digits of its SHA-256, or the id of a scorer; name and digits may end in
            `:tokenized`, for example, which otherwise is the prompt as typed. `clip_score_input` is the column.

    Returns:
        None for the column.

    Raises:
        ArchiveError: There is no such scorer, or several. The message lists those that are there.
    """
    if text == DEFAULT_RANK:
        return None
    scorers = read_scorers(archive)
    name, _, reads = text.rpartition(":")
    found = [scorer for scorer in scorers if scorer.id and str(scorer.id) == text]
    found = found or _match(scorers, text) or [s for s in _match(scorers, name) if s.reads == reads]
    if len({scorer.model_id for scorer in found}) == 1:
        return next((scorer for scorer in found if scorer.reads == "input"), found[0])
    listed = "; ".join([DEFAULT_RANK, *map(str, scorers[:MAX_LISTED])])
    more = f"; and {len(scorers) - MAX_LISTED:,} more" if len(scorers) > MAX_LISTED else ""
    what = f"several scorers {text!r:.100}: name one by its id" if found else f"no scorer {text!r:.100}"
    raise ArchiveError(f"{archive.path} has {what}; it has {listed}{more}")


def read_scores(archive: "Archive", scorer: ScorerInfo | None) -> Iterator[tuple[int, GroupKey, float | None]]:
    """Yield id, group and score of all images; None is no score, or one that is not a finite number.

    Args:
        archive: Open in any mode.
        scorer: Whose scores; None is the column clip_score_input.
    """
    sql, parameters = (DEFAULT_RANK, {}) if scorer is None else scorer.value_sql()
    query = f"SELECT id, {', '.join(GROUP_COLUMNS)}, {sql} FROM images"
    for row_id, *values, score in archive.connection.rows(query, parameters):
        is_score = isinstance(score, float) and math.isfinite(score)
        yield row_id, parse_group_key(tuple(values)), score if is_score else None


def _match(scorers: Sequence[ScorerInfo], text: str) -> list[ScorerInfo]:
    by_name = [scorer for scorer in scorers if scorer.name == text]
    is_digest = len(text) >= LEAST_DIGEST
    return by_name or [scorer for scorer in scorers if is_digest and scorer.sha256.startswith(text.lower())]


def scorer_id(archive: "Archive", model_id: int, reads: str) -> int:
    """Return the id of a scorer, which is added if it is new. Call it inside a transaction.

    Args:
        archive: Open for writing.
        model_id: Of its weights.
        reads: One of READS.
    """
    find = "SELECT id FROM scorers WHERE model_id = ? AND reads = ?"
    found = archive.connection.value(find, (model_id, reads))
    insert = "INSERT INTO scorers (model_id, reads) VALUES (?, ?)"
    return archive.connection.insert(insert, (model_id, reads)) if found is None else found


def add_scores(
    archive: "Archive", scorer: int, rows: Iterable[tuple[int, float | None]], time_scored: float | None
) -> int:
    """Store scores of one judge, inside a transaction.

    Args:
        archive: Open for writing.
        scorer: Its id.
        rows: (id of the image, score) of each; one that is None, or that the archive has, is left out.
        time_scored: When, in UTC Unix seconds.

    Returns:
        How many were new.

    Raises:
        ArchiveError: An image or the scorer does not exist, or a score is not finite.
    """
    assert archive.connection.in_transaction, "add_scores outside a transaction"
    values = ((scorer, time_scored, image_id, value) for image_id, value in rows if value is not None)
    return archive.connection.write_many(_INSERT, values)


def add_clip_scores(
    archive: "Archive",
    rows: Sequence[tuple[int, float | None, float | None]],
    clip_id: int,
    time_scored: float,
    rescore: bool = False,
    adds: bool = False,
) -> None:
    """Store scores of a CLIP, inside a transaction: in the columns that are empty or its own, others as `scores`.

    Args:
        archive: Open for writing.
        rows: (id, clip_score_input, clip_score_tokenized) of each image.
        clip_id: Id of the model that scored them.
        time_scored: When, in UTC Unix seconds.
        rescore: Whether scores of another CLIP in the columns are replaced.
        adds: Whether images with such scores get others in the table.
    """
    ids = [row[0] for row in rows]
    due = set(find_due(archive, ids, clip_id, COLUMNS_DUE, rescore, adds))
    archive.set_scores([row for row in rows if row[0] in due], clip_id, time_scored)
    due = set(find_due(archive, ids, clip_id, SCORES_DUE, rescore, adds))
    if due:
        for position, reads in enumerate(_COLUMN_OF, 1):
            values = ((row[0], row[position]) for row in rows if row[0] in due)
            add_scores(archive, scorer_id(archive, clip_id, reads), values, time_scored)


def find_due(
    archive: "Archive", ids: Sequence[int], clip_id: int | None, condition: str, rescore: bool, adds: bool
) -> list[int]:
    """Return those of these images for which a condition of `queries` holds."""
    parameters = Due(adds).parameters(rescore, clip_id) | {"ids": json.dumps(ids)}
    return [row_id for (row_id,) in archive.connection.rows(_AMONG.format(condition=condition), parameters)]
