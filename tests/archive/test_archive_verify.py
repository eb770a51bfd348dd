"""Every kind of damage is found, and named by row."""

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


def problems(path) -> list[str]:
    with Archive.open(path) as archive:
        return [str(problem) for problem in verify(archive)]


def damage(path, query: str, *parameters) -> list[str]:
    """Does to the file what the tables' own checks would refuse, then verifies it."""
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
    ("change", "expected"),
    [
        ("prompt_id = 99", "images 4: prompt_id 99 is not in prompts"),
        ("sc_prompt_id = 99", "images 4: sc_prompt_id 99 is not in sc_prompts"),
        ("top_k = -1", "images 4: top_k is -1, not a whole number from 0"),
        ("top_k = 'many'", "images 4: top_k is 'many', not a whole number from 0"),
        ("top_p = 1.25", "images 4: top_p is 1.25, not a finite number from 0 to 1"),
        ("temperature = -0.5", "images 4: temperature is -0.5, not a finite number from 0"),
        ("cond_scale = 9e999", "images 4: cond_scale is inf, not a finite number"),
        ("key0 = 4294967296", "images 4: key0 is 4294967296, not a uint32"),
        ("key1 = -1", "images 4: key1 is -1, not a uint32"),
        ("clip_score_tokenized = 'good'", "images 4: clip_score_tokenized is 'good', not a number"),
        ("time_end = 5.0", "images 4: time_end lies before time_start"),
        ("generator_id = 2", "images 4: generator_id 2 is not a generator in models"),
        ("codec_id = 17", "images 4: codec_id 17 is not a codec in models"),
        ("log_prob = 'likely'", "images 4: log_prob is 'likely', not a number"),
        ("log_prob = -9e999", "images 4: log_prob is -inf, not a number"),
        ("dtype = 'int8'", "images 4: dtype is 'int8', not one of float32, bfloat16, float16"),
        ("init_count = 5", "images 4: init_count is 5, not from 0 to the 4 tokens of the image"),
        ("init_count = 'x'", "images 4: init_count is 'x', not from 0 to the 4 tokens of the image"),
        ("init_count = 2", "images 4: init_md5 is '', the first 2 tokens have '"),
        ("init_md5 = 'abc'", "images 4: init_md5 is 'abc', the first 0 tokens have ''"),
        ("sampler_version = 'x'", "images 4: sampler_version is 'x', not a whole number"),
        ("quantvec_md5 = 'abc'", "images 4: quantvec_md5 is 'abc', the tokens have"),
        ("quantvec = x'0000000000000001'", "images 4: quantvec_md5 is"),
        ("quantvec = 'tokens'", "images 4: quantvec is of type str, not a blob"),
    ],
)
def test_a_bad_value_is_reported_by_id(ours, change, expected):
    found = damage(ours, f"UPDATE images SET {change} WHERE id = 4")
    assert any(problem.startswith(expected) for problem in found), found
    assert all(problem.startswith(("images 4:", "file: SQLite: CHECK constraint")) for problem in found), found


@pytest.mark.parametrize(
    ("quantvec", "expected"),
    [
        (bytes(6), "images 2: quantvec has 6 bytes, not the 8 of 2x2 uint16"),
        (b"", "images 2: quantvec has 0 bytes, not the 8 of 2x2 uint16"),
        (bytes(6) + b"\x2c\x01", "images 2: token 300 is not below the codebook size 300"),
    ],
)
def test_tokens_that_do_not_fit_their_codec(ours, quantvec, expected):
    md5 = hashlib.md5(quantvec).hexdigest()
    found = damage(ours, "UPDATE images SET quantvec = ?, quantvec_md5 = ? WHERE id = 2", quantvec, md5)
    assert expected in found, found


def test_tokens_of_an_unknown_codec_are_squares_of_one_size(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    insert = "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, 10.0, 1, 2, ?, ?, NULL, NULL)"
    for row_id, byte_count in enumerate([8, 8, 18, 10, 9, 0, 8], start=1):
        blob = bytes(byte_count)
        execute(path, insert, row_id, blob, hashlib.md5(blob).hexdigest())
    assert problems(path) == [
        "images 3: quantvec has 18 bytes, most of the others 8",
        "images 4: quantvec has 10 bytes, which is no square grid of uint16",
        "images 5: quantvec has 9 bytes, which is no square grid of uint16",
        "images 6: quantvec has 0 bytes, which is no square grid of uint16",
    ]


def test_a_2022_archive_is_checked_by_hand(tmp_path):
    path = archive_2022(tmp_path / "a.db", COLUMNS_2022.replace("quantvec_md5 TEXT", "quantvec_md5"))
    row = "(prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5)"
    execute(path, f"INSERT INTO images {row} VALUES (4, 2, 50, 1.0, 1.0, 1.0, 1, 2, x'0100', 'zz')")
    execute(path, f"INSERT INTO images {row} VALUES (3, 1, NULL, 1.0, 1.0, 1.0, 1, 2, NULL, NULL)")
    assert problems(path) == [
        "images 1: prompt_id 4 is not in prompts",
        "images 1: sc_prompt_id 2 is not in sc_prompts",
        "images 1: quantvec_md5 is 'zz', the tokens have 25daad3d9e60b45043a70c4ab7d3b1c6",
        "images 2: top_k is None, not a whole number from 0",
        "images 2: quantvec is NULL",
    ]


def test_bad_texts(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO prompts VALUES (8, CAST(x'ff' AS TEXT)), (9, x'6162'), (10, NULL)")
    execute(path, "INSERT INTO sc_prompts VALUES (2, NULL)")
    execute(path, "DELETE FROM sc_prompts WHERE id = 1")
    assert problems(path) == [
        "prompts 8: the text is not valid UTF-8",
        "prompts 9: the text is blob",
        "prompts 10: the text is null",
        "sc_prompts 2: the text is NULL; only row 1 stands for the model's own empty prompt",
        "sc_prompts 1: missing; it stands for the model's own empty prompt",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("config = '{'", "models 2: config is not a JSON object"),
        ("config = '[]'", "models 2: config is not a JSON object"),
        ("sha256 = 'abc'", "models 2: sha256 is 'abc', not 64 hex digits"),
        ("grid = 'x'", "models 2: grid, codebook_size, image_size ['x', 300, 16] are not all above 0"),
        ("kind = 'oracle'", "models 2: unknown kind 'oracle'"),
    ],
)
def test_bad_models(ours, change, expected):
    assert expected in damage(ours, f"UPDATE models SET {change} WHERE id = 2")


def test_damage_of_the_file_is_reported_not_raised(ours):
    with Archive.open(ours, "w") as archive:
        fill(archive, *(new_image(i) for i in range(100, 400)))
    (page,) = execute(ours, "SELECT rootpage FROM sqlite_master WHERE name = 'images_by_group'")[0]
    with open(ours, "r+b") as file:
        file.seek((page - 1) * 4096 + 8)
        file.write(b"\xff" * 200)
    found = problems(ours)
    assert found and found[0].startswith("file: "), found


def test_a_missing_index_is_reported(ours):
    execute(ours, "DROP INDEX images_draw")
    assert problems(ours) == ["file: index images_draw is missing; `merge` into a new archive makes it again"]


def test_many_problems_of_a_kind_are_counted(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 250)"
    row = "i, iif(i % 2, 4, 3), 1, -1, 1.0, 1.0, 10.0, 1, 2, x'0100', NULL, NULL, NULL"
    execute(path, f"INSERT INTO images {numbers} SELECT {row} FROM n")
    with Archive.open(path) as archive:
        found = list(verify(archive))
    assert len(found) == 100 + 100 + 2
    assert sum(problem.count for problem in found) == 250 + 125
    assert [str(problem) for problem in found[-2:]] == [
        "images: and 25 more with a wrong prompt_id",
        "images: and 150 more with a wrong top_k",
    ]


def test_models_of_wrong_types_are_one_clear_error(ours):
    execute(ours, "CREATE TABLE copy AS SELECT * FROM models")
    execute(ours, "DROP TABLE models")
    execute(ours, "ALTER TABLE copy RENAME TO models")
    original = execute(ours, "SELECT * FROM models")
    for change in ("config = '['", "config = '[]'", "config = NULL", "name = x'ff'", "sha256 = x'05'", "grid = 'x'"):
        execute(ours, f"UPDATE models SET {change} WHERE id = 2")
        with Archive.open(ours) as archive, pytest.raises(ArchiveError, match="model 2: .*run `verify`"):
            archive.models()
        assert any(problem.startswith("models 2:") for problem in problems(ours))
        execute(ours, "DELETE FROM models")
        for row in original:
            execute(ours, f"INSERT INTO models VALUES ({', '.join('?' * len(row))})", *row)
