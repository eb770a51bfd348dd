"""`merge` and `generate`, killed at any moment: nothing that was stored is lost, and repeating the command goes on."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from archive_kit import fill, new_image
from helpers import ROOT

from dm_generations.archive import Archive, merge, verify
from dm_generations.cli import main

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")]
COLUMNS = """p.desc, s.desc, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5,
    clip_score_input, clip_score_tokenized, g.sha256, c.sha256, sampler_version, log_prob, dtype, init_count,
    init_md5"""
TABLES = """images JOIN prompts p ON p.id = prompt_id JOIN sc_prompts s ON s.id = sc_prompt_id
    LEFT JOIN models g ON g.id = generator_id LEFT JOIN models c ON c.id = codec_id"""


def images(path) -> set[tuple]:
    """What an archive holds, without ids and times; nothing if there is none yet."""
    if not path.exists():
        return set()
    with Archive.open(path) as archive:  # undoes what a killed writer left
        assert list(verify(archive)) == []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(f"SELECT {COLUMNS} FROM {TABLES}").fetchall()
    assert len(set(rows)) == len(rows)
    return set(rows)


def stamp(folder) -> list:
    """Names, sizes and times of the files of a folder."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, *entry.stat()[6:9]) for entry in entries)


def kill(words, folder, seconds: float, environment) -> int:
    """Start a command, wait for the first change in a folder and some time more, and kill it; return its status."""
    command = [sys.executable, "-m", "dm_generations", *map(str, words)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        before = stamp(folder)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if stamp(folder) != before:
                    break
            time.sleep(0.0005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def check_kills(words, path, whole: set[tuple], kill_count: int, begin, environment) -> None:
    """Kill commands that fill an archive, and repeat them; `begin` makes the folder as it was."""
    moments = random.Random()
    while kill_count:
        begin()
        stored = before = images(path)
        while kill_count and stored != whole:
            started = time.monotonic()
            status = kill(words, path.parent, moments.choice([0.003, 0.03, 0.3]) * moments.random(), environment)
            kill_count -= status == -signal.SIGKILL
            now = images(path)
            assert stored <= now <= whole, (status, time.monotonic() - started)
            stored = now
        assert before <= stored
        assert main([str(word) for word in words]) == 0
        assert images(path) == whole
        assert not [name for name in os.listdir(path.parent) if name.startswith(".") or name.endswith("-journal")]


@pytest.mark.parametrize("kill_count", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("has_target", [False, True])
def test_killed_merges(tmp_path, kill_count, has_target):
    sources, folder = [tmp_path / name for name in ("a.db", "b.db")], tmp_path / "target"
    target = folder / "all.db"
    for number, source in enumerate(sources):
        with Archive.create(source) as archive:
            fill(archive, *(new_image(key, prompt=f"{number} {key % 7}") for key in range(4000)))

    def begin():
        folder.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        if has_target:
            with Archive.create(target) as archive:
                fill(archive, *(new_image(key, prompt="mine") for key in range(100)))

    folder.mkdir()
    begin()
    merge(sources, target)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    check_kills(["merge", *sources, "--into", target], target, images(target), kill_count, begin, environment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_killed_runs_of_generate(models, tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    words = ["--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 2, "--cpu-only", "--no-score"]
    words += ["--prompts", "a boat", "a cat", "--n", 100]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    assert main(["generate", "--db", str(tmp_path / "whole.db"), *map(str, words)]) == 0
    path = folder / "a.db"
    command = ["generate", "--db", path, *words]
    check_kills(command, path, images(tmp_path / "whole.db"), 50, lambda: path.unlink(missing_ok=True), environment)
