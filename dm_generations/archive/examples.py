"""What training reads of an archive: an index of the images of a selection, and the pairs of which people chose one."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.selection import RANGE_COLUMNS, Where

if TYPE_CHECKING:
    from dm_generations.archive.database import Archive

_NAN: Final = float("nan")
_TOO_LARGE: Final = 1e30  # for a score, whose squares are added up
_EXAMPLES: Final = f"""
SELECT id, prompt_id, codec_id, {{rank}}, {RANGE_COLUMNS["rating"]} FROM images WHERE {{where}} ORDER BY id
"""
_PAIRS: Final = """
SELECT image_id, other_id, value FROM ratings WHERE kind = 'pair' AND value IN ('first', 'second') ORDER BY id
"""

Example = tuple[int, int, int, float, float]


def read_examples(archive: "Archive", where: Where) -> Iterator[Example]:
    """Yield id, prompt id, codec id, score and mean rating of the images of a selection, by id.

    Args:
        archive: Open in any mode.
        where: A compiled selection; its `rank` is the score.

    Yields:
        Five numbers; the codec is 0 where none is recorded, score and rating are NaN where there are none, or none
        that can be counted with.

    Raises:
        ArchiveError: An id is not a whole number, as in a damaged file.
    """
    query = _EXAMPLES.format(rank=where.rank, where=where.sql)
    for row_id, prompt_id, codec_id, *values in archive.connection.rows(query, where.parameters):
        if not isinstance(row_id, int) or not isinstance(prompt_id, int) or not isinstance(codec_id, int | None):
            raise ArchiveError(f"{archive.path}: an id of image {row_id!r:.40} is not a whole number; run `verify`")
        score, rating = (float(value) if _is_number(value) else _NAN for value in values)
        yield row_id, prompt_id, codec_id or 0, score, rating


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _TOO_LARGE


def read_pairs(archive: "Archive") -> Iterator[tuple[int, int]]:
    """Yield the ids of the better and of the worse image of each pair that someone judged, by time of storing."""
    for image_id, other_id, value in archive.connection.rows(_PAIRS):
        if isinstance(image_id, int) and isinstance(other_id, int):
            yield (image_id, other_id) if value == "first" else (other_id, image_id)
