"""Vectors as an archive stores them, and what is refused."""

import dataclasses

import numpy as np
import pytest
from archive_kit import CLIP, archive_v1, execute, fill, new_image

from dm_generations.archive import Archive, ArchiveError, merge
from dm_generations.archive.vectors import add_vectors, count_vectors, find_vector_model, read_vectors

OTHER = dataclasses.replace(CLIP, name="other", sha256="d" * 64)
VECTORS = np.random.default_rng(0).normal(size=(5, 6)).astype("<f2")


def add(archive, model, rows) -> int:
    with archive.transaction():
        return add_vectors(archive, archive.add_model(model), ((i, row.tobytes()) for i, row in rows))


@pytest.fixture
def archive(tmp_path):
    """Five images, of which 5, 2 and 3 have vectors."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, *map(new_image, range(5)))
        assert add(archive, CLIP, [(i, VECTORS[i - 1]) for i in (5, 2, 3)]) == 3
        yield archive


def test_vectors_are_read_as_they_were_stored(archive):
    model_id = find_vector_model(archive)
    assert model_id == archive.find_model(CLIP) == find_vector_model(archive, CLIP)
    ids, vectors = read_vectors(archive, model_id)
    assert list(ids) == [2, 3, 5] and vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, VECTORS[[1, 2, 4]])
    ids, vectors = read_vectors(archive, model_id, [5, 1, 2])
    assert list(ids) == [2, 5]
    assert add(archive, CLIP, [(2, VECTORS[0]), (1, VECTORS[0])]) == 1  # what is there stays
    np.testing.assert_array_equal(read_vectors(archive, model_id)[1], VECTORS[[0, 1, 2, 4]])
    assert [array.shape for array in read_vectors(archive, 77)] == [(0,), (0, 0)]


def test_vectors_of_another_width_are_refused(archive):
    with pytest.raises(ArchiveError, match=r"\b7\b.*\b6\b"):
        add(archive, CLIP, [(1, VECTORS[0]), (4, np.zeros(7, np.float16))])
    assert count_vectors(archive) == {archive.find_model(CLIP): 3}
    with pytest.raises(ArchiveError):
        add(archive, CLIP, [(99, VECTORS[0])])
    assert add(archive, OTHER, [(1, np.zeros(7, np.float16))]) == 1


def test_the_model_has_to_be_clear(archive, tmp_path):
    with pytest.raises(ArchiveError, match=r"'other'.*'tiny'.*score --vectors"):
        find_vector_model(archive, OTHER)
    add(archive, OTHER, [(1, VECTORS[0])])
    with pytest.raises(ArchiveError, match=r"'tiny'.*'other'.*--clip"):
        find_vector_model(archive)
    old = archive_v1(tmp_path / "old.db", keys=[1])
    with Archive.open(old) as archive, pytest.raises(ArchiveError, match="score --vectors"):
        find_vector_model(archive)


@pytest.mark.parametrize("damage", ["zeroblob(10)", "'text'", "x'00'", "x''", "x'007c007c007c007c007c007c'"])
def test_a_damaged_vector_is_refused(archive, damage):
    model_id = find_vector_model(archive)
    archive.close()
    execute(archive.path, "PRAGMA ignore_check_constraints = ON")
    sql = execute(archive.path, "SELECT sql FROM sqlite_master WHERE name = 'vectors'")[0][0]
    execute(archive.path, "ALTER TABLE vectors RENAME TO strict")
    execute(archive.path, f"{sql.partition('CHECK')[0]}, UNIQUE (model_id, image_id))")
    execute(archive.path, "INSERT INTO vectors SELECT * FROM strict")
    execute(archive.path, f"UPDATE vectors SET vector = {damage} WHERE image_id = 3")
    with Archive.open(archive.path) as damaged, pytest.raises(ArchiveError):
        read_vectors(damaged, model_id)


def test_merged_vectors_stay_those_of_their_images(archive, tmp_path):
    merge([archive.path], tmp_path / "b.db")
    with Archive.open(tmp_path / "b.db") as merged:
        np.testing.assert_array_equal(read_vectors(merged, find_vector_model(merged, CLIP))[1], VECTORS[[1, 2, 4]])
