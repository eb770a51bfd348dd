"""CLIP's vectors of images: stored as float16, read back as one matrix. Importing it imports no NumPy."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.records import ModelInfo

if TYPE_CHECKING:
    import numpy as np

    from dm_generations.archive.database import Archive

VECTOR_DTYPE: Final = "<f2"  # of NumPy: little-endian float16
MAX_WIDTH: Final = 8_192  # numbers of a vector; far above any CLIP
_MAGNITUDE: Final = 0x7FFF  # the bits of a float16 but its sign
_INFINITY: Final = 0x7C00  # these bits of infinity; those of NaN are higher
_CHECKED_ROWS: Final = 2_048  # at a time, which a cache holds
_INSERT: Final = "INSERT INTO vectors (model_id, image_id, vector) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_SELECT: Final = """
SELECT image_id, vector FROM vectors WHERE model_id = ? AND (? OR image_id IN (SELECT value FROM json_each(?)))
ORDER BY image_id
"""
_WIDTH: Final = "SELECT length(vector) / 2 FROM vectors WHERE model_id = ? LIMIT 1"


def add_vectors(archive: "Archive", model_id: int, rows: Iterable[tuple[int, bytes]]) -> int:
    """Store vectors of a CLIP, inside a transaction.

    Args:
        archive: Open for writing.
        model_id: Of the CLIP.
        rows: (id of the image, little-endian float16) of each; one that the archive has is left as it is.

    Returns:
        How many were new.

    Raises:
        ArchiveError: A vector has another length than the others of its model.
    """
    assert archive.connection.in_transaction, "add_vectors outside a transaction"
    width = archive.connection.value(_WIDTH, (model_id,))

    def values() -> Iterator[tuple[int, int, bytes]]:
        nonlocal width
        for image_id, vector in rows:
            width = len(vector) // 2 if width is None else width
            if len(vector) != 2 * width:
                raise ArchiveError(
                    f"{archive.path}: a vector of {len(vector) // 2:,} numbers does not fit the others of its model, "
                    f"which have {width:,}"
                )
            yield model_id, image_id, vector

    return archive.connection.write_many(_INSERT, values())


def count_vectors(archive: "Archive") -> dict[int, int]:
    """Return how many vectors there are of each model, by its id."""
    return dict(archive.connection.rows("SELECT model_id, count(*) FROM vectors GROUP BY 1 ORDER BY 1"))


def find_vector_model(archive: "Archive", model: ModelInfo | None = None) -> int:
    """Return the id of the CLIP whose vectors are to be read.

    Args:
        archive: Open in any mode.
        model: The CLIP; None is the only one that has vectors.

    Raises:
        ArchiveError: It has no vectors, or several have some and none is named. The message has the command.
    """
    counts, models = count_vectors(archive), archive.models()
    command = f"python -m dm_generations score --vectors --db {archive.path}"
    if not counts:
        raise ArchiveError(f"{archive.path} has no vectors; make them with: {command}")
    names = _list_models(models, counts)
    if model is None:
        if len(counts) > 1:
            raise ArchiveError(f"{archive.path} has vectors of {names}: choose one with --clip")
        return next(iter(counts))
    found = next((i for i in counts if i in models and models[i].matches(model)), None)
    if found is None:
        raise ArchiveError(
            f"{archive.path} has no vectors of CLIP {model.name!r:.100}, only of {names}: give that one with --clip, "
            f"or make others with: {command} --clip PATH"
        )
    return found


def _list_models(models: Mapping[int, ModelInfo], counts: Mapping[int, int]) -> str:
    named = ((models.get(row_id), count) for row_id, count in counts.items())
    return ", ".join(f"{model.name!r:.100} ({count:,})" if model else f"none ({count:,})" for model, count in named)


def read_vectors(
    archive: "Archive", model_id: int, image_ids: Iterable[int] | None = None
) -> "tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float16]]]":
    """Read the vectors of a model.

    Args:
        archive: Open in any mode.
        model_id: Of the CLIP.
        image_ids: Only of these images; None is all.

    Returns:
        Ids of images, ascending, (n,) int64, and their vectors, (n, P) float16.

    Raises:
        ArchiveError: A vector is not one, or is not as long as the others.
    """
    import numpy as np

    wanted = None if image_ids is None else json.dumps(list(image_ids))
    ids: list[int] = []
    content = bytearray()
    size = 0  # bytes of each vector
    for image_id, blob in archive.connection.rows(_SELECT, (model_id, wanted is None, wanted or "[]")):
        is_blob = isinstance(image_id, int) and isinstance(blob, bytes)
        is_vector = is_blob and 0 < len(blob) <= 2 * MAX_WIDTH and len(blob) % 2 == 0
        if not is_vector or len(blob) != (size or len(blob)):
            raise ArchiveError(f"{archive.path}: the vector of image {image_id!r:.40} is damaged; run `verify`")
        size = len(blob)
        ids.append(image_id)
        content += blob
    vectors = np.frombuffer(content, VECTOR_DTYPE).reshape(len(ids), size // 2)
    bits = vectors.view("<u2")
    parts = (bits[start : start + _CHECKED_ROWS] for start in range(0, len(ids), _CHECKED_ROWS))
    if any((part & _MAGNITUDE).max() >= _INFINITY for part in parts):
        raise ArchiveError(f"{archive.path}: a vector holds numbers that are not finite; remove it")
    return np.array(ids, np.int64), vectors.astype(np.float16, copy=False)
