"""The pool that encodes and writes: bounded, whole files only, no lost error."""

import functools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from dm_generations import atomic_io
from dm_generations.atomic_io import remove_stale_temporaries, write_atomic
from dm_generations.export.output_file import Encoding
from dm_generations.export.writers import FileWriter

PIXELS = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)


def encoding(pixels):
    return functools.partial(Encoding().encode, pixels)


def test_writes_what_it_was_given(tmp_path):
    results = []
    with FileWriter(2) as writer:
        for number in range(20):
            writer.submit(tmp_path / "folder" / f"{number}.png", encoding(PIXELS + np.uint8(number)), results.append)
    assert results == [None] * 20
    for number in range(20):
        written = np.asarray(Image.open(tmp_path / "folder" / f"{number}.png"))
        np.testing.assert_array_equal(written, PIXELS + np.uint8(number))


def test_an_error_surfaces_and_the_rest_is_written(tmp_path):
    (tmp_path / "1.png").mkdir()
    results = []
    with FileWriter(2) as writer:
        for number in range(3):
            writer.submit(tmp_path / f"{number}.png", encoding(PIXELS), results.append)
    assert results[0] is None and results[2] is None and isinstance(results[1], IsADirectoryError)
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png"]


def test_the_queue_is_bounded(tmp_path):
    may_write = threading.Event()
    submitted = []

    def encode():
        may_write.wait(10)
        return b"x"

    def submit_all(writer):
        for number in range(100):
            writer.submit(tmp_path / f"{number}.png", encode, lambda error: None)
            submitted.append(number)

    with FileWriter(2) as writer:
        thread = threading.Thread(target=submit_all, args=[writer])
        thread.start()
        thread.join(0.3)
        waiting = len(submitted)
        may_write.set()
        thread.join()
    assert waiting == 8 and len(submitted) == 100


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.png"]


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files, and pipes")
def test_only_what_dead_processes_left_is_removed(tmp_path):
    """Whether one lives is not told by its number: a process of another container may have the number of a dead one."""
    program = [sys.executable, str(ROOT / "tests/programs/hold_temporary.py"), str(tmp_path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout.readline() == "open\n"
        (kept,) = os.listdir(tmp_path)
        stale = [".dmg-0123456789abcdef.tmp", ".dmg-ffffffff-1-00000000.tmp"]  # the second of version 0.1.0
        others = [".dmg-mine", "a.png", ".dmg-00.tmp"]
        for name in (*stale, *others[:-1]):
            (tmp_path / name).touch()
        os.mkfifo(tmp_path / others[-1])
        remove_stale_temporaries(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([kept, *others])
        living.communicate("\n", timeout=60)
    assert living.returncode == 0
    assert sorted(os.listdir(tmp_path)) == sorted(["whole", *others])


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    lock, names = atomic_io.lock_file, []

    def remove_and_lock(file):
        monkeypatch.setattr(atomic_io, "lock_file", lock)
        names.extend(os.listdir(tmp_path))
        remove_stale_temporaries(tmp_path)
        return lock(file)

    monkeypatch.setattr(atomic_io, "lock_file", remove_and_lock)
    write_atomic(tmp_path / "x", b"whole")
    assert len(names) == 1
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(os.name != "posix", reason="needs locks of files")
def test_where_there_are_no_locks_young_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_io, "lock_file", lambda file: False)
    for name, age in (("00", 0), ("01", 7200)):
        path = tmp_path / f".dmg-{name}.tmp"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    remove_stale_temporaries(tmp_path)
    assert os.listdir(tmp_path) == [".dmg-00.tmp"]
