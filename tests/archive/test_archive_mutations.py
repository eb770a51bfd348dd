"""Damaged archives through `info`, `verify` and `merge`: an answer or one line; no traceback, hang or flood."""

import contextlib
import random
import sqlite3
import sys

import pytest
from helpers import ROOT, time_limit

from dm_generations.cli import main

SECONDS = 20
MOST_CHARACTERS = 300_000
PAGE = 4096


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    """A hundred rows of the archive that ships."""
    path = tmp_path_factory.mktemp("sound") / "sound.db"
    with contextlib.closing(sqlite3.connect(ROOT / "archive" / "emoji.db")) as connection:
        connection.execute("VACUUM INTO ?", (str(path),))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM images WHERE id % 60")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")
    return path.read_bytes()


def mutate(content: bytes, numbers: random.Random) -> bytes:
    """Flip bits, copy or swap pages, cut, or overwrite a stretch."""
    damaged = bytearray(content)
    kind = numbers.choice(["bit", "bits", "copied page", "swapped pages", "cut", "zeros"])
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else numbers.randrange(2, 40)):
            damaged[numbers.randrange(len(damaged))] ^= 1 << numbers.randrange(8)
    elif kind == "cut":
        del damaged[numbers.randrange(len(damaged)) :]
    elif kind == "zeros":
        start = numbers.randrange(len(damaged))
        damaged[start : start + numbers.randrange(1, 300)] = bytes(numbers.randrange(1, 300))
    else:
        a, b = (slice(PAGE * page, PAGE * (page + 1)) for page in numbers.choices(range(len(damaged) // PAGE), k=2))
        damaged[a], damaged[b] = damaged[b], damaged[a] if kind == "swapped pages" else damaged[b]
    return bytes(damaged)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
@pytest.mark.parametrize(
    ("seed", "count"), [(0, 40), *(pytest.param(seed, 400, marks=pytest.mark.slow) for seed in range(1, 11))]
)
def test_damage_is_an_answer_or_one_line(sound, seed, count, tmp_path, capsys):
    numbers = random.Random(seed)
    path, target = tmp_path / "damaged.db", tmp_path / "target.db"
    for index in range(count):
        content = mutate(sound, numbers)
        path.write_bytes(content)
        for words in (["info", "--db", path], ["verify", "--db", path], ["merge", "--into", target, path]):
            with time_limit(SECONDS):
                status = main([str(word) for word in words])
            printed = capsys.readouterr()
            assert status in (0, 1), (seed, index, words[0])
            assert len(printed.out) < MOST_CHARACTERS
            assert printed.err.count("\n") <= 2, (seed, index, printed.err)
            assert path.read_bytes() == content, (seed, index, words[0])
            target.unlink(missing_ok=True)
