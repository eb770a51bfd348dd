"""Damaged archives through `info`, `verify`, `merge` and `decode`: an answer or one line; no traceback, hang or flood.

Some have a damaged journal or log next to them. Nothing outside their folder is touched, whatever these say.
"""

import contextlib
import random
import shutil
import sqlite3
import struct
import sys

import pytest
from archive_kit import archive_2022, execute, leave_log, run_program
from helpers import ROOT, time_limit

from dm_generations.archive import connection
from dm_generations.cli import main

SECONDS = 20
MOST_CHARACTERS = 300_000
MOST_MEMORY = 2 * 10**9  # bytes
MOST_LINES = {"decode": 102}  # of errors: one for each image; 2 of other commands
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


@pytest.fixture(scope="module")
def companions(sound, tmp_path_factory) -> dict[str, tuple[bytes, bytes]]:
    """The archive while a program writes to it, and what SQLite has next to it then, by suffix."""
    journaled, logged = (tmp_path_factory.mktemp(name) / "sound.db" for name in ("journaled", "logged"))
    for path in (journaled, logged):
        path.write_bytes(sound)
    run_program("update_scores_until_killed.py", journaled)
    leave_log(logged)
    pairs = {"-journal": journaled, "-wal": logged}
    return {
        suffix: (path.read_bytes(), path.with_name(path.name + suffix).read_bytes()) for suffix, path in pairs.items()
    }


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


def name_super_journal(journal: bytes, name: bytes) -> bytes:
    """Add the record that makes SQLite delete a file when it has undone a journal."""
    numbers = struct.pack(">II", len(name), sum(name))
    return journal + struct.pack(">I", 1) + name + numbers + bytes.fromhex("d9d505f920a163d7")


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
@pytest.mark.parametrize(
    ("seed", "count"), [(0, 8), *(pytest.param(seed, 200, marks=pytest.mark.slow) for seed in range(1, 21))]
)
def test_damage_is_an_answer_or_one_line(sound, companions, seed, count, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    numbers = random.Random(seed)
    folder, victim = tmp_path / "work", tmp_path / "other" / "victim.txt"
    victim.parent.mkdir()
    victim.write_text("mine")
    path = folder / "damaged.db"
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(count):
        suffix = numbers.choice([None] * 6 + ["-journal", "-wal"])
        content, companion = (sound, b"") if suffix is None else companions[suffix]
        content = mutate(content, numbers) if suffix is None or numbers.random() < 0.5 else content
        companion = mutate(companion, numbers) if numbers.random() < 0.8 and suffix else companion
        if suffix == "-journal" and numbers.random() < 0.5:
            companion = name_super_journal(companion, str(victim).encode())
        for command in ("info", "verify", "merge", "decode"):
            folder.mkdir()
            path.write_bytes(content)
            if suffix is not None:
                path.with_name(path.name + suffix).write_bytes(companion)
            words = [command, "--db", path]
            if command == "merge":
                words = ["merge", "--into", folder / "target.db", path]
            elif command == "decode":
                words += ["--mode", "npy", "--out-dir", folder / "out"]
            with time_limit(SECONDS):
                status = main([str(word) for word in words])
            printed = capsys.readouterr()
            where = (seed, index, command)
            assert status in (0, 1), where
            assert len(printed.out) < MOST_CHARACTERS, where
            assert printed.err.count("\n") <= MOST_LINES.get(command, 2), (where, printed.err)
            assert "Traceback" not in printed.err, (where, printed.err)
            assert path.read_bytes() == content or suffix == "-journal", where
            assert {entry.name for entry in tmp_path.iterdir()} == {"work", "other"}, where
            assert victim.read_text() == "mine", where
            shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before  # in KiB, on a Mac in bytes
    assert grown * (1 if sys.platform == "darwin" else 1024) < MOST_MEMORY


def share_children(path, table: str, depth: int, width: int = 400) -> None:
    """Put `depth` pages above the root of a table, each with the next one as its only child, `width` times.

    See https://www.sqlite.org/fileformat.html#b_tree_pages.
    """
    ((root,),) = execute(path, "SELECT rootpage FROM sqlite_master WHERE name = ?", table)
    content = bytearray(path.read_bytes())
    page_count = len(content) // PAGE
    at = slice(PAGE * (root - 1), PAGE * root)
    pages = [bytes(content[at])]
    for child in range(page_count + depth, page_count, -1):
        cells = (struct.pack(">I", child) + b"\x01") * width
        start = PAGE - len(cells)
        head = struct.pack(">BHHHBI", 5, 0, width, start, 0, child)
        pointers = b"".join(struct.pack(">H", start + 5 * index) for index in range(width))
        pages.append((head + pointers).ljust(start, b"\0") + cells)
    content[at] = pages.pop()
    content += b"".join(reversed(pages))
    content[28:32] = struct.pack(">I", page_count + depth)
    path.write_bytes(content)


@pytest.mark.parametrize("table", ["prompts", "sc_prompts", "images"])
def test_tables_of_more_rows_than_can_be_counted(tmp_path, capsys, monkeypatch, table):
    monkeypatch.setattr(connection, "MAX_STEPS", connection.MAX_STEPS // 10)
    path = archive_2022(tmp_path / "a.db")
    row = "(3, 1, 50, 1.0, 1.0, 10.0, 1, 2, x'0100')"
    columns = "(prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec)"
    execute(path, f"INSERT INTO images {columns} VALUES {row}")
    share_children(path, table, 15)
    for words in (["info", "--db", path], ["verify", "--db", path], ["merge", "--into", tmp_path / "b.db", path]):
        with time_limit(SECONDS):
            assert main([str(word) for word in words]) == 1
        printed = capsys.readouterr()
        assert len(printed.out) < MOST_CHARACTERS
        assert "a.db" in printed.out + printed.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.db"]
