"""Bradley-Terry strengths against a case computed by hand and a reference of another method."""

import itertools
import math

import numpy as np
import pytest
from archive_kit import fill, new_image
from scipy.optimize import minimize

from dm_generations.archive import Archive
from dm_generations.archive.ratings import Rating, add_ratings
from dm_generations.errors import UserError
from dm_generations.pipelines import rank
from dm_generations.pipelines.rank import BY, fit_bradley_terry, rank_ratings


def test_two_items_by_hand():
    """One beats another in 3 of 4 pairs. With strengths x and -x the derivative is 3 - 4 p(2x) + 1/2 - p(x) = 0."""
    pairs = np.array([[0, 0, 1, 0], [1, 1, 0, 1]])
    strengths, errors = fit_bradley_terry(2, pairs, np.array([1.0, 1.0, 0.0, 0.0]))
    low, high = 0.0, 10.0
    for _ in range(100):
        x = (low + high) / 2
        slope = 3.5 - 4 / (1 + math.exp(-2 * x)) - 1 / (1 + math.exp(-x))
        low, high = (x, high) if slope > 0 else (low, x)
    assert strengths == pytest.approx([x, -x], abs=1e-9)
    # Along (1, -1) / sqrt(2) the information is 2 * 4 p (1 - p) + q (1 - q); each item has half of that variance.
    p, q = 1 / (1 + math.exp(-2 * x)), 1 / (1 + math.exp(-x))
    assert errors == pytest.approx([math.sqrt(0.5 / (8 * p * (1 - p) + q * (1 - q)))] * 2, rel=1e-9)


def test_random_pairs_as_a_general_minimiser_finds_them():
    rng = np.random.default_rng(3)
    count = 9
    pairs = np.array(
        [rng.choice(6, 2, replace=False) if i % 3 else rng.choice([6, 7, 8], 2, False) for i in range(80)]
    ).T
    wins = rng.choice([0.0, 0.5, 1.0], 80)

    def loss(t):
        difference = t[pairs[0]] - t[pairs[1]]
        drawn = 0.5 * (np.logaddexp(0, t) + np.logaddexp(0, -t))
        return (wins * np.logaddexp(0, -difference) + (1 - wins) * np.logaddexp(0, difference)).sum() + drawn.sum()

    found = minimize(loss, np.zeros(count), method="BFGS", options={"gtol": 1e-9})
    strengths, errors = fit_bradley_terry(count, pairs, wins)
    assert strengths == pytest.approx(found.x - found.x.mean(), abs=1e-6)
    step, hessian = 1e-3, np.empty((count, count))
    for i, j in itertools.product(range(count), repeat=2):
        a, b = step * np.eye(count)[i], step * np.eye(count)[j]
        corners = [loss(found.x + x * a + y * b) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
        hessian[i, j] = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * step**2)
    centre = np.eye(count) - 1 / count
    assert errors == pytest.approx(np.sqrt((centre @ np.linalg.inv(hessian) @ centre).diagonal()), rel=1e-4)


def test_an_item_that_won_all_is_finite_and_nothing_is_nothing():
    pairs = np.array([[0] * 1000, [1] * 1000])
    strengths, errors = fit_bradley_terry(2, pairs, np.ones(1000))
    assert np.isfinite(strengths).all() and np.isfinite(errors).all() and strengths[0] > 1
    assert [values.size for values in fit_bradley_terry(0, np.zeros((2, 0), int), np.zeros(0))] == [0, 0]


def test_the_order_of_pairs_does_not_matter():
    rng = np.random.default_rng(1)
    pairs = np.array([rng.choice(5, 2, replace=False) for _ in range(30)]).T
    wins = rng.choice([0.0, 0.5, 1.0], 30)
    assert fit_bradley_terry(5, pairs[::-1], 1 - wins)[0] == pytest.approx(fit_bradley_terry(5, pairs, wins)[0])


def test_too_many_items_are_refused(monkeypatch):
    monkeypatch.setattr(rank, "MAX_COMPONENT", 3)
    with pytest.raises(UserError, match="4"):
        fit_bradley_terry(4, np.array([[0, 1, 2], [1, 2, 3]]), np.ones(3))


@pytest.fixture
def judged(tmp_path):
    """Settings 1 (images 1, 2) beat settings 2 (images 3, 4) in 3 of 4 pairs; the rest says nothing of settings."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, *(new_image(key, top_k=k) for k in (5, 9) for key in (1, 2)))
        fill(archive, new_image(1, prompt="a cat"))
        values = [(1, 3, "first"), (3, 2, "second"), (2, 4, "tie"), (4, 1, "tie"), (1, 2, "first"), (2, 3, "bad")]
        add_ratings(archive, [Rating("ann", "pair", a, value, float(i), b) for i, (a, b, value) in enumerate(values)])
        yield archive


def test_ranking_by_settings(judged):
    best, worst = rank_ratings(judged, "settings")
    assert (best.item["top_k"], worst.item["top_k"]) == (5, 9)
    assert (best.pair_count, worst.pair_count) == (4, 4)
    pairs, wins = np.array([[0, 0, 0, 0], [1, 1, 1, 1]]), np.array([1.0, 1.0, 0.5, 0.5])
    strengths, errors = fit_bradley_terry(2, pairs, wins)
    assert [best.strength, worst.strength] == pytest.approx(list(strengths))
    assert (best.high - best.low) / 2 == pytest.approx(1.96 * errors[0], rel=1e-3)


@pytest.mark.parametrize(("by", "count"), [("settings", 2), ("prompt", 0), ("model", 0), ("image", 4)])
def test_what_is_ranked(judged, by, count):
    assert by in BY
    assert len(rank_ratings(judged, by)) == count
