"""Commands on a real Ray cluster whose workers and drivers are killed: the same files and rows as of one process."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from decode_kit import all_files
from faults_kit import bytes_under, without_progress
from helpers import ROOT
from PIL import Image
from ray_kit import wait_for

from dm_generations.cli import main

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc"),
]


@pytest.fixture
def start(ray_cluster):
    """Starts a command on the cluster."""
    running = []

    def start(line):
        line = [*map(str, line), "--ray", ray_cluster.address]
        running.append(subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def finish(process):
    """Wait for a command that has to succeed; returns what it printed on stdout and stderr."""
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return out, without_progress(errors)


@pytest.mark.e2e
def test_a_decode_goes_on_when_its_worker_is_killed(command, start, ray_cluster, whole, tmp_path):
    out = tmp_path / "out"
    process = start(command.line(out))
    wait_for(lambda: bytes_under(out) or process.poll() is not None)
    for worker in ray_cluster.workers():
        os.kill(worker, signal.SIGKILL)
    printed, errors = finish(process)
    assert len(printed.splitlines()) == 1
    assert "lost" in errors
    assert len(errors.splitlines()) == 1  # and of Ray nothing
    assert all_files(out) == whole


@pytest.mark.slow
def test_a_decode_whose_driver_was_killed_is_continued(command, start, whole, tmp_path):
    out = tmp_path / "out"
    process = start(command.line(out))
    wait_for(lambda: bytes_under(out) or process.poll() is not None)
    process.kill()
    process.communicate()
    assert 0 < len(all_files(out)) < len(whole)
    finish(start(command.line(out)))
    assert all_files(out) == whole


@pytest.mark.slow
def test_a_sweep_whose_worker_and_driver_are_killed_is_continued(models, start, ray_cluster, tmp_path):
    models_of = ["--model", models.dalle_bart, "--codec", models.vqgan, "--no-score", "--batch-size", 1, "--cpu-only"]
    words = ["generate", "--prompts", "a boat", "a cat", "--cond-scale", 1, 3, "--n", 15, *models_of]
    line = [sys.executable, "-m", "dm_generations", *words, "--db"]
    db, alone = tmp_path / "a.db", tmp_path / "alone.db"
    assert main([*map(str, words), "--db", str(alone)]) == 0
    process = start([*line, db])
    wait_for(lambda: count(db) or process.poll() is not None)
    for worker in ray_cluster.workers():
        os.kill(worker, signal.SIGKILL)
    before = count(db)
    wait_for(lambda: count(db) > before or process.poll() is not None)
    process.kill()
    process.communicate()
    assert before < count(db)
    finish(start([*line, db]))
    assert rows(db) == rows(alone)
    scored = [sys.executable, "-m", "dm_generations", "score", db, "--codec", models.vqgan, "--clip", models.clip]
    finish(start([*scored, "--cpu-only"]))
    with contextlib.closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT count(clip_score_input) FROM images").fetchone() == (60,)


@pytest.mark.slow
def test_an_encode_whose_worker_is_killed_goes_on(models, start, ray_cluster, tmp_path):
    folder, db, alone = tmp_path / "images", tmp_path / "a.db", tmp_path / "alone.db"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(256, size=(60, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    words = ["encode", folder, "--codec", models.vqgan, "--batch-size", 1, "--cpu-only"]
    assert main([*map(str, words), "--db", str(alone)]) == 0
    process = start([sys.executable, "-m", "dm_generations", *words, "--db", db])
    wait_for(lambda: count(db) or process.poll() is not None)
    for worker in ray_cluster.workers():
        os.kill(worker, signal.SIGKILL)
    finish(process)
    assert rows(db) == rows(alone)
    assert count(db) == 60


def count(db):
    return len(rows(db)) if db.exists() else 0


def rows(db):
    with contextlib.closing(sqlite3.connect(db)) as connection:
        columns = "prompt_id, cond_scale, key0, key1, quantvec"
        return connection.execute(f"SELECT {columns} FROM images ORDER BY {columns}").fetchall()
