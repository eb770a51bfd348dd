"""`verify --regenerate` and `--replay`: rows that their model reproduces, and rows that it does not."""

import contextlib
import hashlib
import json
import sqlite3

import numpy as np
import pytest
from tiny import tiny_models

from dm_generations import cli


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def db(models, tmp_path):
    path = tmp_path / "drawn.db"
    words = ["generate", "--db", path, "--prompts", "a cat", "a dog", "--n", 5, "--batch-size", 4, "--no-score"]
    words += ["--model", models.dalle_bart, "--codec", models.vqgan, "--temperature", 0, 0.7, 2, "--cond-scale", 1, 3]
    assert cli.main([str(word) for word in [*words, "--top-k", 5, "--top-p", 0.9]]) == 0
    return path


def verify(models, db, *words) -> int:
    flags = ["verify", "--db", db, "--model", models.dalle_bart, "--batch-size", 4, *words]
    return cli.main([str(word) for word in flags])


def change_token(db, row_id: int, position: int) -> None:
    """Another token, with the MD5 that belongs to it: nothing but the model can tell."""
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        (blob,) = connection.execute("SELECT quantvec FROM images WHERE id = ?", [row_id]).fetchone()
        tokens = np.frombuffer(blob, "<u2").copy()
        tokens[position] = (tokens[position] + 7) % 32
        values = tokens.tobytes(), hashlib.md5(tokens.tobytes()).hexdigest(), row_id
        connection.execute("UPDATE images SET quantvec = ?, quantvec_md5 = ? WHERE id = ?", values)


@pytest.mark.parametrize("flag", ["--regenerate", "--replay"])
def test_untouched_rows_are_reproduced_at_any_place_in_a_batch(models, db, flag, capsys):
    assert verify(models, db, flag) == 0
    assert "60 images" in capsys.readouterr().out
    assert verify(models, db, flag, "--sample", 7) == 0
    assert "7 images" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--regenerate", "--replay"])
def test_a_changed_token_is_found_with_its_place(models, db, flag, capsys):
    change_token(db, 17, 9)
    assert verify(models, db, flag, "--json") == 1
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["id"] == 17
    # Tokens after it follow from what is stored: regenerating points at the first, replaying at the one that is wrong,
    # or at one that would not have followed it.
    assert found["position"] == 9 if flag == "--regenerate" else found["position"] >= 9


def test_a_wide_margin_lets_pass_what_a_narrow_one_does_not(models, db):
    change_token(db, 17, 9)
    assert verify(models, db, "--replay", "--margin", 1e9) == 0
    assert verify(models, db, "--replay", "--margin", 0) == 1


def test_rows_of_another_model_are_not_judged(models, db, tmp_path, capsys):
    other = tiny_models(tmp_path / "other", seed=1)
    assert cli.main(["verify", "--db", str(db), "--model", str(other.dalle_bart), "--regenerate"]) == 1
    captured = capsys.readouterr()
    assert "60 rows not checked" in captured.err and "--model" in captured.err


def test_a_row_with_settings_out_of_range_is_a_mismatch(models, db, capsys):
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE images SET cond_scale = -2.0 WHERE id = 5")
    assert verify(models, db, "--replay", "--json") == 1
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["id"] == 5 and "cond_scale" in found["what"]
