"""`verify --regenerate` and `--replay`: rows that their model reproduces, and rows that it does not."""

import contextlib
import hashlib
import json
import shutil
import sqlite3

import numpy as np
import pytest
from tiny import CODEBOOK_SIZE, tiny_dalle_bart

from dm_generations import cli


@pytest.fixture(scope="module")
def generated(models, tmp_path_factory):
    """An archive of 36 images, which tests copy."""
    path = tmp_path_factory.mktemp("archive") / "a.db"
    words = ["generate", "--db", path, "--prompts", "a cat", "a dog", "--n", 3, "--batch-size", 4, "--no-score"]
    words += ["--model", models.dalle_bart, "--codec", models.vqgan, "--temperature", 0, 0.7, 2, "--cond-scale", 1, 3]
    assert cli.main([str(word) for word in [*words, "--top-k", 5, "--top-p", 0.9]]) == 0
    return path


@pytest.fixture
def db(generated, tmp_path):
    return shutil.copy(generated, tmp_path / "a.db")


def verify(models, db, *words) -> int:
    flags = ["verify", "--db", db, "--model", models.dalle_bart, "--batch-size", 4, *words]
    return cli.main([str(word) for word in flags])


def change_token(db, row_id: int, position: int) -> None:
    """Another token, with the MD5 that belongs to it: nothing but the model can tell."""
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        (blob,) = connection.execute("SELECT quantvec FROM images WHERE id = ?", [row_id]).fetchone()
        tokens = np.frombuffer(blob, "<u2").copy()
        tokens[position] = (tokens[position] + 7) % CODEBOOK_SIZE
        values = tokens.tobytes(), hashlib.md5(tokens.tobytes()).hexdigest(), row_id
        connection.execute("UPDATE images SET quantvec = ?, quantvec_md5 = ? WHERE id = ?", values)


@pytest.mark.e2e
@pytest.mark.parametrize("flag", ["--regenerate", "--replay"])
def test_untouched_rows_are_reproduced_anywhere_in_a_batch(models, db, flag, capsys):
    assert verify(models, db, flag) == 0
    assert "36 images" in capsys.readouterr().out
    assert verify(models, db, flag, "--sample", 7) == 0
    assert "7 images" in capsys.readouterr().out
    assert verify(models, db, flag, "--where", "cond_scale=3", "temperature=0.7..") == 0
    assert "12 images" in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.parametrize("flag", ["--regenerate", "--replay"])
def test_a_changed_token_is_found_with_its_position(models, db, flag, capsys):
    change_token(db, 17, 9)
    assert verify(models, db, flag, "--json") == 1
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["id"] == 17
    # Tokens after it follow from what is stored: regenerating points at the first, replaying at the one that is wrong,
    # or at one that would not have followed it.
    assert found["position"] == 9 if flag == "--regenerate" else found["position"] >= 9


@pytest.mark.e2e
def test_a_wide_margin_accepts_what_a_narrow_one_does_not(models, db):
    change_token(db, 17, 9)
    assert verify(models, db, "--replay", "--margin", 1e9) == 0
    assert verify(models, db, "--replay", "--margin", 0) == 1


def test_rows_of_another_model_are_not_checked(models, db, tmp_path, capsys):
    other = tiny_dalle_bart(tmp_path / "other", seed=1)
    assert cli.main(["verify", "--db", str(db), "--model", str(other), "--regenerate"]) == 1
    captured = capsys.readouterr()
    assert "36 rows" in captured.err
    assert "--model" in captured.err


def test_a_row_with_settings_out_of_range_is_a_mismatch(models, db, capsys):
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE images SET cond_scale = -2.0 WHERE id = 5")
    assert verify(models, db, "--replay", "--json") == 1
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["id"] == 5
    assert "cond_scale" in found["what"]
