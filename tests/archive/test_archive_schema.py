"""Definitions that compute: refused before they run, or never run, whatever a file says."""

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from archive_kit import COLUMNS_2022, archive_2022, archive_v1, execute, fill, new_image, start_program
from helpers import time_limit

from dm_generations.archive import Archive, ArchiveError, info, merge, verify

SQLITE_UTILS = Path(__file__).with_name("sqlite_utils.sql").read_text()
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
HUGE = "printf('%.*c', 900000000, 'x')"
SLOW = f"instr({HUGE}, {HUGE} || 'y')"
SECONDS = 10


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(archive, *map(new_image, range(10)))
    return path


@pytest.fixture(autouse=True)
def _in_time():
    with time_limit(SECONDS):
        yield


def rewrite(path, old: str, new: str) -> None:
    """Replace a part of the definitions in a file, as no statement of SQL would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        changed = connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE instr(sql, ?)", (old, new, old)
        )
        assert changed.rowcount


def refused(path, mode) -> bool:
    before = path.read_bytes()
    with pytest.raises(ArchiveError) as caught:
        Archive.open(path, mode)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return path.read_bytes() == before


def read_all(path) -> None:
    with Archive.open(path) as archive:
        assert list(verify(archive)) == []
        assert info(archive).image_count == 10
    merge([path], path.with_name("merged.db"))
    path.with_name("merged.db").unlink()


@pytest.mark.parametrize(
    "definition",
    [
        f"CREATE TABLE other (a, b AS ({HUGE}))",
        f'CREATE TABLE other (a, "b" GENERATED ALWAYS /* */ AS -- \n ({HUGE}) STORED)',
        f"CREATE INDEX other ON images ({SLOW})",
        f"CREATE INDEX other ON images (id) WHERE {SLOW} > 0",
        "CREATE VIRTUAL TABLE other USING fts5(desc, content='evil')",
        "CREATE VIRTUAL TABLE other USING rtree(id, a, b)",
        f"CREATE VIEW prompts_fts_config AS {ENDLESS}",
    ],
)
def test_definitions_that_compute_on_reading_are_refused(ours, definition):
    execute(ours, definition.replace(HUGE, "1").replace("instr(1, 1 || 'y')", "abs(id)"))
    for mode in ("r", "w"):
        assert refused(ours, mode)


def test_a_generated_column_in_place_of_one_of_the_format_is_refused(ours, tmp_path):
    for column in ("rowid", "quantvec_md5"):
        path = archive_2022(tmp_path / f"{column}.db", COLUMNS_2022.replace("quantvec_md5 TEXT", "q"))
        execute(path, f"ALTER TABLE images ADD COLUMN {column} TEXT AS (upper(key0))")
        assert refused(path, "r")


@pytest.mark.parametrize(
    "view",
    [
        f"CREATE VIEW evil AS {ENDLESS}",
        "CREATE VIEW evil AS SELECT * FROM evil",
        "CREATE VIEW evil AS SELECT * FROM missing",
    ],
)
def test_views_never_run(ours, view):
    execute(ours, view)
    read_all(ours)
    with Archive.open(ours, "w") as archive:
        assert fill(archive, new_image(1000)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("desc TEXT NOT NULL UNIQUE", f"desc TEXT NOT NULL UNIQUE CHECK ({SLOW} = 0)"),
        ("init_count INTEGER NOT NULL DEFAULT 0", f"init_count INTEGER NOT NULL DEFAULT ({HUGE})"),
        ("name TEXT NOT NULL", "name TEXT NOT NULL REFERENCES other (a)"),
        ("top_k >= 0", "top_k >= 0 OR 1"),
    ],
)
def test_constraints_of_others_do_not_run_on_reading_and_are_refused_for_writing(ours, old, new):
    execute(ours, "CREATE TABLE other (a UNIQUE)")
    rewrite(ours, old, new)
    read_all(ours)
    assert refused(ours, "w")


@pytest.mark.parametrize(
    "definition",
    [
        "CREATE UNIQUE INDEX other ON images (top_k, key1)",
        f"CREATE TABLE _counts ([table] TEXT PRIMARY KEY, count INTEGER DEFAULT 0 CHECK ({SLOW} = 0))",
        f"CREATE TABLE prompts_fts (desc, prompts_fts CHECK ({SLOW} = 0))",
        "CREATE TABLE prompts_fts_data (id INTEGER PRIMARY KEY, block BLOB REFERENCES images (quantvec))",
    ],
)
def test_what_writing_would_run_is_refused(ours, definition):
    execute(ours, definition)
    read_all(ours)
    if "prompts_fts (" in definition:  # written by a trigger that looks like one of sqlite-utils
        execute(
            ours,
            "CREATE TRIGGER t AFTER INSERT ON prompts BEGIN"
            " INSERT INTO prompts_fts (rowid, desc) VALUES (new.rowid, new.desc); END",
        )
    assert refused(ours, "w")


def test_a_text_index_whose_own_tables_are_others_is_refused(ours):
    with contextlib.closing(sqlite3.connect(ours)) as connection:
        connection.executescript(SQLITE_UTILS)
    with Archive.open(ours, "w") as archive:
        assert fill(archive, new_image(1000, prompt="a green pyramid")) == 1
    rewrite(ours, "block BLOB", f"block BLOB CHECK ({SLOW} = 0)")
    assert refused(ours, "w")


def test_columns_and_indexes_of_users_stay(ours, tmp_path):
    """Of the newest version and of older ones, which are updated."""
    for path in (ours, archive_v1(tmp_path / "v1.db", range(10))):
        execute(path, 'ALTER TABLE images ADD COLUMN "rating" INTEGER')
        execute(path, "ALTER TABLE images ADD COLUMN [my notes]")
        execute(path, "CREATE INDEX [idx_images_rating]\n    ON [images] ([rating] DESC)")
        execute(path, "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT CHECK (CAST(text AS TEXT) = text))")
        execute(path, "ANALYZE")
        read_all(path)
        for key in (1000, 1001):
            with Archive.open(path, "w") as archive:
                assert fill(archive, new_image(key)) == 1


def test_a_definition_under_another_name_is_found(ours):
    """The column `name` of SQLite's own table need not be what the definition says."""
    execute(ours, "CREATE TABLE _counts ([table] TEXT PRIMARY KEY, count INTEGER DEFAULT 0 CHECK (count > 7))")
    with contextlib.closing(sqlite3.connect(ours, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET name = 'x', tbl_name = 'x' WHERE name = '_counts'")
    assert refused(ours, "w")


def test_a_value_that_is_too_large_is_one_line(ours, tmp_path):
    execute(ours, "PRAGMA ignore_check_constraints = ON")
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO images VALUES (1, 3, 1, 50, 1.0, 1.0, 10.0, 1, 2, x'0100', NULL, NULL, NULL)")
    execute(path, "UPDATE images SET quantvec = zeroblob(20000000)")
    with Archive.open(path) as archive:
        (group,) = archive.groups()
        assert [row.quantvec for row in archive.rows(group.key)] == [b""]
        assert [problem.kind for problem in verify(archive)] == ["reading"]
    with pytest.raises(ArchiveError, match=r"a\.db"):
        merge([path], tmp_path / "b.db")
    assert not (tmp_path / "b.db").exists()
    execute(path, "UPDATE prompts SET desc = CAST(zeroblob(20000000) AS TEXT)")
    with Archive.open(path) as archive, pytest.raises(ArchiveError, match=r"a\.db"):
        archive.prompts()


def share_pages(path, long: int, short: int, ids: range) -> None:
    """Turn texts of prompts of one length into the one of row 1, whose pages they get.

    See https://www.sqlite.org/fileformat.html#b_tree_pages; `long` and `short` take 3 bytes as a varint, also doubled.
    """

    def start(row_id: int, length: int) -> bytes:
        payload, kind = ([n >> 14 | 128, n >> 7 & 127 | 128, n & 127] for n in (length + 5, 2 * length + 13))
        return bytes([*payload, row_id, 5, 0, *kind])

    content = bytearray(path.read_bytes())
    local = 4 + 489 + (short + 5 - 489) % 4092  # bytes of a cell before the number of its next page
    first = content.index(start(1, long))
    page = content[first + local : first + local + 4]
    for row_id in ids:
        at = content.index(start(row_id, short))
        content[at : at + 9] = start(row_id, long)
        content[at + local : at + local + 4] = page
    path.write_bytes(content)


def test_values_that_share_their_pages_do_not_fill_memory(tmp_path):
    """Each can be read; all together are larger than the file."""
    path = archive_2022(tmp_path / "a.db")
    short, ids = 20_000, range(2, 100)
    long = short + 4092 * 240
    execute(path, "DELETE FROM prompts")
    execute(path, "INSERT INTO prompts VALUES (1, ?)", "x" * long)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("INSERT INTO prompts VALUES (?, ?)", [(row_id, "y" * short) for row_id in ids])
    share_pages(path, long, short, ids)
    with Archive.open(path) as archive:
        for read in (archive.prompts, lambda: info(archive)):
            with pytest.raises(ArchiveError, match="larger"):
                read()
        assert "reading" in {problem.kind for problem in verify(archive)}
    with pytest.raises(ArchiveError, match="larger"):
        merge([path], tmp_path / "b.db")
    assert len(execute(path, "SELECT desc FROM prompts WHERE id = 50")[0][0]) == long


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_statement_hears_signals(ours, signal_number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program = start_program("query_for_ever.py", ours)
    finally:
        signal.signal(signal.SIGINT, before)
    with program:
        assert program.stdout.readline() == "begun\n"
        time.sleep(0.3)
        program.send_signal(signal_number)
        _, errors = program.communicate(timeout=2)
    assert program.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in errors
