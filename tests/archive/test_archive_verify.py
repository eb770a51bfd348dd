"""Every kind of damage is found, and reported with its table, row and column."""

import hashlib
import shutil
import sqlite3

import pytest
from archive_kit import COLUMNS_2022, archive_2022, execute, fill, new_image
from helpers import golden

from dm_generations.archive import Archive, ArchiveError, verify


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(archive, *(new_image(i, clip_score_input=1.0) for i in range(6)))
    return path


def problems(path) -> list[tuple[str | None, int | None, str]]:
    """Table, id and kind of each problem."""
    with Archive.open(path) as archive:
        return [(problem.table, problem.id, problem.kind) for problem in verify(archive)]


def damage(path, query: str, *parameters) -> list[tuple[str | None, int | None, str]]:
    """Change the file in a way that the tables' own checks refuse, then verify it."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    with connection:
        connection.execute(query, parameters)
    connection.close()
    return problems(path)


def test_sound_archives_have_no_problems(ours, tmp_path):
    assert problems(ours) == []
    shutil.copy(golden("original_script") / "archive.db", tmp_path / "2022.db")
    assert problems(tmp_path / "2022.db") == []


@pytest.mark.parametrize(
    "change",
    [
        "prompt_id = 99",
        "sc_prompt_id = 99",
        "top_k = -1",
        "top_k = 'many'",
        "top_p = 1.25",
        "temperature = -0.5",
        "cond_scale = 9e999",
        "key0 = 4294967296",
        "key1 = -1",
        "clip_score_tokenized = 'good'",
        "time_end = 5.0",
        "generator_id = 2",
        "codec_id = 17",
        "log_prob = 'likely'",
        "log_prob = -9e999",
        "dtype = 'int8'",
        "init_count = 5",
        "init_count = 'x'",
        "init_md5 = 'abc'",
        "sampler_version = 'x'",
        "quantvec_md5 = 'abc'",
        "quantvec = 'tokens'",
    ],
)
def test_a_bad_value_is_reported_by_id(ours, change):
    found = damage(ours, f"UPDATE images SET {change} WHERE id = 4")
    assert ("images", 4, change.split()[0]) in found
    assert {(table, row_id) for table, row_id, _ in found} <= {("images", 4), (None, None)}  # SQLite's own checks


def test_md5s_of_other_tokens_are_reported(ours):
    assert damage(ours, "UPDATE images SET init_count = 2 WHERE id = 4")[-1] == ("images", 4, "init_md5")
    assert ("images", 5, "quantvec_md5") in damage(ours, "UPDATE images SET quantvec = zeroblob(8) WHERE id = 5")


def test_a_problem_as_text_names_the_row_and_the_value(ours):
    damage(ours, "UPDATE images SET top_k = -7 WHERE id = 4")
    with Archive.open(ours) as archive:
        assert any("images 4" in line and "top_k" in line and "-7" in line for line in map(str, verify(archive)))


@pytest.mark.parametrize("quantvec", [bytes(6), b"", bytes(6) + b"\x2c\x01"], ids=["short", "empty", "token 300"])
def test_tokens_that_their_codec_cannot_decode(ours, quantvec):
    md5 = hashlib.md5(quantvec).hexdigest()
    found = damage(ours, "UPDATE images SET quantvec = ?, quantvec_md5 = ? WHERE id = 2", quantvec, md5)
    assert ("images", 2, "quantvec") in found


def test_tokens_of_an_unknown_codec_are_squares_of_one_size(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    insert = "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, 10.0, 1, 2, ?, ?, NULL, NULL)"
    for row_id, byte_count in enumerate([8, 8, 18, 10, 9, 0, 8], start=1):
        blob = bytes(byte_count)
        execute(path, insert, row_id, blob, hashlib.md5(blob).hexdigest())
    assert problems(path) == [("images", row_id, "quantvec") for row_id in (3, 4, 5, 6)]


def test_bad_values_in_a_2022_archive(tmp_path):
    path = archive_2022(tmp_path / "a.db", COLUMNS_2022.replace("quantvec_md5 TEXT", "quantvec_md5"))
    row = "(prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5)"
    execute(path, f"INSERT INTO images {row} VALUES (4, 2, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', 'zz')")
    execute(path, f"INSERT INTO images {row} VALUES (3, 1, NULL, 1.0, 1.0, 1.0, 1, 2, NULL, NULL)")
    assert problems(path) == [
        ("images", 1, "prompt_id"),
        ("images", 1, "sc_prompt_id"),
        ("images", 1, "quantvec_md5"),
        ("images", 2, "top_k"),
        ("images", 2, "quantvec"),
    ]


def test_bad_texts(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO prompts VALUES (8, CAST(x'ff' AS TEXT)), (9, x'6162'), (10, NULL)")
    execute(path, "INSERT INTO sc_prompts VALUES (2, NULL)")
    execute(path, "DELETE FROM sc_prompts WHERE id = 1")
    assert problems(path) == [
        *(("prompts", row_id, "desc") for row_id in (8, 9, 10)),
        ("sc_prompts", 2, "desc"),
        ("sc_prompts", 1, "id"),
    ]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("config = '{'", "config"),
        ("config = '[]'", "config"),
        ("sha256 = 'abc'", "sha256"),
        ("token_shape = '[0]'", "sizes"),
        ("kind = 'oracle'", "kind"),
    ],
)
def test_bad_models(ours, change, kind):
    assert ("models", 2, kind) in damage(ours, f"UPDATE models SET {change} WHERE id = 2")


def test_damage_of_the_file_is_reported_not_raised(ours):
    with Archive.open(ours, "w") as archive:
        fill(archive, *(new_image(i) for i in range(100, 400)))
    (page,) = execute(ours, "SELECT rootpage FROM sqlite_master WHERE name = 'images_by_group'")[0]
    with open(ours, "r+b") as file:
        file.seek((page - 1) * 4096 + 8)
        file.write(b"\xff" * 200)
    assert problems(ours)[0][:2] == (None, None)


def test_a_missing_index_is_reported(ours):
    execute(ours, "DROP INDEX images_draw")
    with Archive.open(ours) as archive:
        (problem,) = verify(archive)
    assert problem.kind == "index"
    assert "images_draw" in problem.what


def test_many_problems_of_a_kind_are_counted(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 250)"
    row = "i, iif(i % 2, 4, 3), 1, -1, 1.0, 1.0, 10.0, 1, 2, x'0100', NULL, NULL, NULL"
    execute(path, f"INSERT INTO images {numbers} SELECT {row} FROM n")
    with Archive.open(path) as archive:
        found = list(verify(archive))
    assert len(found) == 100 + 100 + 2
    assert sum(problem.count for problem in found) == 250 + 125
    assert [(problem.kind, problem.count) for problem in found[-2:]] == [("prompt_id", 25), ("top_k", 150)]


def test_models_of_wrong_types_are_one_clear_error(ours):
    execute(ours, "CREATE TABLE copy AS SELECT * FROM models")
    execute(ours, "DROP TABLE models")
    execute(ours, "ALTER TABLE copy RENAME TO models")
    original = execute(ours, "SELECT * FROM models")
    for change in (
        "config = '['",
        "config = '[]'",
        "config = NULL",
        "name = x'ff'",
        "sha256 = x'05'",
        "token_shape = '[0]'",
    ):
        execute(ours, f"UPDATE models SET {change} WHERE id = 2")
        with Archive.open(ours) as archive, pytest.raises(ArchiveError, match="model 2"):
            archive.models()
        assert any(problem[:2] == ("models", 2) for problem in problems(ours))
        execute(ours, "DELETE FROM models")
        for row in original:
            execute(ours, f"INSERT INTO models VALUES ({', '.join('?' * len(row))})", *row)
