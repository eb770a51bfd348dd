"""Search among the vectors of images, without decoding any: what is like something, and what is like another image.

n: images   P: width of CLIP's vectors   b: rows of a block
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_SEARCH_ROWS = 2_048  # of a block, when one vector is compared with all; a cache holds them
_PAIR_ROWS = 2_048  # of a block, when all are compared with all
_SKETCH_WIDTH = 32  # of the first look at pairs
_SKETCH_SAMPLE = 16_384  # images that the sketch is made of
_FEW_PAIRS = 20_000  # of a block: so many are compared one by one
_ROUNDING = 1e-3  # of float32, and more; of squared distances


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        image_id: Of the image.
        similarity: Cosine of its vector with the one that was looked for.
    """

    image_id: int
    similarity: float


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return rows at unit length, float32 (b, P); rows of zeros stay as they are."""
    rows = vectors.astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    rows /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
    return rows


def find_similar(ids: np.ndarray, vectors: np.ndarray, query: np.ndarray, limit: int) -> list[Match]:
    """Find the images whose vectors are most like one vector.

    Args:
        ids: Of n images.
        vectors: Theirs, (n, P) of any float type.
        query: (P,) of any length but 0.
        limit: At most so many.

    Returns:
        The most similar first; equal ones by id.
    """
    query = unit_rows(query[None])[0]
    starts = range(0, len(ids), _SEARCH_ROWS)
    # Not a product of matrices: for one vector, the threads of that cost more than they save.
    parts = [np.einsum("ij,j->i", unit_rows(vectors[start : start + _SEARCH_ROWS]), query) for start in starts]
    similarity = np.concatenate([np.empty(0, np.float32), *parts])
    best = np.arange(len(ids))
    if limit < len(ids):  # those above the last one that counts, and all that equal it
        best = np.flatnonzero(similarity >= np.partition(similarity, -limit)[-limit])
    order = best[np.lexsort((ids[best], -similarity[best]))][:limit]
    return [Match(int(ids[place]), float(similarity[place])) for place in order]


def find_duplicates(ids: np.ndarray, vectors: np.ndarray, threshold: float) -> list[list[Match]]:
    """Find sets of images that are nearly the same.

    Each image is compared with the first one of every set, in the order of ids, and joins the first set whose first
    image it is like; so no image is in two sets, and no set is a chain of small steps.

    Args:
        ids: Of n images, ascending.
        vectors: Theirs, (n, P) of any float type.
        threshold: Cosine from which on two images are alike, above 0.

    Returns:
        Sets of two images or more, each with its first image at the head, whose similarity is 1.
    """
    first_of = np.full(len(ids), -1)  # the place of the first image of the set that it has joined
    similarity = np.ones(len(ids), np.float32)
    sketches = _Sketches(vectors, threshold)
    for start in range(0, len(ids), _PAIR_ROWS):
        for later in range(start, len(ids), _PAIR_ROWS):
            firsts, others = (
                begin + np.flatnonzero(first_of[begin : begin + _PAIR_ROWS] < 0) for begin in (start, later)
            )
            for first, joined, cosines in _find_alike(vectors, sketches, firsts, others, threshold):
                if first_of[first] < 0:  # it has not itself joined a set in the meantime
                    is_free = first_of[joined] < 0
                    first_of[joined[is_free]] = first
                    similarity[joined[is_free]] = cosines[is_free]
    sets: dict[int, list[Match]] = {}
    for place in np.flatnonzero(first_of >= 0):
        first = int(first_of[place])
        found = sets.setdefault(first, [Match(int(ids[first]), 1.0)])
        found.append(Match(int(ids[place]), float(similarity[place])))
    return [sets[first] for first in sorted(sets)]


class _Sketches:
    """Narrow vectors that tell most pairs apart at a fraction of the work.

    An image's sketch is the projection of its vector on a few directions, and the length of what is left of it. Two
    sketches are never further from each other than the vectors, so pairs whose sketches are far apart need no look.
    """

    def __init__(self, vectors: np.ndarray, threshold: float):
        sample = unit_rows(vectors[:: max(1, len(vectors) // _SKETCH_SAMPLE)])
        mean = sample.mean(axis=0) if len(sample) else np.zeros(vectors.shape[1], np.float32)
        directions = _find_directions(sample - mean)
        self._rows = np.empty((len(vectors), directions.shape[1] + 1), np.float32)
        for start in range(0, len(vectors), _SEARCH_ROWS):
            rows = unit_rows(vectors[start : start + _SEARCH_ROWS]) - mean
            projected = rows @ directions
            left_over = np.einsum("ij,ij->i", rows, rows) - np.einsum("ij,ij->i", projected, projected)
            self._rows[start : start + _SEARCH_ROWS] = np.column_stack([projected, np.sqrt(np.maximum(left_over, 0))])
        self._least = -(2 - 2 * threshold + _ROUNDING) / 2

    def find_near(self, places: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return which pairs of these images can be alike, bool (len(places), len(others))."""
        left, right = self._rows[places], self._rows[others]
        # -|l - r|^2 / 2 as one product
        half, other_half = (np.einsum("ij,ij->i", x, x)[:, None] / 2 for x in (left, right))
        left = np.hstack([left, -half, np.ones_like(half)])
        right = np.hstack([right, np.ones_like(other_half), -other_half])
        return left @ right.T >= self._least


def _find_directions(rows: np.ndarray) -> np.ndarray:
    """Return directions in which rows (b, P) vary much, float32 (P, at most _SKETCH_WIDTH), orthonormal."""
    width = min(rows.shape[1], _SKETCH_WIDTH)
    directions = np.random.default_rng(0).normal(size=(rows.shape[1], width)).astype(np.float32)
    for _ in range(3):  # subspace iteration; any orthonormal directions would do, only slower
        directions = np.linalg.qr(rows.T @ (rows @ directions) if rows.any() else directions)[0]
    return directions


def _find_alike(
    vectors: np.ndarray, sketches: _Sketches, firsts: np.ndarray, others: np.ndarray, threshold: float
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield each of `firsts` that is like some later ones of `others`, with their places and cosines."""
    near = sketches.find_near(firsts, others)
    if np.count_nonzero(near) <= _FEW_PAIRS:
        rows, columns = _find_true(near)
        cosines = np.einsum("ij,ij->i", unit_rows(vectors[firsts[rows]]), unit_rows(vectors[others[columns]]))
    else:
        table = unit_rows(vectors[firsts]) @ unit_rows(vectors[others]).T
        rows, columns = _find_true(table >= threshold)
        cosines = table[rows, columns]
    is_alike = (cosines >= threshold) & (others[columns] > firsts[rows])
    rows, columns, cosines = rows[is_alike], columns[is_alike], cosines[is_alike]
    for start, end in itertools.pairwise([*np.flatnonzero(np.diff(rows, prepend=-1)), len(rows)]):
        yield int(firsts[rows[start]]), others[columns[start:end]], cosines[start:end]


def _find_true(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns as `np.nonzero` does; with one index at first, which is several times as fast."""
    rows, columns = np.divmod(np.flatnonzero(table), table.shape[1])
    return rows, columns
