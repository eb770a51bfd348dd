"""Scores of any judge: what is due, where scores go, and ranking by them."""

import dataclasses

import pytest
from archive_kit import CLIP, CODEC, archive_2022, archive_v1, execute, fill, new_image

from dm_generations.archive import Archive, ArchiveError, ModelInfo, verify
from dm_generations.archive.scores import Due, add_clip_scores, add_scores, find_scorer, read_scorers, scorer_id
from dm_generations.archive.selection import Selection, compile_selection
from dm_generations.errors import UserError

OTHER = dataclasses.replace(CLIP, name="other", sha256="d" * 64)
HEAD = ModelInfo("scorer", "aesthetic", "e" * 64, {"clip_sha256": CLIP.sha256})


@pytest.fixture
def archive(tmp_path):
    """Images 1 and 2 with scores of CLIP, and 3 without."""
    with Archive.create(tmp_path / "a.db") as archive:
        scores = {"clip_score_input": 5.0, "clip_score_tokenized": 6.0, "time_scored": 1.0}
        fill(archive, new_image(1, **scores), new_image(2, **scores | {"clip_score_input": 7.0}), new_image(3))
        yield archive


def clip_scores(archive, model, rows, **flags) -> int:
    with archive.transaction():
        model_id = archive.add_model(model)
        add_clip_scores(archive, rows, model_id, 9.0, **flags)
    return model_id


def head_scores(archive, values) -> int:
    with archive.transaction():
        scorer = scorer_id(archive, archive.add_model(HEAD), "image")
        add_scores(archive, scorer, values, 9.0)
    return scorer


def columns(archive) -> list[tuple]:
    return list(archive.connection.rows("SELECT id, clip_score_input, clip_id FROM images ORDER BY id"))


def table(archive) -> list[tuple]:
    sql = (
        "SELECT image_id, name, reads, value FROM scores JOIN scorers ON scorers.id = scorer_id"
        " JOIN models ON models.id = model_id ORDER BY image_id, reads"
    )
    return list(archive.connection.rows(sql))


def group(archive):
    return archive.groups()[0].key


def ranked(archive, text) -> list[int]:
    """The ids of the group's images, best first by a judge."""
    return list(archive.image_ids(group(archive), where=compile_selection(archive, Selection(rank_by=text))))


def due(archive, model, rescore=False, **flags) -> list[int]:
    arguments = rescore, archive.find_model(model), Due(**flags)
    ids = [row.id for row in archive.rows_to_score(*arguments)]
    assert archive.count_to_score(*arguments) == len(ids)
    return ids


def test_columns_take_scores_where_they_are_empty_and_the_table_those_of_another_clip(archive):
    before = columns(archive)
    assert due(archive, OTHER) == [3]
    assert due(archive, OTHER, adds=True) == [1, 2, 3]
    scores = [(1, 1.0, 2.0), (2, 3.0, 4.0), (3, 5.0, 6.0)]
    other_id = clip_scores(archive, OTHER, scores, adds=True)
    assert columns(archive) == [*before[:2], (3, 5.0, other_id)]
    assert table(archive) == [
        (1, "other", "input", 1.0),
        (1, "other", "tokenized", 2.0),
        (2, "other", "input", 3.0),
        (2, "other", "tokenized", 4.0),
    ]
    assert due(archive, OTHER, adds=True) == due(archive, CLIP) == []
    assert due(archive, CLIP, adds=True) == [3]
    assert list(verify(archive)) == []


def test_without_adding_only_missing_scores_are_stored(archive):
    before = columns(archive)
    other_id = clip_scores(archive, OTHER, [(1, 1.0, 2.0), (3, 5.0, 6.0)])
    assert columns(archive) == [*before[:2], (3, 5.0, other_id)]
    assert table(archive) == []


def test_rescoring_replaces_the_columns(archive):
    assert due(archive, CLIP, rescore=True) == [3]
    assert due(archive, OTHER, rescore=True) == [1, 2, 3]
    other_id = clip_scores(archive, OTHER, [(1, 1.0, 2.0)], rescore=True)
    assert columns(archive)[0] == (1, 1.0, other_id)
    assert table(archive) == []
    assert due(archive, OTHER, rescore=True) == [2, 3]


def test_a_score_of_an_unknown_clip_is_never_overwritten(archive):
    execute(archive.path, "UPDATE images SET clip_id = NULL, clip_score_tokenized = NULL WHERE id = 1")
    assert due(archive, OTHER) == [1, 3]
    clip_scores(archive, OTHER, [(1, 1.0, 2.0)])
    assert columns(archive)[0] == (1, 5.0, None)
    assert [row[:3] for row in table(archive)] == [(1, "other", "input"), (1, "other", "tokenized")]
    assert due(archive, OTHER) == [3]


def test_a_score_that_is_not_a_number_is_left_out(archive):
    clip_scores(archive, OTHER, [(1, None, 2.0)], adds=True)
    assert [row[2:] for row in table(archive)] == [("tokenized", 2.0)]
    assert due(archive, OTHER, adds=True) == [1, 2, 3]


def test_other_things_that_are_due(archive):
    assert due(archive, CLIP, head_id=0) == due(archive, CLIP, vectors=True) == [1, 2, 3]
    head_scores(archive, [(1, 4.0)])
    assert due(archive, CLIP, head_id=archive.find_model(HEAD)) == [2, 3]
    insert = "INSERT INTO vectors (image_id, model_id, vector) VALUES (?, ?, ?)"
    archive.connection.insert(insert, (2, archive.find_model(CLIP), b"\0\x3c"))
    assert due(archive, CLIP, vectors=True) == [1, 3]


def test_scores_are_stored_once_and_only_of_images_that_are_there(archive):
    scorer = head_scores(archive, [(1, 4.0), (2, None)])
    with archive.transaction():
        assert add_scores(archive, scorer, [(1, 5.0), (2, 6.0)], None) == 1
    assert [row[3] for row in table(archive)] == [4.0, 6.0]
    for image_id, value in ((77, 1.0), (3, float("inf")), (3, "high")):
        with pytest.raises(ArchiveError), archive.transaction():
            add_scores(archive, scorer, [(image_id, value)], None)


def test_ranking_by_any_judge(archive):
    assert list(archive.image_ids(group(archive))) == [2, 1, 3]
    head_id = head_scores(archive, [(3, 1.0), (1, 4.0)])
    for text in ("aesthetic", "aesthetic:image", str(head_id), "e" * 8):
        assert ranked(archive, text) == [1, 3, 2]  # the one without a score comes last
    assert ranked(archive, "aesthetic")[:1] == [1]
    head_scores(archive, [(2, 4.0)])
    assert ranked(archive, "aesthetic") == [1, 2, 3]  # equal scores: by id


def test_ranking_by_a_clip_takes_its_scores_from_the_columns_too(archive):
    clip_scores(archive, OTHER, [(1, 1.0, 9.0), (2, 3.0, 4.0), (3, 2.0, 6.0)], adds=True)  # 3 goes to the columns
    assert ranked(archive, "other") == [2, 3, 1]
    assert ranked(archive, "other:tokenized") == [1, 3, 2]
    assert ranked(archive, CLIP.sha256) == [2, 1, 3]
    assert ranked(archive, "clip_score_input") == [2, 1, 3]


def test_an_older_archive_is_ranked_by_its_clip(tmp_path):
    path = archive_v1(tmp_path / "old.db", keys=(1, 2, 3), version=2)
    execute(path, "UPDATE images SET clip_score_tokenized = id, clip_id = 3 WHERE id > 1")
    with Archive.open(path) as archive:
        assert ranked(archive, "tiny:tokenized") == [3, 2, 1]


def test_an_unknown_judge_is_named_with_those_that_are_there(archive, tmp_path):
    head_scores(archive, [(1, 4.0)])
    for text in ("nobody", "", "99", "dddddd", "aesthetic:input", "e" * 5):
        with pytest.raises(ArchiveError, match=r"clip_score_input.*tiny.*aesthetic") as caught:
            find_scorer(archive, text)
        assert "\n" not in str(caught.value)
    with Archive.open(archive_2022(tmp_path / "2022.db")) as old, pytest.raises(ArchiveError, match="clip_score_input"):
        find_scorer(old, "tiny")


def test_a_name_of_two_judges_is_not_taken_for_one(archive):
    with archive.transaction():
        archive.model_id(dataclasses.replace(CLIP, sha256="f" * 64))
    with pytest.raises(ArchiveError, match="several"):
        find_scorer(archive, "tiny")
    assert find_scorer(archive, "ffffff").sha256 == "f" * 64
    assert {scorer.kind for scorer in read_scorers(archive)} == {"clip"}
    assert CODEC.sha256 not in {scorer.sha256 for scorer in read_scorers(archive)}


def test_selecting_by_judges_and_people(archive):
    head_scores(archive, [(3, 1.0), (1, 4.0)])
    rows = [("ann", "score", 1, 7, 1.0), ("bob", "score", 1, 9, 1.0), ("ann", "score", 2, 3, 1.0)]
    rows += [("ann", "tag", 3, "round", 1.0), ("ann", "favourite", 2, 1, 1.0), ("bob", "favourite", 3, 1, 1.0)]
    rows += [("bob", "favourite", 3, 0, 2.0)]
    with archive.transaction():
        archive.connection.write_many(
            "INSERT INTO ratings (rater, kind, image_id, value, time) VALUES (?, ?, ?, ?, ?)", rows
        )

    def ids(**filters) -> list[int]:
        return list(archive.image_ids(where=compile_selection(archive, Selection.of(**filters))))

    assert ids(score="2..", rank_by="aesthetic") == [1] and ids(score="6..") == [2]
    assert ids(best=1, rank_by="aesthetic") == [1] and ids(best=1) == [2]
    assert ids(rating="8") == [1] and ids(rating="..7") == [2]
    assert ids(tag="round") == [3] and ids(tag="square,round") == [3] and ids(tag="x") == []
    assert ids(favourite=True) == [2] and ids(favourite="no") == [1, 3]
    with pytest.raises(UserError, match="favourite"):
        ids(favourite="maybe")
    archive.close()
    with Archive.open(archive_2022(archive.path.with_name("old.db"))) as old:
        for filters in ({"rating": 8}, {"tag": "round"}, {"favourite": True}):
            assert old.count(compile_selection(old, Selection.of(**filters))) == 0
