"""Search among vectors, against plain loops in float64."""

import numpy as np
import pytest

from dm_generations.pipelines import find
from dm_generations.pipelines.find import find_duplicates, find_similar, unit_rows


def random_vectors(count, width=16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float16)


def cosine(a, b) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(params=[0, 20_000], ids=["whole blocks", "pairs"])
def small_blocks(monkeypatch, request):
    monkeypatch.setattr(find, "_FEW_PAIRS", request.param)
    monkeypatch.setattr(find, "_SEARCH_ROWS", 7)
    monkeypatch.setattr(find, "_PAIR_ROWS", 7)
    monkeypatch.setattr(find, "_SKETCH_WIDTH", 4)


def test_the_most_similar_come_first(small_blocks):
    vectors, query = random_vectors(50), random_vectors(1, seed=1)[0]
    ids = np.arange(100, 150)
    expected = sorted(((-cosine(row, query), i) for row, i in zip(vectors, ids, strict=True)))
    for limit in (1, 10, 50, 99):
        found = find_similar(ids, vectors, query, limit)
        assert [match.image_id for match in found] == [i for _, i in expected[:limit]]
        np.testing.assert_allclose([match.similarity for match in found], [-s for s, _ in expected[:limit]], atol=1e-5)


def test_equal_images_come_by_id():
    vectors = np.repeat(random_vectors(1), 9, axis=0)
    found = find_similar(np.arange(9), vectors, vectors[0], 4)
    assert [match.image_id for match in found] == [0, 1, 2, 3]
    assert find_similar(np.arange(0), vectors[:0], vectors[0], 4) == []


def plain_duplicates(ids, vectors, threshold):
    sets, taken = [], set()
    for i in range(len(ids)):
        if i in taken:
            continue
        joined = [j for j in range(i + 1, len(ids)) if j not in taken and cosine(vectors[i], vectors[j]) >= threshold]
        taken |= {i, *joined}
        if joined:
            sets.append([int(ids[i]), *(int(ids[j]) for j in joined)])
    return sets


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_duplicates_are_those_of_plain_loops(small_blocks, threshold, seed):
    random = np.random.default_rng(seed)
    centres = random_vectors(20, seed=seed).astype(np.float32)
    vectors = (centres[random.integers(0, 20, 60)] + random.normal(size=(60, 16)) * 0.2).astype(np.float16)
    ids = np.arange(60) * 3 + 5
    found = find_duplicates(ids, vectors, threshold)
    assert [[match.image_id for match in matches] for matches in found] == plain_duplicates(ids, vectors, threshold)
    assert found or threshold == 0.99
    row_of = dict(zip(ids.tolist(), vectors, strict=True))
    for first, *others in found:
        assert first.similarity == 1.0
        for match in others:
            assert match.similarity == pytest.approx(cosine(row_of[first.image_id], row_of[match.image_id]), abs=1e-5)


def test_equal_images_are_one_set(small_blocks):
    vectors = np.repeat(random_vectors(1), 40, axis=0)
    (only,) = find_duplicates(np.arange(40), vectors, 0.999)
    assert [match.image_id for match in only] == list(range(40))


def test_nothing_to_find():
    assert find_duplicates(np.arange(0), np.empty((0, 0), np.float16), 0.9) == []
    assert find_duplicates(np.arange(1), random_vectors(1), 0.9) == []
    zeros = np.zeros((3, 16), np.float16)
    assert np.isfinite(unit_rows(zeros)).all() and find_duplicates(np.arange(3), zeros, 0.9) == []
