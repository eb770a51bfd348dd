"""`score` as a command: missing scores, scores of another CLIP, and what it leaves alone."""

import contextlib
import dataclasses
import re
import sqlite3

import numpy as np
import pytest
from tiny import tiny_clip, tiny_vqgan

from dm_generations.archive import Archive, verify
from dm_generations.cli import main
from dm_generations.cli.common import Progress
from dm_generations.errors import INTERRUPTED


def command(*words) -> int:
    return main(list(map(str, words)))


def generate_into(models, db, *words) -> int:
    flags = ["--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4]
    clip = [] if "--no-score" in words else ["--clip", models.clip]
    return command("generate", "--db", db, *flags, *clip, *words)


def rows_of(db, columns="*", order="id"):
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        return connection.execute(f"SELECT {columns} FROM images ORDER BY {order}").fetchall()


@pytest.mark.e2e
def test_missing_scores_are_filled_in(models, tmp_path, capsys, monkeypatch):
    scored, unscored = tmp_path / "scored.db", tmp_path / "unscored.db"
    words = ["--prompts", "A Boat", "a cat", "--n", 3]
    assert generate_into(models, scored, *words) == 0
    assert generate_into(models, unscored, *words, "--no-score") == 0
    assert {row[0] for row in rows_of(unscored, "clip_score_input")} == {None}
    options = ["--codec", models.vqgan, "--clip", models.clip, "--batch-size", 4]
    capsys.readouterr()
    assert command("score", "--db", unscored, *options) == 0
    assert "Scored 6 images" in capsys.readouterr().out
    columns = "quantvec, clip_score_input, clip_score_tokenized, clip_id"
    expected, found = (rows_of(db, columns, "prompt_id, key0") for db in (scored, unscored))
    assert [row[0] for row in found] == [row[0] for row in expected]
    np.testing.assert_allclose([r[1:3] for r in found], [r[1:3] for r in expected], rtol=1e-5, atol=1e-5)
    content = unscored.read_bytes()
    assert command("score", "--db", unscored, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert unscored.read_bytes() == content

    def stop(progress, done, total):
        if done:
            raise KeyboardInterrupt

    options[3:] = [tiny_clip(tmp_path / "clip", seed=1), "--batch-size", 1, "--all"]
    with monkeypatch.context() as stopping:
        stopping.setattr(Progress, "__call__", stop)
        assert command("score", "--db", unscored, *options) == INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted")
    assert command("score", "--db", unscored, *options) == 0
    assert "Scored 4 images" in capsys.readouterr().out  # two were, at a time, before the stop
    assert command("score", "--db", unscored, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    renewed = rows_of(unscored, columns, "prompt_id, key0")
    assert all(new[1] != old[1] for new, old in zip(renewed, found, strict=True))
    assert all(new[3] != old[3] for new, old in zip(renewed, found, strict=True))
    with Archive.open(unscored) as archive:
        assert list(verify(archive)) == []


def test_what_is_selected_is_scored(models, tmp_path, capsys):
    db = tmp_path / "a.db"
    assert generate_into(models, db, "--prompts", "a boat", "a cat", "--n", 3, "--no-score") == 0
    options = ["--codec", models.vqgan, "--clip", models.clip, "--batch-size", 4]
    assert command("score", db, *options, "--prompt-texts", "a cat", "--n-best", 2) == 0
    assert rows_of(db, "prompt_id, clip_score_input IS NULL") == [(1, 1)] * 3 + [(2, 0)] * 2 + [(2, 1)]
    assert command("score", db, *options, "--where", "top_k=7") == 1
    assert "top_k" in capsys.readouterr().err


@pytest.mark.e2e
def test_rows_of_another_codec_and_bad_rows_are_left_and_named(models, tmp_path, capsys):
    db = tmp_path / "a.db"
    other = dataclasses.replace(models, vqgan=tiny_vqgan(tmp_path / "other_codec", seed=1))
    assert generate_into(models, db, "--prompts", "a boat", "--n", 3, "--no-score") == 0
    assert generate_into(other, db, "--prompts", "a cat", "--n", 2, "--no-score") == 0
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE images SET quantvec = zeroblob(30) WHERE id = 2")
    capsys.readouterr()
    options = ["--clip", models.clip, "--batch-size", 4]
    assert command("score", "--db", db, "--codec", models.vqgan, *options) == 1
    printed = capsys.readouterr()
    assert "Scored 2 images" in printed.out
    assert re.search("image 2 .*30 bytes", printed.err)
    assert re.search("2 images .*'other_codec'.*'vqgan'", printed.err)
    assert [score is None for (score,) in rows_of(db, "clip_score_input")] == [False, True, False, True, True]
    assert command("score", "--db", db, "--codec", other.vqgan, *options) == 1  # the bad row is still there
    assert "Scored 2 images" in capsys.readouterr().out


def test_a_missing_archive_is_refused_and_not_created(models, tmp_path):
    assert command("score", "--db", tmp_path / "a.db") == 1
    assert list(tmp_path.iterdir()) == []
