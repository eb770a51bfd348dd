"""Which files open, which are refused, and what is in their folder afterwards."""

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from archive_kit import COLUMNS_2022, archive_2022, execute, fill, leave_log, new_image, run_program
from helpers import golden

from dm_generations.archive import Archive, ArchiveError, GroupKey, queries, verify
from dm_generations.sampling.params import SamplingParams


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(archive, *map(new_image, range(100)))
    return path


def refused(path, mode="r") -> str:
    """The message with which an archive is refused, one line."""
    with pytest.raises(ArchiveError) as caught:
        Archive.open(path, mode, timeout=0.1).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_archives(tmp_path):
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("hello" * 100)
    (tmp_path / "magic.db").write_bytes(b"SQLite format 3\0")
    (tmp_path / "noise.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    os.mkfifo(tmp_path / "pipe.db")
    assert str(tmp_path) in refused(tmp_path)
    for name in ("missing.db", "empty.db", "text.db", "magic.db", "noise.db", "pipe.db", "a\0b.db"):
        assert repr(name)[1:-1] in refused(tmp_path / name)
    assert str(tmp_path / "missing" / "a.db") in refused(tmp_path / "missing" / "a.db", "w")


def test_other_databases(tmp_path):
    path = tmp_path / "other.db"
    execute(path, "CREATE TABLE prompts (id INTEGER PRIMARY KEY, desc TEXT)")
    assert "sc_prompts" in refused(path)
    execute(path, "CREATE TABLE sc_prompts (id INTEGER PRIMARY KEY, desc TEXT)")
    execute(path, "CREATE VIEW images AS SELECT * FROM prompts")
    assert "images" in refused(path)
    execute(path, "DROP VIEW images")
    execute(path, "CREATE TABLE images (prompt_id, sc_prompt_id, top_k, top_p, key0, key1, quantvec)")
    assert "cond_scale, temperature" in refused(path)


def test_a_newer_format(ours):
    copy = ours.with_name("copy.db")
    shutil.copy(ours, copy)
    execute(ours, "PRAGMA user_version = 4")
    execute(copy, "UPDATE meta SET version = 4")
    for path in (ours, copy):
        for mode in ("r", "w"):
            assert re.search(r"\b4\b.*\b3\b.*newer", refused(path, mode))


@pytest.mark.parametrize("change", ["format = 'another'", "version = 'x'", "version = 0", "version = NULL"])
def test_a_meta_table_of_something_else(ours, change):
    execute(ours, "DROP TABLE meta")
    execute(ours, "CREATE TABLE meta (id, format, version)")
    execute(ours, "INSERT INTO meta VALUES (1, 'dm-generations', 3)")
    execute(ours, f"UPDATE meta SET {change}")
    for mode in ("r", "w"):
        assert "meta" in refused(ours, mode)


def test_a_truncated_file(ours):
    ours.write_bytes(ours.read_bytes()[:9000])
    for mode in ("r", "w"):
        assert "ours.db" in refused(ours, mode)


def test_damage_met_while_reading_is_one_clear_error(ours):
    with open(ours, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (ours.stat().st_size - 4096))
    with pytest.raises(ArchiveError, match=r"ours\.db"), Archive.open(ours) as archive:  # noqa: PT012
        archive.prompts()
        archive.groups()
        list(archive.rows_to_score())


def test_a_locked_archive(ours):
    holder = sqlite3.connect(ours, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert "another program" in refused(ours)
    holder.execute("ROLLBACK")
    holder.execute("BEGIN IMMEDIATE")
    with Archive.open(ours, timeout=0.1) as archive:  # a writer at work does not keep readers out
        assert archive.count() == 100
    with Archive.open(ours, "w", timeout=0.1) as archive, pytest.raises(ArchiveError, match="another program"):
        fill(archive, new_image(1))
    holder.close()


def test_readers_between_two_rows_do_not_hold_off_a_writer(ours):
    with Archive.open(ours) as reader, Archive.open(ours, "w", timeout=0.1) as writer:
        rows = reader.rows(GroupKey(1, 1, SamplingParams(50, 0.9, 1.0, 3.0)))
        next(rows)
        assert fill(writer, new_image(1000)) == 1
        assert sum(1 for _ in rows) == 99


def test_create_refuses_and_leaves_nothing(tmp_path):
    (tmp_path / "there.db").write_text("mine")
    for path in (tmp_path / "there.db", tmp_path / "no" / "such" / "a.db", tmp_path / "a\0b.db"):
        with pytest.raises(ArchiveError):
            Archive.create(path)
    assert os.listdir(tmp_path) == ["there.db"]
    assert (tmp_path / "there.db").read_text() == "mine"


def test_open_or_create_makes_an_archive_once(tmp_path):
    with Archive.open_or_create(tmp_path / "a.db") as archive:
        fill(archive, new_image(1))
    with Archive.open_or_create(tmp_path / "a.db") as archive:
        assert archive.count() == 1
    (tmp_path / "text.db").write_text("mine")
    for path in (tmp_path / "text.db", tmp_path / "no" / "a.db", tmp_path / "a\0b.db"):
        with pytest.raises(ArchiveError):
            Archive.open_or_create(path)
    assert sorted(os.listdir(tmp_path)) == ["a.db", "text.db"]


def test_reading_only_means_no_writing(ours):
    with Archive.open(ours) as archive, pytest.raises(ArchiveError, match="reading"):
        fill(archive, new_image(1))


def test_a_folder_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        for archive_name in ("a.db", "logged.db"):
            with Archive.create(folder / archive_name) as archive:
                fill(archive, new_image(1))
        leave_log(folder / "logged.db")
        (folder / "logged.db-shm").unlink()
        folder.chmod(0o555)
        status, out, errors = run_program("open_without_rights.py", cwd=folder)
        folder.chmod(0o755)
    assert (status, errors) == (0, "")
    read, write, create, read_log = out.splitlines()
    assert read == "1"
    assert all("folder" in line for line in (write, create))
    assert all(word in read_log for word in ("logged.db-wal", "copy", "folder"))


def test_a_killed_writer_loses_its_batch_only(ours):
    status, out, errors = run_program("add_images_until_killed.py", ours)
    assert status == -signal.SIGKILL, errors
    assert out.split() == ["5100", "10100", "15100"]
    assert ours.with_name("ours.db-journal").exists()  # the file holds half a batch
    with Archive.open(ours) as archive:
        assert archive.count() == 15100
    assert os.listdir(ours.parent) == ["ours.db"]
    assert execute(ours, "PRAGMA integrity_check") == [("ok",)]


def test_half_a_batch_that_cannot_be_undone_here_is_reported_with_a_remedy(ours, tmp_path, monkeypatch):
    original = tmp_path / "2022.db"
    shutil.copy(golden("original_script") / "archive.db", original)
    for path in (ours, original):
        run_program("update_scores_until_killed.py", path)
    before = original.read_bytes()
    assert "sqlite3" in refused(original)
    assert original.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # a folder of another user
        assert "-journal" in refused(ours)
    with Archive.open(ours) as archive:
        assert archive.count() == 100


def test_the_2022_layout_is_read_and_never_touched(tmp_path):
    path = tmp_path / "archive.db"
    shutil.copy(golden("original_script") / "archive.db", path)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    before = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
    with Archive.open(path) as archive:
        assert archive.version == 0
        assert archive.models() == {}
        groups = archive.groups()
        assert (len(groups), sum(group.count for group in groups), archive.count()) == (25, 101, 101)
        for group in groups:
            rows = list(archive.rows(group.key))
            assert len(rows) == group.count
            assert rows == sorted(rows, key=lambda row: (-row.clip_score_input, row.id))
        assert os.listdir(tmp_path) == ["archive.db"]
        assert archive.existing_keys(groups[0].key, None)
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == ["archive.db"]
    tmp_path.chmod(0o755)
    assert "merge" in refused(path, "w")


def test_the_2022_layout_with_other_columns(tmp_path):
    path = archive_2022(
        tmp_path / "a.db",
        "QUANTVEC BLOB, prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, mood",
    )
    execute(path, "INSERT INTO images VALUES (x'0100', 3, 1, 50, 1, 1, 10, 5, 6, 'sunny')")
    execute(path, "INSERT INTO images VALUES ('text', 3, 1, 50, 1, 1, 10, 5, 7, NULL)")
    with Archive.open(path) as archive:
        (group,) = archive.groups()
        assert repr(group.key.params.top_p) == "1.0"  # as the file names of the 2022 script have it
        first, second = archive.rows(group.key)
    assert (first.id, first.quantvec, first.clip_score_input, first.codec_id) == (1, b"\1\0", None, None)
    assert (second.id, second.quantvec) == (2, b"")


def test_the_2022_layout_with_settings_that_are_not_numbers(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO images (prompt_id, sc_prompt_id, top_k) VALUES (3, 1, 'many')")
    with (
        Archive.open(path) as archive,
        pytest.raises(ArchiveError, match="top_k 'many'"),
    ):
        archive.groups()


def test_prompts_that_are_not_text(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO prompts VALUES (8, CAST(x'61ff62' AS TEXT)), (9, x'6162'), (10, NULL)")
    execute(path, "INSERT INTO prompts VALUES (11, CAST(x'610062' AS TEXT))")
    with Archive.open(path) as archive:
        texts = archive.prompts()
    assert [texts[i] for i in (8, 9, 10, 11)] == ["a\ufffdb", "ab", None, "a\0b"]


def test_utf_16_archives(tmp_path):
    path = tmp_path / "a.db"
    execute(path, "PRAGMA encoding = 'UTF-16le'")
    connection = sqlite3.connect(path)
    connection.executescript(f"""PRAGMA encoding = 'UTF-16le';
        CREATE TABLE prompts (id INTEGER PRIMARY KEY, desc TEXT);
        CREATE TABLE sc_prompts (id INTEGER PRIMARY KEY, desc TEXT);
        CREATE TABLE images ({COLUMNS_2022});
        INSERT INTO prompts VALUES (1, 'café 🥑');""")
    connection.close()
    with Archive.open(path) as archive:
        assert archive.prompts() == {1: "café 🥑"}


def test_odd_file_names(tmp_path):
    for name in ("a?mode=rwc#x.db", "100%41.db", "a b;é🥑.db", "x" * 244 + ".db"):
        with Archive.create(tmp_path / name) as archive:
            fill(archive, new_image(1))
        with Archive.open(tmp_path / name) as archive:
            assert archive.count() == 1
    with pytest.raises(ArchiveError, match="name"):
        Archive.create(tmp_path / ("x" * 245 + ".db"))
    assert len(os.listdir(tmp_path)) == 4


def test_an_empty_name_is_refused():
    assert "folder" in refused("")


SUPER_JOURNAL = b"\0\0\0\1victim.txt" + (10).to_bytes(4, "big") + sum(b"victim.txt").to_bytes(4, "big")


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_journal_that_names_a_file_to_delete_is_refused(ours, mode):
    """SQLite undoes such a journal, and then deletes the file that it names."""
    victim = ours.with_name("victim.txt")
    victim.write_text("mine")
    run_program("update_scores_until_killed.py", ours)
    journal = ours.with_name("ours.db-journal")
    with open(journal, "ab") as file:
        file.write(SUPER_JOURNAL + bytes.fromhex("d9d505f920a163d7"))
    before = ours.read_bytes(), journal.read_bytes()
    link = ours.with_name("link.db")
    link.symlink_to(ours)
    for path in (ours, link):
        assert "ours.db-journal" in refused(path, mode)
    assert (ours.read_bytes(), journal.read_bytes(), victim.read_text()) == (*before, "mine")


def test_a_journal_that_is_a_pipe_is_refused(ours):
    os.mkfifo(ours.with_name("ours.db-journal"))
    assert "ours.db-journal" in refused(ours)


def test_ids_that_do_not_ascend_end_a_scan(ours):
    """A table of the right names whose ids are not numbers of rows."""
    execute(ours, "CREATE TABLE copy AS SELECT * FROM images")
    execute(ours, "DROP TABLE images")
    execute(ours, "ALTER TABLE copy RENAME TO images")
    for value in ("7", "CAST(x'ff' AS TEXT)", "x'00'", "1.5"):
        execute(ours, f"UPDATE images SET id = {value}")
        with Archive.open(ours) as archive:
            with pytest.raises(ArchiveError, match="ids"):
                list(archive.rows_to_score())
            assert "reading" in {problem.kind for problem in verify(archive)}
            if value != "7":  # numbers, if the wrong ones, can be read
                with pytest.raises(ArchiveError, match="id"):
                    archive.rows(GroupKey(1, 1, SamplingParams(50, 0.9, 1.0, 3.0)))


def test_large_tokens_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "CHUNK_BYTES", 2_000_000)
    path = archive_2022(tmp_path / "a.db")
    insert = "INSERT INTO images VALUES (?, 3, 1, 50, 1.0, 1.0, 10.0, 1, 2, zeroblob(1000000), NULL, ?, NULL)"
    for row_id in range(1, 21):
        execute(path, insert, row_id, float(-row_id))
    with Archive.open(path) as archive:
        (group,) = archive.groups()
        tracemalloc.start()
        assert [row.id for row in archive.rows(group.key)] == list(range(1, 21))
        assert [values[0] for values in archive.scan(["id", "quantvec"])] == list(range(1, 21))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6, peak
