"""Several processes fill one archive: with shards none samples what another does, without none stores it twice."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys

import pytest
from helpers import ROOT

from dm_generations.archive import Archive, verify
from dm_generations.cli import main

COUNT = 40


@pytest.fixture
def arguments(models, tmp_path):
    """Flags of `generate` for 40 images."""
    words = ["--db", tmp_path / "a.db", "--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 2]
    words += ["--prompts", "a boat", "a cat", "--cond-scale", 1, 3, "--n", 10, "--no-score", "--cpu-only"]
    return [str(word) for word in words]


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}


def run_together(commands: list[list[str]], environment: dict) -> list[str]:
    """Run `generate` processes at the same time; what each printed."""
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dm_generations", "generate", *words],
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for words in commands
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), outputs
    return [out for out, _ in outputs]


def added(output: str) -> int:
    return int(re.search(r"Added (\d+) image", output).group(1))


def stored_tokens(path) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        columns = "prompt_id, cond_scale, key0, key1, quantvec"
        return connection.execute(f"SELECT {columns} FROM images ORDER BY {columns}").fetchall()


def check_whole(path) -> None:
    with Archive.open(path) as archive:
        assert archive.count() == COUNT
        assert [group.count for group in archive.groups()] == [10] * 4
        assert [str(problem) for problem in verify(archive)] == []


@pytest.mark.e2e
def test_two_shards_fill_one_archive(arguments, environment, tmp_path):
    outputs = run_together([[*arguments, "--shard", shard] for shard in ("1/2", "2/2")], environment)
    assert [added(output) for output in outputs] == [20, 20]
    assert not any("other processes" in output for output in outputs)
    check_whole(tmp_path / "a.db")
    alone = tmp_path / "alone.db"
    assert main(["generate", *arguments, "--db", str(alone)]) == 0
    assert stored_tokens(tmp_path / "a.db") == stored_tokens(alone)


@pytest.mark.slow
def test_two_processes_without_shards_store_every_image_once(arguments, environment, tmp_path):
    outputs = run_together([arguments, arguments], environment)
    assert sum(added(output) for output in outputs) == COUNT
    for output in outputs:
        others = re.search(r"(\d+) added by other", output)
        skipped = int(re.search(r"\((\d+) skipped", output).group(1))
        assert added(output) + skipped + (int(others.group(1)) if others else 0) == COUNT
    check_whole(tmp_path / "a.db")


@pytest.mark.e2e
def test_what_another_process_stored_meanwhile_is_counted(arguments, monkeypatch, capsys, tmp_path):
    add_images = Archive.add_images

    def add_twice(archive, images, *rest):
        monkeypatch.undo()  # once only
        add_images(archive, images[:3], *rest)
        return add_images(archive, images, *rest)

    monkeypatch.setattr(Archive, "add_images", add_twice)
    assert main(["generate", *arguments]) == 0
    assert added(printed := capsys.readouterr().out) == COUNT - 3
    assert "3 added by other processes" in printed
    check_whole(tmp_path / "a.db")


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_shard_is_completed_by_repeating_its_command(arguments, environment, capsys, tmp_path):
    path, words = tmp_path / "a.db", [*arguments, "--shard", "2/2"]
    program = ROOT / "tests" / "programs" / "generate_until_killed.py"
    killed = subprocess.run([sys.executable, str(program), "8", *words], env=environment)
    assert killed.returncode == -signal.SIGKILL
    with Archive.open(path) as archive:
        before = archive.count()
    assert 0 < before <= 8
    assert main(["generate", *words]) == 0
    assert added(capsys.readouterr().out) == 20 - before
    assert main(["generate", *words]) == 0
    assert added(capsys.readouterr().out) == 0
    assert main(["generate", *arguments]) == 0  # the other shard's images, by a run without shards
    assert added(capsys.readouterr().out) == 20
    check_whole(path)


@pytest.mark.e2e
def test_a_dry_run_counts_the_shard_alone(arguments, capsys, tmp_path):
    assert main(["generate", *arguments, "--shard", "3/3", "--dry-run"]) == 0
    assert "13 to generate (0 already present)" in capsys.readouterr().out
    assert not (tmp_path / "a.db").exists()


def test_a_bad_shard_is_one_line(arguments, capsys, tmp_path):
    assert main(["generate", *arguments, "--shard", "3/2"]) == 1
    assert re.fullmatch(r"error: .*--shard '3/2'.*\n", capsys.readouterr().err)
    assert not (tmp_path / "a.db").exists()
