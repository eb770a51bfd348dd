"""Files of ratings: what is written is read again, and a file that is wrong adds nothing."""

import csv
import json

import pytest
from archive_kit import fill, new_image
from pyarrow import parquet

from dm_generations.archive import Archive
from dm_generations.archive.ratings import Rating, add_ratings, read_ratings
from dm_generations.cli import main
from dm_generations.export.ratings_file import COLUMN_TYPES, read_ratings_file

RATINGS = [
    Rating("ann", "pair", 1, "first", 1.0, 2),
    Rating("ann", "pair", 2, "second", 2.5, 1),
    Rating('bob, "b"\n', "pair", 1, "tie", 3.0, 2),
    Rating("bob", "pair", 1, "bad", 4.0, 3),
    Rating("bob", "tag", 1, "<b>", 5.0),
    Rating("bob", "favourite", 1, 1, 5.0),
    Rating("bob", "score", 3, 9, 5.0),
]
PROMPT = 'a "red",\n=cube é <script>'


@pytest.fixture
def path(tmp_path):
    with Archive.create(tmp_path / "a.db") as archive:
        fill(archive, new_image(1, prompt=PROMPT), new_image(2, prompt=PROMPT), new_image(3, sc_prompt="blurry"))
        add_ratings(archive, RATINGS)
    return archive.path


def stored(path, kinds=()) -> list[tuple]:
    with Archive.open(path) as archive:
        return list(read_ratings(archive, kinds))


def run(*arguments) -> int:
    return main(["ratings", *map(str, arguments)])


def empty_copy(path, tmp_path):
    """The images alone, with other ids."""
    with Archive.create(tmp_path / "copy.db") as archive:
        images = [new_image(9), new_image(3, sc_prompt="blurry")]
        fill(archive, *images, new_image(2, prompt=PROMPT), new_image(1, prompt=PROMPT))
    return archive.path


@pytest.mark.parametrize(("name", "kinds"), [("r.json", ()), ("r.csv", ("pair",))])
def test_what_is_written_is_read(path, tmp_path, name, kinds, capsys):
    file, before = tmp_path / name, stored(path, kinds)
    assert run("--db", path, "--export", file) == 0
    assert run("--db", path, "--import", file) == 0
    assert stored(path, kinds) == before
    copy = empty_copy(path, tmp_path)
    assert run("--db", copy, "--import", file) == 0
    new_ids = {1: 4, 2: 3, 3: 2, None: None}
    moved = [(row[0], row[1], new_ids[row[2]], new_ids[row[3]], *row[4:]) for row in before]
    assert stored(copy) == moved
    assert capsys.readouterr().err == ""


def test_columns_of_preference_data(path, tmp_path):
    run("--db", path, "--export", tmp_path / "r.csv")
    run("--db", path, "--export", tmp_path / "r.parquet")
    with open(tmp_path / "r.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "r.parquet")
    assert table.column_names == list(rows[0]) == list(COLUMN_TYPES)
    assert [(row["label_0"], row["label_1"]) for row in rows] == [
        ("1.0", "0.0"),
        ("0.0", "1.0"),
        ("0.5", "0.5"),
        ("0.0", "0.0"),
    ]
    found = table.to_pylist()
    assert [row["has_label"] for row in found] == [True, True, True, False]
    assert {row["caption"] for row in found} == {PROMPT}
    assert [row["best_image_uid"] for row in found] == ["1", "1", "tie", ""]
    assert [row["image_1_uid"] for row in found] == ["2", "1", "2", "3"]
    assert all(len(row["md5_0"]) == 32 and row["top_k_1"] == 50 for row in found)


def test_a_csv_file_with_ids_alone(path, tmp_path):
    file = tmp_path / "r.csv"
    file.write_text("image_0_uid,image_1_uid,label_0,label_1,user_id,created_at\n1,3,0,1,eve,8\n")
    assert run("--db", path, "--import", file) == 0
    assert stored(path)[-1] == ("eve", "pair", 1, 3, "second", 8.0)


def judgements(*given) -> str:
    return json.dumps({"format": "dm-generations-ratings", "version": 1, "judgements": list(given)})


GOOD = {"kind": "score", "images": [{"id": 1}], "value": 3, "rater": "x", "time": 1}
HEAD = "image_0_uid,image_1_uid,label_0,label_1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", ""),
        ("r.json", "{"),
        ("r.json", "[" * 100_000),
        ("r.json", "[]"),
        ("r.json", "null"),
        ("r.json", "{}"),
        ("r.json", json.dumps({"format": "dm-generations-ratings", "version": 2, "judgements": []})),
        ("r.json", json.dumps({"format": "dm-generations-ratings", "version": 1, "judgements": {}})),
        ("r.json", judgements(GOOD, None)),
        ("r.json", judgements(GOOD, 5)),
        ("r.json", judgements(GOOD, GOOD | {"images": [{"id": 77}]})),
        ("r.json", judgements(GOOD, GOOD | {"value": 11})),
        ("r.json", b"\xff\xfe{}"),
        ("r.csv", ""),
        ("r.csv", "a,b\n1,2\n"),
        ("r.csv", HEAD + "1,2,1,0\n1,2,1,1\n"),
        ("r.csv", HEAD + "1,2,1,0\n1,2,x,1\n"),
        ("r.csv", HEAD + "1,2,1,0\n1\n"),
        ("r.csv", HEAD + "1,2,1,0\n1,77,0,1\n"),
        ("r.csv", HEAD + '1,2,1,0\n"1"x,2,0,1\n'),
        ("r.csv", HEAD + "1,2,1,0\n" + "1" * 200_000 + ",2,0,1\n"),
        ("r.csv", b"PK\3\4\0\0\xff"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_file_is_one_line_and_stores_nothing(path, tmp_path, name, content, capsys):
    file, before = tmp_path / name, path.read_bytes()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("--db", path, "--import", file) == 1
    assert path.read_bytes() == before
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1 and len(errors) < 600 and errors.startswith("error: ")


def test_files_that_cannot_be_read_or_written(path, tmp_path, capsys):
    before = path.read_bytes()
    (tmp_path / "there.csv").write_text("mine")
    for arguments in (
        ["--import", tmp_path / "missing.json"],
        ["--import", tmp_path],
        ["--export", tmp_path / "there.csv"],
        ["--export", tmp_path / "r.txt"],
        ["--export", tmp_path / "no folder" / "r.csv"],
    ):
        assert run("--db", path, *arguments) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert path.read_bytes() == before and (tmp_path / "there.csv").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"a.db", "there.csv"}


def test_ranking_is_printed(path, capsys):
    for by in ("settings", "image"):
        assert run("--db", path, "--rank", "--by", by) == 0
        table = capsys.readouterr().out
        assert run("--db", path, "--rank", "--by", by, "--format", "json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert run("--db", path, "--rank", "--by", by, "--format", "csv") == 0
        lines = list(csv.DictReader(capsys.readouterr().out.splitlines(keepends=True)))
        assert len(rows) == len(lines) and bool(rows) == (by == "image")
        assert [row["strength"] for row in rows] == [float(line["strength"]) for line in lines]
        assert len(table.splitlines()) == len(rows) + 1


def test_ratings_of_a_file_are_plain_values(path, tmp_path):
    run("--db", path, "--export", tmp_path / "r.json")
    assert len(read_ratings_file(tmp_path / "r.json")) == len(RATINGS)
