"""What opens, what is refused and with which words; what is left beside the file."""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from archive_kit import COLUMNS_2022, archive_2022, execute, fill, new_image
from helpers import ROOT, golden

from dm_generations.archive import Archive, ArchiveError, GroupKey, database, merge, verify
from dm_generations.sampling.params import SamplingParams


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(archive, *map(new_image, range(100)))
    return path


def refused(path, mode="r") -> str:
    """The message with which an archive is refused; one line."""
    with pytest.raises(ArchiveError) as caught:
        Archive.open(path, mode, timeout=0.1).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_archive(tmp_path):
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("hello" * 100)
    (tmp_path / "magic.db").write_bytes(b"SQLite format 3\0")
    (tmp_path / "noise.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    os.mkfifo(tmp_path / "pipe.db")
    assert "no such file" in refused(tmp_path / "missing.db")
    assert "no such file" in refused(tmp_path / "missing" / "a.db", "w")
    assert "is a folder" in refused(tmp_path)
    assert "empty" in refused(tmp_path / "empty.db")
    assert "not an SQLite database" in refused(tmp_path / "text.db")
    assert "damaged or cut short" in refused(tmp_path / "magic.db")
    assert "noise.db" in refused(tmp_path / "noise.db")
    assert "not a regular file" in refused(tmp_path / "pipe.db")
    assert "cannot be read" in refused(tmp_path / "a\0b.db")


def test_other_databases(tmp_path):
    path = tmp_path / "other.db"
    execute(path, "CREATE TABLE prompts (id INTEGER PRIMARY KEY, desc TEXT)")
    assert "no table sc_prompts" in refused(path)
    execute(path, "CREATE TABLE sc_prompts (id INTEGER PRIMARY KEY, desc TEXT)")
    execute(path, "CREATE VIEW images AS SELECT * FROM prompts")
    assert "no table images" in refused(path)
    execute(path, "DROP VIEW images")
    execute(path, "CREATE TABLE images (prompt_id, sc_prompt_id, top_k, top_p, key0, key1, quantvec)")
    assert "images lacks cond_scale, temperature" in refused(path)


def test_a_newer_format(ours):
    execute(ours, "PRAGMA user_version = 3")
    for mode in ("r", "w"):
        assert "has format 3, this program reads up to 2; install a newer" in refused(ours, mode)


def test_a_truncated_file(ours):
    ours.write_bytes(ours.read_bytes()[:9000])
    for mode in ("r", "w"):
        assert "damaged or cut short" in refused(ours, mode)


def test_damage_met_while_reading_is_one_clear_error(ours):
    with open(ours, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (ours.stat().st_size - 4096))
    with pytest.raises(ArchiveError, match="damaged or cut short|SQLite"), Archive.open(ours) as archive:
        archive.prompts(), archive.groups(), list(archive.rows_to_score())


def test_a_locked_archive(ours):
    holder = sqlite3.connect(ours, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert "another program is using the archive" in refused(ours)
    holder.execute("ROLLBACK")
    holder.execute("BEGIN IMMEDIATE")
    with Archive.open(ours, timeout=0.1) as archive:  # a writer at work does not keep readers out
        assert archive.count() == 100
    with Archive.open(ours, "w", timeout=0.1) as archive:
        with pytest.raises(ArchiveError, match="another program is using the archive"):
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
    for path, message in [
        (tmp_path / "there.db", "exists already"),
        (tmp_path / "no" / "such" / "a.db", "no such folder"),
        (tmp_path / "a\0b.db", "cannot be created"),
    ]:
        with pytest.raises(ArchiveError, match=message):
            Archive.create(path)
    assert os.listdir(tmp_path) == ["there.db"] and (tmp_path / "there.db").read_text() == "mine"


def test_open_or_create_makes_an_archive_once(tmp_path):
    with Archive.open_or_create(tmp_path / "a.db") as archive:
        fill(archive, new_image(1))
    with Archive.open_or_create(tmp_path / "a.db") as archive:
        assert archive.count() == 1
    (tmp_path / "text.db").write_text("mine")
    for path, message in [
        (tmp_path / "text.db", "not an SQLite database"),
        (tmp_path / "no" / "a.db", "no such folder"),
        (tmp_path / "a\0b.db", "cannot be created"),
    ]:
        with pytest.raises(ArchiveError, match=message):
            Archive.open_or_create(path)
    assert sorted(os.listdir(tmp_path)) == ["a.db", "text.db"]


def test_reading_only_means_no_writing(ours):
    with Archive.open(ours) as archive, pytest.raises(ArchiveError, match="open for reading only"):
        fill(archive, new_image(1))


WITHOUT_RIGHTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from dm_generations.archive import Archive, ArchiveError
Archive.open("a.db").close()  # what is imported late is imported now: the next user may not read this Python
if os.geteuid() == 0:
    os.setuid(65534)  # root could write anywhere
print(Archive.open("a.db").count())
for job in (lambda: Archive.open("a.db", "w"), lambda: Archive.create("b.db")):
    try:
        job()
    except ArchiveError as error:
        print(error)
"""


def test_a_folder_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        with Archive.create(folder / "a.db") as archive:
            fill(archive, new_image(1))
        folder.chmod(0o555)
        command = [sys.executable, "-c", WITHOUT_RIGHTS, str(ROOT)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        folder.chmod(0o755)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "1" and len(lines) == 3
    assert all("this folder cannot be written" in line for line in lines[1:])


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from archive_kit import fill, new_image
from dm_generations.archive import Archive
from dm_generations.sampling.params import SamplingParams
archive = Archive.open(sys.argv[2], "w")
archive.connection.execute("PRAGMA cache_size = 10")  # pages, so that half a batch reaches the file
key = 1000
while True:
    with archive.transaction():
        archive.add_images((new_image(key + i) for i in range(5000)), None, None, None, 1)
        if key > 12000:
            os.kill(os.getpid(), signal.SIGKILL)
    key += 5000
    print(archive.count(), flush=True)
"""


def test_a_killed_writer_loses_its_batch_only(ours):
    command = [sys.executable, "-c", KILLED, str(ROOT), str(ours)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert result.stdout.split() == ["5100", "10100", "15100"]
    assert ours.with_name("ours.db-journal").exists()  # the file holds half a batch
    with Archive.open(ours) as archive:
        assert archive.count() == 15100
    assert os.listdir(ours.parent) == ["ours.db"]
    assert execute(ours, "PRAGMA integrity_check") == [("ok",)]


HALF_A_BATCH = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 2")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE images SET clip_score_input = 0")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_half_a_batch_that_cannot_be_undone_here_is_told_with_a_remedy(ours, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs.db"
    shutil.copy(golden("original_script") / "archive.db", theirs)
    for path in (ours, theirs):
        subprocess.run([sys.executable, "-c", HALF_A_BATCH, str(path)])
    before = theirs.read_bytes()
    assert "undo its last batch: the program `sqlite3` does that when it reads the file" in refused(theirs)
    assert theirs.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # a folder of someone else's
        assert refused(ours).endswith("to undo its last batch: copy the archive and its -journal to a folder of yours")
    with Archive.open(ours) as archive:
        assert archive.count() == 100


def test_the_2022_layout_is_read_and_never_touched(tmp_path):
    path = tmp_path / "archive.db"
    shutil.copy(golden("original_script") / "archive.db", path)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    before = (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
    with Archive.open(path) as archive:
        assert archive.version == 0 and archive.models() == {}
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
    assert "`merge` it into a new archive" in refused(path, "w")


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


def test_the_2022_layout_with_settings_that_are_no_numbers(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "INSERT INTO images (prompt_id, sc_prompt_id, top_k) VALUES (3, 1, 'many')")
    with (
        Archive.open(path) as archive,
        pytest.raises(ArchiveError, match="top_k 'many'; `verify` lists them"),
    ):
        archive.groups()


def test_wal_mode_files_are_read_without_leaving_a_log(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "PRAGMA journal_mode = WAL")
    before = path.read_bytes()
    with Archive.open(path) as archive:
        assert archive.groups() == [] and archive.prompts() == {3: "a blue ball", 7: "a red cube"}
        assert os.listdir(tmp_path) == ["a.db"]
    assert path.read_bytes() == before


def test_an_archive_that_was_put_into_wal_mode_is_one_file_again(ours):
    execute(ours, "PRAGMA journal_mode = WAL")
    with Archive.open(ours, "w") as archive:
        fill(archive, new_image(1000))
    assert os.listdir(ours.parent) == ["ours.db"]
    assert execute(ours, "PRAGMA journal_mode") == [("delete",)]


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
    with pytest.raises(ArchiveError, match="name is too long"):
        Archive.create(tmp_path / ("x" * 245 + ".db"))
    assert len(os.listdir(tmp_path)) == 4


def test_a_name_without_characters_is_no_archive():
    assert "is a folder" in refused("")


SUPER_JOURNAL = b"\0\0\0\1victim.txt" + (10).to_bytes(4, "big") + sum(b"victim.txt").to_bytes(4, "big")


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_journal_that_names_a_file_to_delete_is_refused(ours, mode):
    """SQLite undoes such a journal, and then deletes the file that it names."""
    victim = ours.with_name("victim.txt")
    victim.write_text("mine")
    subprocess.run([sys.executable, "-c", HALF_A_BATCH, str(ours)])
    journal = ours.with_name("ours.db-journal")
    with open(journal, "ab") as file:
        file.write(SUPER_JOURNAL + bytes.fromhex("d9d505f920a163d7"))
    before = ours.read_bytes(), journal.read_bytes()
    link = ours.with_name("link.db")
    link.symlink_to(ours)
    for path in (ours, link):
        assert "ours.db-journal: this journal is part of a write to several databases" in refused(path, mode)
    assert (ours.read_bytes(), journal.read_bytes(), victim.read_text()) == (*before, "mine")


def test_a_journal_that_is_a_pipe_is_refused(ours):
    os.mkfifo(ours.with_name("ours.db-journal"))
    assert "not a regular file" in refused(ours)


def test_views_and_triggers_of_a_file_do_not_run_while_it_is_read(ours):
    execute(ours, "CREATE VIEW image_order AS SELECT 1/0")
    execute(ours, "CREATE VIEW bad AS SELECT * FROM missing")
    execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN DELETE FROM prompts; END")
    with Archive.open(ours) as archive:
        assert archive.count() == 100 and len(archive.groups()) == 1 and list(verify(archive)) == []
    merge([ours], ours.with_name("merged.db"))
    assert execute(ours.with_name("merged.db"), "SELECT count(*) FROM images") == [(100,)]


@pytest.mark.parametrize(
    "trigger",
    [
        "AFTER INSERT ON images BEGIN DELETE FROM prompts; END",
        "BEFORE INSERT ON prompts BEGIN INSERT INTO Sc_Prompts (desc) VALUES ('mine'); END",
        "AFTER INSERT ON models BEGIN UPDATE images SET quantvec = x'00'; END",
        "AFTER UPDATE OF clip_score_input ON images BEGIN DELETE FROM images; END",
        "AFTER INSERT ON images BEGIN INSERT INTO log VALUES (1); END",  # and that table has a trigger too
        "AFTER INSERT ON images BEGIN"
        " INSERT INTO other WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i FROM n; END",
        "AFTER INSERT ON images BEGIN INSERT INTO nowhere VALUES (1); END",
    ],
)
def test_triggers_that_could_change_an_archive_are_refused_before_it_is_written(ours, trigger):
    execute(ours, "CREATE TABLE log (n)")
    execute(ours, "CREATE TABLE other (n)")
    execute(ours, "CREATE TRIGGER more AFTER INSERT ON log BEGIN DELETE FROM images; END")
    execute(ours, f"CREATE TRIGGER evil {trigger}")
    before = ours.read_bytes()
    assert "drop it, or `merge` the archive into a new one" in refused(ours, "w")
    assert ours.read_bytes() == before


def test_triggers_that_only_count_run(ours):
    execute(ours, "CREATE TABLE counts (n INTEGER)")
    execute(ours, "INSERT INTO counts VALUES (0)")
    execute(ours, "CREATE TRIGGER count_ AFTER INSERT ON images BEGIN UPDATE counts SET n = n + 1; END")
    with Archive.open(ours, "w") as archive:
        assert fill(archive, new_image(1000)) == 1
    source = ours.with_name("source.db")
    with Archive.create(source) as archive:
        fill(archive, new_image(1, clip_score_input=1.0), new_image(2000))
    (report,) = merge([source], ours)
    assert (report.added_count, report.scored_count) == (1, 1)  # without what triggers changed
    assert execute(ours, "SELECT n FROM counts") == [(2,)]


def test_a_trigger_that_appears_while_a_file_is_open_is_refused(ours):
    with Archive.open(ours, "w") as archive:
        execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN DELETE FROM prompts; END")
        with pytest.raises(ArchiveError):
            fill(archive, new_image(1000))
        assert archive.count() == 100 and len(archive.prompts()) == 1


def test_messages_that_are_not_utf_8(ours):
    """Python's sqlite3 cannot read what SQLite says about a name that is not text."""
    execute(ours, "CREATE TABLE xyzzy (n)")
    execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN INSERT INTO xyzzy VALUES (1); END")
    execute(ours, "DROP TABLE xyzzy")
    ours.write_bytes(ours.read_bytes().replace(b"xyzzy", b"xyz\xff\xfe"))
    refused(ours, "w")
    damaged = ours.read_bytes().replace(
        b"CREATE INDEX images_by_group ON images", b"CREATE INDEX images_by_group ON im\xffges"
    )
    ours.write_bytes(damaged)
    refused(ours)


def test_ids_that_do_not_ascend_end_a_scan(ours):
    """A table of the right names whose ids are not numbers of rows."""
    execute(ours, "CREATE TABLE copy AS SELECT * FROM images")
    execute(ours, "DROP TABLE images")
    execute(ours, "ALTER TABLE copy RENAME TO images")
    for value in ("7", "CAST(x'ff' AS TEXT)", "x'00'", "1.5"):
        execute(ours, f"UPDATE images SET id = {value}")
        with Archive.open(ours) as archive:
            with pytest.raises(ArchiveError, match="ids of the images do not ascend"):
                list(archive.rows_to_score())
            assert any("reading stopped" in str(problem) for problem in verify(archive))
            if value != "7":  # numbers, if the wrong ones, can be read
                with pytest.raises(ArchiveError, match="not a whole number"):
                    archive.rows(GroupKey(1, 1, SamplingParams(50, 0.9, 1.0, 3.0)))


def test_large_tokens_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "CHUNK_BYTES", 2_000_000)
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
