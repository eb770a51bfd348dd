"""What format 3 added: classes as prompts, shapes, extra settings, scores, vectors, ratings; merged and verified."""

import dataclasses
import json
import sqlite3

import pytest
from archive_kit import CLIP, CODEC, execute, fill, new_image

from dm_generations.archive import Archive, ArchiveError, ModelInfo, merge, verify
from dm_generations.archive.judgements import wrong_rating
from dm_generations.archive.records import (
    ClassLabel,
    canonical_settings,
    count_tokens,
    format_shape,
    is_canonical,
    parse_token_shape,
    square_side,
)
from dm_generations.archive.scores import scorer_id
from dm_generations.archive.vocabulary import add_vocabulary, read_classes

RATINGS = [
    ("ann", "pair", 1, 2, "first", 5.0),
    ("ann", "score", 1, None, 7, 6.0),
    ("bob", "favourite", 2, None, 1, 7.0),
    ("bob", "tag", 2, None, "round", 8.0),
]


@pytest.fixture
def archive(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        yield archive


@pytest.fixture
def judged(archive):
    """Two images with scores of two judges, vectors and ratings."""
    fill(archive, new_image(1), new_image(2))
    with archive.transaction():
        clip_id = archive.model_id(CLIP)
        judge_id = archive.model_id(ModelInfo("scorer", "aesthetic", "d" * 64, {}))
        scorers = scorer_id(archive, clip_id, "input"), scorer_id(archive, judge_id, "image")
        assert scorer_id(archive, judge_id, "image") == scorers[1]
        for image_id in (1, 2):
            for scorer in scorers:
                archive.connection.insert(
                    "INSERT INTO scores (image_id, scorer_id, value, time) VALUES (?, ?, ?, 1.0)",
                    (image_id, scorer, float(scorer)),
                )
            archive.connection.insert(
                "INSERT INTO vectors (image_id, model_id, vector) VALUES (?, ?, ?)", (image_id, clip_id, b"\0\x3c" * 4)
            )
        archive.connection.write_many(
            "INSERT INTO ratings (rater, kind, image_id, other_id, value, time) VALUES (?, ?, ?, ?, ?, ?)", RATINGS
        )
    return archive


def problems(path) -> list[tuple[str | None, str]]:
    with Archive.open(path) as archive:
        return [(problem.table, problem.kind) for problem in verify(archive)]


@pytest.mark.parametrize(
    ("text", "count", "shown", "side"),
    [
        ("[16,16]", 256, "16x16", 16),
        ("[24,16]", 384, "24x16", None),
        ("[32]", 32, "32", None),
        ("[[1,1],[2,2],[4,3]]", 17, "1x1+2x2+4x3", None),
    ],
)
def test_token_shapes(text, count, shown, side):
    shape = parse_token_shape(text)
    assert (count_tokens(shape), format_shape(shape), square_side(shape)) == (count, shown, side)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[0]",
        "[-1,2]",
        "[1,2,3]",
        "[true]",
        "[1.0]",
        "[[1,1],2]",
        "[[]]",
        "{}",
        "x",
        None,
        b"[1]",
        "[99999,99999]",
        "[" * 5000,
        7,
    ],
)
def test_bad_token_shapes(text):
    with pytest.raises(ArchiveError, match="token_shape"):
        parse_token_shape(text)


def test_a_codec_of_another_shape_is_kept_and_checked(archive):
    codec = dataclasses.replace(CODEC, sha256="e" * 64, token_shape=((1, 1), (3, 1)), image_shape=(16, 8))
    with archive.transaction():
        codec_id = archive.model_id(codec)
        assert archive.add_images([new_image(1)], None, codec_id, None, None) == 1
        with pytest.raises(ArchiveError, match="1x1\\+3x1"):
            archive.add_images([dataclasses.replace(new_image(2), quantvec=b"\0\0")], None, codec_id, None, None)
    assert archive.models()[codec_id] == codec
    assert list(verify(archive)) == []


def test_canonical_settings():
    text = canonical_settings({"steps": 12, "cfg_interval": [0.5, 1.0], "a": None})
    assert json.loads(text) == {"a": None, "cfg_interval": [0.5, 1.0], "steps": 12}
    assert is_canonical(text) and is_canonical("") and canonical_settings({}) == ""
    for other in ('{"b":1,"a":2}', '{"a": 1}', "{}", "[]", "x", '{"a":NaN}', None, 3):
        assert not is_canonical(other)
    with pytest.raises(ArchiveError):
        canonical_settings({"a": float("nan")})


def test_extra_settings_are_part_of_the_group_and_the_sample(archive):
    extra = canonical_settings({"steps": 12})
    images = [new_image(1), dataclasses.replace(new_image(1), extra_settings=extra)]
    assert fill(archive, *images) == 2 and fill(archive, *images) == 0
    groups = archive.groups()
    assert [(group.key.extra_settings, group.count) for group in groups] == [("", 1), (extra, 1)]
    assert [row.extra_settings for group in groups for row in archive.rows(group.key)] == ["", extra]
    assert all(len(archive.existing_keys(group.key, 1)) == 1 for group in groups)
    with pytest.raises(ArchiveError, match="canonical"):
        fill(archive, dataclasses.replace(new_image(2), extra_settings='{"b": 1}'))


def test_classes_are_prompts(archive, tmp_path):
    with archive.transaction():
        add_vocabulary(archive.connection, "animals", ["cat", "dog"])
        with pytest.raises(ArchiveError, match="animals"):
            add_vocabulary(archive.connection, "animals", ["cat"])
    image = dataclasses.replace(new_image(1), prompt=ClassLabel("animals", 1))
    assert fill(archive, image, new_image(2)) == 2 and fill(archive, image) == 0
    assert sorted(archive.prompts().values()) == ["a red cube", "animals 1: dog"]
    assert list(read_classes(archive.connection).values()) == [ClassLabel("animals", 1)]
    for label in (ClassLabel("animals", 2), ClassLabel("animals", -1), ClassLabel("plants", 0)):
        with pytest.raises(ArchiveError, match=label.vocabulary):
            fill(archive, dataclasses.replace(image, prompt=label))
    archive.close()
    for _ in range(2):
        merge([archive.path], tmp_path / "b.db")
    with Archive.open(tmp_path / "b.db") as merged:
        assert list(read_classes(merged.connection).values()) == [ClassLabel("animals", 1)]
        assert merged.count() == 2 and list(verify(merged)) == []
    execute(archive.path, "UPDATE prompts SET class_label = 2 WHERE class_label = 1")
    assert problems(archive.path) == [("prompts", "class_label")]


def test_judgements_are_merged_once(judged, tmp_path):
    judged.close()
    target = tmp_path / "b.db"
    with Archive.create(target) as other:
        fill(other, new_image(2), new_image(9), clip=None)
    (report,) = merge([judged.path], target)
    assert (report.added_count, report.judgement_count) == (1, 10)
    (report,) = merge([judged.path], target)
    assert (report.added_count, report.judgement_count) == (0, 0)
    by_key = (
        "SELECT rater, ratings.kind, a.key1, b.key1, value, time FROM ratings JOIN images AS a ON a.id = image_id"
        " LEFT JOIN images AS b ON b.id = other_id ORDER BY time"
    )
    assert execute(target, by_key) == execute(judged.path, by_key) == RATINGS
    by_name = "SELECT key1, scorer, reads, value FROM view_scores JOIN images ON images.id = image_id ORDER BY 1, 2"
    assert execute(target, by_name) == execute(judged.path, by_name) != []
    assert problems(target) == []


def test_judgements_of_other_tokens_are_not_taken(judged, tmp_path):
    judged.close()
    with Archive.create(tmp_path / "b.db") as other:
        fill(other, dataclasses.replace(new_image(1), quantvec=b"\1\0" * 4))
    (report,) = merge([judged.path], tmp_path / "b.db")
    assert report.added_count == 1
    left = execute(tmp_path / "b.db", "SELECT DISTINCT key1 FROM scores JOIN images ON images.id = image_id")
    assert left == [(2,)] and problems(tmp_path / "b.db") == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE scores SET image_id = 99 WHERE id = 1", ("scores", "image_id")),
        ("UPDATE scores SET scorer_id = 99 WHERE id = 1", ("scores", "scorer_id")),
        ("UPDATE scorers SET model_id = 1 WHERE id = 1", ("scorers", "model_id")),
        ("UPDATE vectors SET vector = x'0000' WHERE id = 2", ("vectors", "vector")),
        ("UPDATE vectors SET model_id = 2 WHERE id = 2", ("vectors", "model_id")),
        ("UPDATE ratings SET image_id = 99 WHERE id = 2", ("ratings", "image_id")),
        ("UPDATE ratings SET other_id = 99 WHERE id = 1", ("ratings", "other_id")),
        ("UPDATE images SET extra_settings = '{\"a\": 1}' WHERE id = 1", ("images", "extra_settings")),
    ],
)
def test_bad_judgements_are_found_and_not_merged(judged, tmp_path, change, expected):
    judged.close()
    execute(judged.path, change)
    assert problems(judged.path) == [expected]
    if expected[1] not in ("vector", "model_id"):
        with pytest.raises(ArchiveError, match=expected[0].removesuffix("s")):
            merge([judged.path], tmp_path / "b.db")
        assert not (tmp_path / "b.db").exists()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("pair", "left"),
        ("pair", 1),
        ("score", 0),
        ("score", 11),
        ("score", 5.0),
        ("score", "5"),
        ("favourite", 2),
        ("tag", ""),
        ("tag", 3),
        ("star", 1),
    ],
)
def test_bad_ratings_are_refused_by_the_file_too(judged, kind, value):
    assert wrong_rating(kind, value) is not None
    other_id = 2 if kind == "pair" else None
    row = ("ann", kind, 1, other_id, value, 9.0)
    sql = "INSERT INTO ratings (rater, kind, image_id, other_id, value, time) VALUES (?, ?, ?, ?, ?, ?)"
    with pytest.raises(ArchiveError) as caught, judged.transaction():
        judged.connection.insert(sql, row)
    assert isinstance(caught.value.__cause__, sqlite3.IntegrityError)
