"""Bradley-Terry strengths of settings, prompts, models or images, from the pairs that people judged.

n: items   P: pairs   C: items of a component, those that pairs connect   t: strengths, log-odds
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.ratings import read_ratings
from dm_generations.errors import UserError
from dm_generations.paths import model_label
from dm_generations.sampling.params import SamplingParams

By = Literal["settings", "prompt", "model", "image"]
BY: Final[tuple[By, ...]] = ("settings", "prompt", "model", "image")
WINS: Final = {"first": 1.0, "second": 0.0, "tie": 0.5}  # of the first image; a pair of which both are bad is no win
MAX_COMPONENT: Final = 3000  # items, whose matrix has 72 MB
CHUNK_PAIRS: Final = 512
_Z: Final = 1.959963984540054  # of a normal 95% interval
_TOLERANCE: Final = 1e-10  # of the gradient


@dataclass(frozen=True, slots=True)
class Strength:
    """How strong an item is beside the average one.

    Attributes:
        item: What it is: settings, a prompt, a model, or an image with its id.
        strength: Natural log-odds; the mean of all items is 0.
        low: Lower end of its 95% interval.
        high: Upper end.
        pair_count: Pairs that it was in.
    """

    item: dict[str, Any]
    strength: float
    low: float
    high: float
    pair_count: int


def rank_ratings(archive: Archive, by: By) -> list[Strength]:
    """Return the strengths of all that was judged in pairs, the strongest first.

    Ties count half for each. Pairs of which both were bad, and pairs within one item, say nothing and are left out.

    Args:
        archive: Open.
        by: What an item is.

    Raises:
        UserError: More than MAX_COMPONENT items hang together.
    """
    items: dict[tuple[Any, ...], int] = {}
    firsts: list[int] = []
    seconds: list[int] = []
    wins: list[float] = []
    texts = archive.prompts(), archive.sc_prompts(), {i: model.name for i, model in archive.models().items()}
    for first, second, value in _read_pairs(archive):
        keys = [_item_key(row, by, texts[2]) for row in (first, second)]
        if keys[0] == keys[1]:
            continue
        for key, place in zip(keys, (firsts, seconds), strict=True):
            place.append(items.setdefault(key, len(items)))
        wins.append(WINS[value])
    pairs = np.array([firsts, seconds], np.int64)  # (2, P)
    strengths, errors = fit_bradley_terry(len(items), pairs, np.array(wins, np.float64))
    counts = np.bincount(pairs.ravel(), minlength=len(items))
    found = [
        Strength(_describe(key, by, texts), float(t), float(t - _Z * error), float(t + _Z * error), int(count))
        for key, t, error, count in zip(items, strengths, errors, counts, strict=True)
    ]
    return sorted(found, key=lambda one: -one.strength)


def _read_pairs(archive: Archive) -> Iterable[tuple[ImageRow, ImageRow, str]]:
    chunk: list[tuple[int, int, str]] = []
    for _, _, first, second, value, _ in read_ratings(archive, ("pair",)):
        if value in WINS:
            chunk.append((first, second, value))
        if len(chunk) == CHUNK_PAIRS:
            yield from _with_rows(archive, chunk)
            chunk = []
    yield from _with_rows(archive, chunk)


def _with_rows(archive: Archive, pairs: Sequence[tuple[int, int, str]]) -> Iterable[tuple[ImageRow, ImageRow, str]]:
    ids = {row_id for pair in pairs for row_id in pair[:2]}
    rows = {row.id: row for row in archive.read_rows(sorted(ids))}
    for first, second, value in pairs:
        if first in rows and second in rows:  # otherwise the archive is damaged
            yield rows[first], rows[second], value


def _item_key(row: ImageRow, by: By, models: Mapping[int, str]) -> tuple[Any, ...]:
    match by:
        case "settings":
            return row.sc_prompt_id, *row.params.values(), row.extra_settings
        case "prompt":
            return (row.prompt_id,)
        case "model":
            return (None if row.generator_id is None else models.get(row.generator_id),)
    return row.id, row.prompt_id, row.sc_prompt_id, *row.params.values(), row.extra_settings


def _describe(key: tuple[Any, ...], by: By, texts: tuple[Mapping, Mapping, Mapping]) -> dict[str, Any]:
    prompts, sc_prompts, _ = texts
    if by == "prompt":
        return {"prompt_id": key[0], "prompt": prompts.get(key[0])}
    if by == "model":
        return {"model": "the one that ships" if model_label(key[0]) == "" else key[0]}
    item = {} if by == "settings" else {"id": key[0], "prompt": prompts.get(key[1])}
    sc_prompt_id, *params, extra_settings = key if by == "settings" else key[2:]
    item |= {"sc_prompt": sc_prompts.get(sc_prompt_id)}
    return (
        item | dict(zip(SamplingParams.__dataclass_fields__, params, strict=True)) | {"extra_settings": extra_settings}
    )


def fit_bradley_terry(count: int, pairs: np.ndarray, wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit strengths by Newton's method.

    Each item also draws once with one of strength 0, so that an item that won all its pairs is not infinitely strong.

    Args:
        count: n.
        pairs: (2, P), the two items of each pair.
        wins: (P,), 1 where the first won, 0 where the second did, 0.5 for a tie.

    Returns:
        Strengths (n,) with mean 0, and their standard errors (n,), from the inverse Hessian.

    Raises:
        UserError: More than MAX_COMPONENT items hang together.
    """
    strengths = np.zeros(count)
    variances, row_sums = np.zeros(count), np.zeros(count)
    labels = _label_components(count, pairs)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if not members.size:
            continue
        if members.size > MAX_COMPONENT:
            raise UserError(f"{members.size:,} items hang together by pairs; at most {MAX_COMPONENT:,} can be ranked")
        inside = labels[pairs[0]] == labels[members[0]]
        position = np.zeros(count, int)
        position[members] = np.arange(members.size)
        strengths[members], covariance = _fit_component(members.size, position[pairs[:, inside]], wins[inside])
        variances[members], row_sums[members] = covariance.diagonal(), covariance.sum(1)
    if not count:
        return strengths, variances
    # Of t_i minus the mean: C_ii - 2/n sum_j C_ij + 1/n^2 sum_jk C_jk.
    variances += row_sums.sum() / count**2 - 2 / count * row_sums
    return strengths - strengths.mean(), np.sqrt(np.maximum(variances, 0))


def _label_components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return (n,) a number for each item, equal for those that pairs connect."""
    parents = list(range(count))

    def find(item: int) -> int:
        while parents[item] != item:
            parents[item] = item = parents[parents[item]]
        return item

    for first, second in pairs.T.tolist():
        parents[find(first)] = find(second)
    return np.array([find(item) for item in range(count)], int)


def _fit_component(count: int, pairs: np.ndarray, wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return strengths (C,) and their covariance (C, C)."""
    won = np.zeros((count, count))  # by the row's item from the column's
    np.add.at(won, tuple(pairs), wins)
    np.add.at(won, tuple(pairs[::-1]), 1 - wins)
    met = won + won.T
    strengths = np.zeros(count)
    value = _log_posterior(strengths, won)
    while True:
        chance = _sigmoid(strengths[:, None] - strengths[None])
        own = _sigmoid(strengths)
        gradient = (won - met * chance).sum(1) + 0.5 - own
        information = met * chance * (1 - chance)
        hessian = np.diag(information.sum(1) + own * (1 - own)) - information
        if np.abs(gradient).max() < _TOLERANCE * max(1.0, met.sum()):
            return strengths, np.linalg.inv(hessian)
        step = np.linalg.solve(hessian, gradient)
        # The posterior is concave: a step that is short enough goes up, until rounding hides it.
        while (new_value := _log_posterior(strengths + step, won)) < value:
            step = step / 2
            if np.abs(step).max() < _TOLERANCE:
                return strengths, np.linalg.inv(hessian)
        strengths, value = strengths + step, new_value


def _log_posterior(strengths: np.ndarray, won: np.ndarray) -> float:
    against_all = -np.logaddexp(0, strengths[None] - strengths[:, None])
    against_average = -np.logaddexp(0, -strengths) - np.logaddexp(0, strengths)
    return math.fsum(((won * against_all).sum(), 0.5 * against_average.sum()))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
