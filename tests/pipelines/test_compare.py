"""CMMD, Vendi score and bootstrap intervals, against references in float64."""

import numpy as np
import pytest
from archive_kit import CLIP, fill, new_image

from dm_generations.archive import Archive
from dm_generations.archive.scores import add_scores, find_scorer, scorer_id
from dm_generations.pipelines import compare as module
from dm_generations.pipelines.compare import Cmmd, Vectors, bootstrap_mean, bootstrap_vendi, compare, vendi_score


def units(count, width=12, seed=0, shift=0.0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)) + shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_cmmd(x, y) -> float:
    """As in the paper's own code (google-research/cmmd/distance.py), in float64."""
    gamma = 1 / (2 * 10**2)

    def mean_kernel(a, b):
        distances = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None] - 2 * a @ b.T
        return np.mean(np.exp(-gamma * distances))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@pytest.mark.parametrize("shift", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("rows", [7, 4096])
def test_cmmd_is_that_of_the_reference_in_float64(shift, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    x, y = units(50), units(33, seed=1, shift=shift)
    expected = reference_cmmd(x, y)
    assert Cmmd(y).of(x) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert Cmmd(x).of(y) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert Cmmd(x.copy()).of(x) == pytest.approx(0, abs=1e-6)
    assert Cmmd(y).of((3 * x).astype(np.float16)) == pytest.approx(expected, rel=0.02, abs=2e-3)  # lengths do not count


def test_vendi_score_counts_different_images():
    width = 12
    assert vendi_score(np.eye(width)[:5]) == pytest.approx(5)
    assert vendi_score(np.repeat(units(1), 6, axis=0)) == pytest.approx(1)
    assert vendi_score(np.repeat(np.eye(width)[:3], 20, axis=0)) == pytest.approx(3)  # more images than numbers
    rows = units(9)
    values = np.linalg.eigvalsh(rows @ rows.T / 9)
    values = values[values > 1e-12]
    assert vendi_score(rows) == pytest.approx(np.exp(-np.sum(values * np.log(values))), rel=1e-5)


def test_intervals_of_the_mean_have_the_width_of_its_error():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_mean([list(values[:100]), list(values[100:])], np.random.default_rng(1))
    assert found.value == pytest.approx(values.mean())
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    # What differs between prompts alone is no uncertainty: the prompts stay.
    apart = bootstrap_mean([[1.0] * 10, [9.0] * 10], np.random.default_rng(1))
    assert (apart.value, apart.low, apart.high) == (5.0, 5.0, 5.0)
    alone = bootstrap_mean([[1.0], []], np.random.default_rng(1))
    assert (alone.value, alone.low, alone.high) == (1.0, None, None)
    assert bootstrap_mean([[]], np.random.default_rng(1)) is None


@pytest.mark.parametrize("width", [8, 40])
def test_intervals_of_the_vendi_score(width):
    groups = [units(20, width, seed=seed) for seed in range(3)]
    found = bootstrap_vendi(groups, np.random.default_rng(1))
    assert found.value == pytest.approx(np.mean([vendi_score(group) for group in groups]))
    assert 1 <= found.low < found.value < found.high
    again = bootstrap_vendi(groups, np.random.default_rng(1))
    assert again == found
    alone = bootstrap_vendi([units(1)], np.random.default_rng(1))
    assert (alone.value, alone.low) == (pytest.approx(1), None)
    assert bootstrap_vendi([], np.random.default_rng(1)) is None


def test_settings_are_compared_over_all_prompts(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        for scale in (1.0, 10.0):
            for prompt in ("a cat", "a dog"):
                images = [
                    new_image(key, prompt=prompt, cond_scale=scale, clip_score_input=scale + key) for key in range(4)
                ]
                fill(archive, *images)
        fill(archive, new_image(9, prompt="a cat", cond_scale=1.0))  # without a score
        with archive.transaction():
            scorer = scorer_id(archive, archive.model_id(CLIP), "image")
            add_scores(archive, scorer, [(1, 5.0)], None)
        ids = np.arange(1, 17)
        vectors = Vectors(ids, units(16).astype(np.float16))
        low, high, whole = compare(archive, None, vectors, units(5, seed=7))
        judged, _, _ = compare(archive, find_scorer(archive, f"{CLIP.name}:image"), None)
    assert [one.setting.params.cond_scale for one in (low, high)] == [1.0, 10.0] and whole.setting is None
    assert [(one.image_count, one.score_count, one.vector_count) for one in (low, high, whole)] == [
        (9, 8, 8),
        (8, 8, 8),
        (17, 16, 16),
    ]
    assert [one.mean_score.value for one in (low, high, whole)] == [2.5, 11.5, 7.0]
    assert low.vendi.value == pytest.approx(
        np.mean([vendi_score(vectors.rows[:4]), vendi_score(vectors.rows[4:8])]), rel=1e-6
    )
    assert whole.vendi is None
    assert low.cmmd == pytest.approx(Cmmd(units(5, seed=7)).of(vectors.rows[:8]), rel=1e-6)
    assert whole.cmmd == pytest.approx(Cmmd(units(5, seed=7)).of(vectors.rows), rel=1e-6)
    assert (judged.score_count, judged.mean_score.value, judged.vendi, judged.cmmd) == (1, 5.0, None, None)
