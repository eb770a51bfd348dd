"""Ratings: stored by id or by what names an image, read back, and refused whole if one of them is wrong."""

import copy
import json

import pytest
from archive_kit import execute, fill, new_image

from dm_generations.archive import Archive, ArchiveError, merge, verify
from dm_generations.archive.ratings import Rating, add_ratings, parse_judgement, read_judgements, read_ratings


@pytest.fixture
def archive(tmp_path):
    """Three images: two of one key with other settings, and one with the tokens of the first."""
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, new_image(1), new_image(1, top_k=7, quantvec=b"\5\0" * 4), new_image(1, top_p=0.5), new_image(2))
        yield archive


def stored(archive) -> list[tuple]:
    return list(read_ratings(archive))


def judgement(kind="score", value=7, **changes) -> dict:
    images = [{"id": 1}, {"id": 2}] if kind == "pair" else [{"id": 1}]
    order = [0, 1] if kind == "pair" else None
    return {"kind": kind, "images": images, "value": value, "order": order, "rater": "ann", "time": 5, **changes}


JUDGEMENTS = [
    (judgement(), ("ann", "score", 1, None, 7, 5.0)),
    (judgement("favourite", True), ("ann", "favourite", 1, None, 1, 5.0)),
    (judgement("favourite", False, rater=""), ("anonymous", "favourite", 1, None, 0, 5.0)),
    (judgement("tag", {"name": "round", "on": True}), ("ann", "tag", 1, None, "round", 5.0)),
    (judgement("pair", "first"), ("ann", "pair", 1, 2, "first", 5.0)),
    (judgement("pair", "first", order=[1, 0]), ("ann", "pair", 2, 1, "second", 5.0)),
    (judgement("pair", "second", order=[1, 0]), ("ann", "pair", 2, 1, "first", 5.0)),
    (judgement("pair", "tie", order=[1, 0]), ("ann", "pair", 2, 1, "tie", 5.0)),
    (judgement("pair", "bad"), ("ann", "pair", 1, 2, "bad", 5.0)),
]


@pytest.mark.parametrize(("given", "row"), JUDGEMENTS)
def test_a_judgement_is_stored_once(archive, given, row):
    rating = parse_judgement(given)
    assert [add_ratings(archive, [rating]), add_ratings(archive, [rating])] == [1, 0]
    assert stored(archive) == [row]
    assert list(verify(archive)) == []


def test_all_are_read_back_and_found_in_another_copy(archive, tmp_path):
    add_ratings(archive, [parse_judgement(given) for given, _ in JUDGEMENTS])
    judgements = json.loads(json.dumps(list(read_judgements(archive))))
    with Archive.create(tmp_path / "b.db") as other:
        fill(other, new_image(99))  # so that ids are others
    merge([archive.path], tmp_path / "b.db")
    with Archive.open(tmp_path / "b.db", "w") as other:
        before = stored(other)
        assert {row[2] for row in before} == {2, 3}
        assert add_ratings(other, map(parse_judgement, judgements)) == 0
        assert stored(other) == before


def test_the_newest_are_read(archive):
    add_ratings(archive, [parse_judgement(judgement(time=time)) for time in range(9)])
    assert [one["time"] for one in read_judgements(archive, last=3)] == [6, 7, 8]
    assert len(list(read_judgements(archive, last=20))) == 9
    assert list(read_judgements(archive, kinds=("tag",))) == []


def test_equal_tokens_are_told_apart_by_their_settings(archive):
    add_ratings(archive, [Rating("ann", "score", 3, 4, 1.0)])
    (image,) = next(read_judgements(archive))["images"]
    add_ratings(archive, [parse_judgement(judgement(images=[image]))])
    assert [row[2] for row in stored(archive)] == [3, 3]


def test_an_image_without_md5_is_found_by_its_settings_and_key(archive):
    add_ratings(archive, [Rating("ann", "score", 2, 4, 1.0)])
    (image,) = next(read_judgements(archive))["images"]
    add_ratings(archive, [parse_judgement(judgement(images=[image | {"md5": None}]))])
    assert [row[2] for row in stored(archive)] == [2, 2]
    for change in ({"model": "another"}, {"key1": 5}, {"md5": "0" * 32}, {"prompt": "a cat"}, {"top_k": None}):
        with pytest.raises(ArchiveError, match="rating 1"):
            add_ratings(archive, [parse_judgement(judgement(images=[image | {"md5": None} | change]))])


def test_a_tag_can_be_taken_back(archive):
    on = [parse_judgement(judgement("tag", {"name": name, "on": True}, rater=rater)) for name in "ab" for rater in "xy"]
    off = parse_judgement(judgement("tag", {"name": "a", "on": False}, rater="x", time=6))
    early = parse_judgement(judgement("tag", {"name": "b", "on": False}, rater="x", time=4))
    add_ratings(archive, [*on, off, early])
    assert {(row[0], row[4]) for row in stored(archive)} == {("y", "a"), ("x", "b"), ("y", "b")}
    add_ratings(archive, [*on, off])
    assert len(stored(archive)) == 3


WRONG = [
    None,
    7,
    [],
    {},
    judgement("like"),
    judgement(value=11),
    judgement(value=0),
    judgement(value=True),
    judgement(value=2.5),
    judgement(value="7"),
    judgement("favourite", 2),
    judgement("favourite", "yes"),
    judgement("tag", {"name": ""}),
    judgement("tag", {"name": ["x"]}),
    judgement("tag", "x" * 5000),
    judgement("tag", "\0"),
    judgement("pair", "left"),
    judgement("pair", ["first"]),
    judgement("pair", "first", order=None),
    judgement("pair", "first", order=[0, 0]),
    judgement("pair", "first", images=[{"id": 1}]),
    judgement(images=[{"id": 1}, {"id": 2}]),
    judgement(images={"id": 1}),
    judgement(images=["1"]),
    judgement(images=[{"md5": [1]}]),
    judgement(images=[{"prompt": {"a": 1}}]),
    judgement(rater=5),
    judgement(rater="x" * 5000),
    judgement(time=None),
    judgement(time="now"),
    judgement(time=float("nan")),
    judgement(time=10**400),
    judgement(time=True),
]


@pytest.mark.parametrize("given", WRONG, ids=repr)
def test_a_wrong_judgement_is_refused(given):
    before = copy.deepcopy(given)
    with pytest.raises(ArchiveError) as caught:
        parse_judgement(given)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300
    assert given is before or given == before or given["time"] != given["time"]


@pytest.mark.parametrize(
    "rating",
    [
        Rating("ann", "score", 99, 7, 1.0),
        Rating("ann", "pair", 1, "first", 1.0, 99),
        Rating("ann", "pair", 1, "first", 1.0, 1),
        Rating("ann", "pair", 1, "first", 1.0),
        Rating("ann", "score", 1, 7, 1.0, 2),
        Rating("ann", "score", 1, 11, 1.0),
        Rating("ann", "score", 2**70, 7, 1.0),
        Rating("", "score", 1, 7, 1.0),
        Rating("\udc80", "score", 1, 7, 1.0),
    ],
    ids=repr,
)
def test_nothing_is_stored_if_one_is_wrong(archive, rating):
    good = Rating("ann", "score", 1, 7, 1.0)
    with pytest.raises(ArchiveError, match="rating 2"):
        add_ratings(archive, [good, rating, good])
    assert stored(archive) == []


def test_an_archive_open_for_reading_takes_none(archive):
    archive.close()
    with Archive.open(archive.path) as reader, pytest.raises(ArchiveError, match="reading"):
        add_ratings(reader, [Rating("ann", "score", 1, 7, 1.0)])


def test_damaged_rows_are_left_out(archive):
    add_ratings(archive, [parse_judgement(given) for given, _ in JUDGEMENTS])
    archive.close()
    execute(archive.path, "PRAGMA foreign_keys = OFF")
    execute(archive.path, "CREATE TABLE copy AS SELECT * FROM ratings")
    execute(archive.path, "DROP TABLE ratings")
    execute(archive.path, "ALTER TABLE copy RENAME TO ratings")
    for change in ("value = x'00' WHERE id = 1", "image_id = 'x' WHERE id = 2", "time = 'x' WHERE id = 3"):
        execute(archive.path, f"UPDATE ratings SET {change}")
    execute(archive.path, "UPDATE ratings SET image_id = 99 WHERE id = 5")
    with Archive.open(archive.path) as damaged:
        found = json.loads(json.dumps(list(read_judgements(damaged))))
    assert len(found) == len(JUDGEMENTS) - 4
