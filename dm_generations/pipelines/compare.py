"""Compare settings of an archive, or an archive with other images, by scores and vectors.

n, m: images   P: width of CLIP's vectors   R: resamples
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dm_generations.archive import Archive
from dm_generations.archive.records import GroupKey
from dm_generations.archive.scores import ScorerInfo, read_scores
from dm_generations.archive.vectors import read_vectors
from dm_generations.errors import UserError
from dm_generations.pipelines.find import unit_rows
from dm_generations.pipelines.token_files import read_npy

# Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", 2024, and its code.
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
SCORE_RESAMPLES = 1000
MAX_CMMD_IMAGES = 30_000  # of each side, as in the paper; its work grows with their square
INTERVAL = (2.5, 97.5)  # per cent
INTERVAL_ERRORS = 1.96  # the same in standard errors
_VENDI_RESAMPLES = (20, 200)  # of a group of many images, and of few; each takes eigenvalues
_VENDI_WORK = 2_000_000  # resamples times squared size
_ROWS = 2_048  # of a block
_RESAMPLED_VALUES = 1 << 22  # at a time


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; None where too few images were resampled to tell."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """The images of one setting, over all prompts.

    Attributes:
        setting: A group's key, of which `prompt_id` has no meaning; None for all settings together.
        image_count: Its images.
        score_count: Those that the scorer has scored.
        mean_score: Over these.
        vector_count: Those that have a vector.
        vendi: Mean over the prompts of the Vendi score of their images.
        cmmd: Of its images to the other ones.
    """

    setting: GroupKey | None
    image_count: int
    score_count: int
    mean_score: Estimate | None
    vector_count: int
    vendi: Estimate | None
    cmmd: float | None


@dataclass(frozen=True)
class Vectors:
    """Vectors of one CLIP: ids of images (n,), and float (n, P)."""

    ids: np.ndarray
    rows: np.ndarray

    @classmethod
    def read(cls, archive: Archive, model_id: int, image_ids: Iterable[int] | None = None) -> "Vectors":
        """Read those of an archive; see `read_vectors`."""
        return cls(*read_vectors(archive, model_id, image_ids))

    def of(self, ids: list[int]) -> np.ndarray:
        """Return those of these images that have one, (k, P)."""
        places = np.searchsorted(self.ids, ids)
        is_there = places < len(self.ids)
        is_there[is_there] = self.ids[places[is_there]] == np.asarray(ids)[is_there]
        return self.rows[places[is_there]]


def read_vector_file(path: Path, width: int) -> np.ndarray:
    """Return the vectors (n, P) float of a `.npy` file.

    Args:
        path: As other programs publish the vectors of a reference set.
        width: P, of the vectors to compare them with.

    Raises:
        UserError: The file has something else, or no vector.
    """
    vectors = read_npy(path)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or not len(vectors) or vectors.shape[1] != width:
        found = f"{vectors.dtype} of shape {vectors.shape}"
        raise UserError(
            f"{path} has {found}, not vectors (n, {width}) of floats as the CLIP of this archive gives them"
        )
    if not all(np.isfinite(vectors[start : start + _ROWS]).all() for start in range(0, len(vectors), _ROWS)):
        raise UserError(f"{path} has vectors with NaN or infinite values")
    return vectors


class Cmmd:
    """CMMD of sets of images to one set: squared maximum mean discrepancy of their vectors, times 1000.

    The kernel is a Gaussian of sigma 10 on vectors of unit length, the estimate the one with the smaller variance,
    which counts each vector's pair with itself. The larger it is, the more the sets differ. Of a set of more than
    MAX_CMMD_IMAGES so many count, evenly spread.
    """

    def __init__(self, others: np.ndarray):
        """Take the vectors of that set, (m, P) of any float type and length; m is at least 1."""
        self._others = _spread(others)
        self._mean_of_others = _mean_kernel(self._others, self._others)

    def of(self, vectors: np.ndarray) -> float:
        """Return the CMMD of vectors (n, P), n at least 1, to the other set."""
        own = _spread(vectors)
        # exp(-|a - b|^2 / 2 s^2) = exp(-1 / s^2) exp(a.b / s^2). The ones of the latter cancel, so it is taken less 1.
        total = _mean_kernel(own, own) + self._mean_of_others - 2 * _mean_kernel(own, self._others)
        return float(CMMD_SCALE * np.exp(-1 / CMMD_SIGMA**2) * total)


def compare(
    archive: Archive,
    scorer: ScorerInfo | None,
    vectors: Vectors | None,
    others: np.ndarray | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare the settings of an archive.

    Intervals are bootstrap intervals: the images of each prompt are drawn again, with replacement. The prompts stay.

    Args:
        archive: Open in any mode.
        scorer: Whose scores count; None is clip_score_input.
        vectors: Of its images, None for none.
        others: Vectors of the images to compare with, (m, P).
        seed: Of the resampling.

    Returns:
        Of each setting, in order, and last of all together, which has no Vendi score.
    """
    settings: dict[tuple, dict[int, tuple[list[int], list[float]]]] = {}
    keys: dict[tuple, GroupKey] = {}
    for row_id, key, score in read_scores(archive, scorer):
        keys.setdefault(key.values()[1:], key)
        prompts = settings.setdefault(key.values()[1:], {})
        ids, scores = prompts.setdefault(key.prompt_id, ([], []))
        ids.append(row_id)
        if score is not None:
            scores.append(score)
    distance = None if others is None else Cmmd(others)
    found = [
        _compare_setting(keys[setting], settings[setting], vectors, distance, np.random.default_rng(seed))
        for setting in sorted(settings)
    ]
    everything = [scores for prompts in settings.values() for _, scores in prompts.values()]
    whole = Comparison(
        None,
        sum(one.image_count for one in found),
        sum(one.score_count for one in found),
        bootstrap_mean(everything, np.random.default_rng(seed)),
        0 if vectors is None else len(vectors.ids),
        None,
        None if vectors is None or distance is None or not len(vectors.ids) else distance.of(vectors.rows),
    )
    return [*found, whole]


def _compare_setting(
    key: GroupKey,
    prompts: Mapping[int, tuple[list[int], list[float]]],
    vectors: Vectors | None,
    distance: Cmmd | None,
    random: np.random.Generator,
) -> Comparison:
    mean_score = bootstrap_mean([scores for _, scores in prompts.values()], random)
    groups: list[np.ndarray] = []
    if vectors is not None:
        groups = [group for group in (vectors.of(ids) for ids, _ in prompts.values()) if len(group)]
    return Comparison(
        key,
        sum(len(ids) for ids, _ in prompts.values()),
        sum(len(scores) for _, scores in prompts.values()),
        mean_score,
        sum(map(len, groups)),
        bootstrap_vendi(groups, random),
        None if distance is None or not groups else distance.of(np.concatenate(groups)),
    )


def _spread(vectors: np.ndarray) -> np.ndarray:
    if len(vectors) <= MAX_CMMD_IMAGES:
        return vectors
    return vectors[np.linspace(0, len(vectors) - 1, MAX_CMMD_IMAGES).round().astype(np.int64)]


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean of exp(a.b / sigma^2) - 1 over all rows a of x and b of y."""
    total = 0.0
    for start in range(0, len(x), _ROWS):
        rows = unit_rows(x[start : start + _ROWS]) / np.float32(CMMD_SIGMA**2)
        for other in range(start if x is y else 0, len(y), _ROWS):
            t = rows @ unit_rows(y[other : other + _ROWS]).T
            # Four terms of the series: |t| is at most 0.01, so the next one is below 1e-12.
            series = t / 24
            for divisor in (6, 2, 1):
                series += np.float32(1 / divisor)
                series *= t
            total += float(series.sum(dtype=np.float64)) * (2 if x is y and other > start else 1)
    return total / (len(x) * len(y))


def vendi_score(vectors: np.ndarray) -> float:
    """Return the Vendi score of vectors (n, P): how many different ones they are worth, from 1 to n.

    It is the exponential of the entropy of the eigenvalues of their cosines over n (Friedman and Dieng, 2023).
    """
    return float(_vendi_of(_gram(unit_rows(vectors)) / len(vectors)))


def _gram(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows


def _vendi_of(matrices: np.ndarray) -> np.ndarray:
    """Return the exponential of the entropy of the eigenvalues of matrices (..., k, k)."""
    values = np.maximum(np.linalg.eigvalsh(matrices), 0)
    logs = np.log(np.where(values > 0, values, 1))
    return np.exp(-np.sum(values * logs, axis=-1))


def bootstrap_mean(groups: Iterable[list[float]], random: np.random.Generator) -> Estimate | None:
    """Return the mean of all values with its interval, values resampled within their groups; None without any."""
    arrays = [np.asarray(group, np.float64) for group in groups if len(group)]
    if not arrays:
        return None
    count = sum(map(len, arrays))
    totals = np.zeros(SCORE_RESAMPLES)
    for array in arrays:
        totals += _resample(len(array), SCORE_RESAMPLES, random, functools.partial(_sum_of, array))
    value = sum(float(array.sum()) for array in arrays) / count
    if max(map(len, arrays)) < 2:
        return Estimate(value, None, None)
    low, high = np.percentile(totals / count, INTERVAL)
    return Estimate(value, float(low), float(high))


def _sum_of(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return values[places].sum(axis=1)


def bootstrap_vendi(groups: list[np.ndarray], random: np.random.Generator) -> Estimate | None:
    """Return the mean Vendi score of groups of vectors (n, P), with its interval; None without any group.

    Images that are drawn twice make a resample less diverse than the group, so the resamples tell the spread alone, and
    the interval lies around the value.
    """
    if not groups:
        return None
    value = float(np.mean([vendi_score(group) for group in groups]))
    if max(map(len, groups)) < 2:
        return Estimate(value, None, None)
    variance = sum(_vendi_variance(unit_rows(group).astype(np.float64), random) for group in groups)
    reach = INTERVAL_ERRORS * math.sqrt(variance) / len(groups)
    return Estimate(value, max(1.0, value - reach), value + reach)


def _vendi_variance(rows: np.ndarray, random: np.random.Generator) -> float:
    """Return the variance of the Vendi score of rows (n, P), by the bootstrap."""
    count, width = rows.shape
    gram = _gram(rows) / count
    fewest, most = _VENDI_RESAMPLES
    resamples = min(most, max(fewest, _VENDI_WORK // len(gram) ** 2))

    def score(places: np.ndarray) -> np.ndarray:
        if count <= width:
            return _vendi_of(gram[places[:, :, None], places[:, None, :]])
        return np.array([_vendi_of(_gram(rows[place]) / count) for place in places])

    return float(_resample(count, resamples, random, score, len(gram) ** 2).var(ddof=1))


def _resample(
    count: int,
    resamples: int,
    random: np.random.Generator,
    statistic: Callable[[np.ndarray], np.ndarray],
    values_each: int = 0,
) -> np.ndarray:
    """Return a statistic (R,) of places (R, count) that are drawn with replacement, some at a time."""
    at_once = max(1, _RESAMPLED_VALUES // max(count, values_each))
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    return np.concatenate([statistic(random.integers(0, count, (size, count))) for size in sizes])
