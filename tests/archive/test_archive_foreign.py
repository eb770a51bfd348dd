"""Archives that other tools have changed: triggers, full-text search, write-ahead logs, dumps."""

import contextlib
import os
import re
import sqlite3
from pathlib import Path

import pytest
from archive_kit import archive_2022, archive_v1, execute, fill, leave_log, new_image

from dm_generations.archive import Archive, ArchiveError, info, merge, verify

SQLITE_UTILS = Path(__file__).with_name("sqlite_utils.sql").read_text()


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.db"
    with Archive.create(path) as archive:
        fill(archive, *map(new_image, range(100)))
    return path


def test_views_and_triggers_of_a_file_do_not_run_while_it_is_read(ours):
    execute(ours, "CREATE VIEW image_order AS SELECT 1/0")
    execute(ours, "CREATE VIEW bad AS SELECT * FROM missing")
    execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN DELETE FROM prompts; END")
    with Archive.open(ours) as archive:
        assert archive.count() == 100
        assert len(archive.groups()) == 1
        assert list(verify(archive)) == []
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
        "AFTER INSERT ON images BEGIN INSERT INTO other SELECT a.id FROM images a, images b, images c; END",
        "BEFORE INSERT ON prompts BEGIN SELECT RAISE(IGNORE); END",
    ],
)
def test_triggers_that_could_change_an_archive_are_refused_before_it_is_written(ours, trigger):
    execute(ours, "CREATE TABLE log (n)")
    execute(ours, "CREATE TABLE other (n)")
    execute(ours, "CREATE TRIGGER more AFTER INSERT ON log BEGIN DELETE FROM images; END")
    execute(ours, f"CREATE TRIGGER evil {trigger}")
    before = ours.read_bytes()
    with pytest.raises(ArchiveError, match="trigger"):
        Archive.open(ours, "w")
    assert ours.read_bytes() == before


def test_a_trigger_that_appears_while_a_file_is_open_is_refused(ours):
    with Archive.open(ours, "w") as archive:
        execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN DELETE FROM prompts; END")
        with pytest.raises(ArchiveError):
            fill(archive, new_image(1000))
        assert (archive.count(), len(archive.prompts())) == (100, 1)


def test_messages_that_are_not_utf_8(ours):
    """Python's sqlite3 cannot read what SQLite says about a name that is not text."""
    execute(ours, "CREATE TABLE xyzzy (n)")
    execute(ours, "CREATE TRIGGER evil AFTER INSERT ON images BEGIN INSERT INTO xyzzy VALUES (1); END")
    execute(ours, "DROP TABLE xyzzy")
    ours.write_bytes(ours.read_bytes().replace(b"xyzzy", b"xyz\xff\xfe"))
    with pytest.raises(ArchiveError):
        Archive.open(ours, "w")
    damaged = ours.read_bytes().replace(
        b"CREATE INDEX images_by_group ON images", b"CREATE INDEX images_by_group ON im\xffges"
    )
    ours.write_bytes(damaged)
    with pytest.raises(ArchiveError):
        Archive.open(ours)


def count_of(path, table: str) -> int:
    """What the triggers of sqlite-utils have counted."""
    return execute(path, 'SELECT count FROM _counts WHERE "table" = ?', table)[0][0]


@pytest.mark.parametrize("quotes", ['""', "[]"])
def test_an_archive_with_the_triggers_of_sqlite_utils_is_written(ours, quotes):
    sql = re.sub(r'"(\w+)"', rf"{quotes[0]}\1{quotes[1]}", SQLITE_UTILS)
    with contextlib.closing(sqlite3.connect(ours)) as connection:
        connection.executescript(sql)
    with Archive.open(ours, "w") as archive:
        assert fill(archive, new_image(1000, prompt="a green pyramid")) == 1
        assert fill(archive, new_image(1000, prompt="a green pyramid")) == 0
        assert archive.prompts() == {1: "a red cube", 2: "a green pyramid"}
    source = ours.with_name("source.db")
    with Archive.create(source) as archive:
        fill(archive, new_image(1, clip_score_input=1.0), new_image(2, prompt="a blue ball"), new_image(3))
    (report,) = merge([source], ours)
    assert (report.image_count, report.added_count, report.scored_count) == (3, 1, 1)
    assert [count_of(ours, table) for table in ("images", "prompts", "prompts_fts_docsize")] == [102, 3, 3]
    found = execute(ours, "SELECT rowid FROM prompts_fts WHERE prompts_fts MATCH 'pyramid OR ball' ORDER BY rowid")
    assert found == [(2,), (3,)]
    with Archive.open(ours) as archive:
        assert list(verify(archive)) == []


def test_a_text_index_with_a_trigger_of_another_kind_changes_nothing(ours):
    """Whether SQLite lets a trigger write to it depends on its version; the archive's own tables are safe in all."""
    with contextlib.closing(sqlite3.connect(ours)) as connection:
        connection.executescript(SQLITE_UTILS)
    execute(ours, "CREATE TRIGGER evil AFTER INSERT ON prompts_fts_docsize BEGIN DELETE FROM images; END")
    before = execute(ours, "SELECT * FROM images")
    with pytest.raises(ArchiveError), Archive.open(ours, "w") as archive:
        fill(archive, new_image(1000, prompt="a green pyramid"))
    assert execute(ours, "SELECT * FROM images") == before
    assert execute(ours, "SELECT desc FROM prompts") == [("a red cube",)]


def test_wal_mode_files_are_read_without_leaving_a_log(tmp_path):
    path = archive_2022(tmp_path / "a.db")
    execute(path, "PRAGMA journal_mode = WAL")
    before = path.read_bytes()
    with Archive.open(path) as archive:
        assert archive.groups() == []
        assert archive.prompts() == {3: "a blue ball", 7: "a red cube"}
        assert os.listdir(tmp_path) == ["a.db"]
    assert path.read_bytes() == before


def test_an_archive_that_was_put_into_wal_mode_is_one_file_again(ours):
    execute(ours, "PRAGMA journal_mode = WAL")
    with Archive.open(ours, "w") as archive:
        fill(archive, new_image(1000))
    assert os.listdir(ours.parent) == ["ours.db"]
    assert execute(ours, "PRAGMA journal_mode") == [("delete",)]


@pytest.mark.parametrize("name", ["ours.db", "link.db", "folder/ours.db"])
def test_commits_in_a_log_are_read_under_every_name_of_the_archive(ours, name):
    """As SQLite does, which looks for the log next to the file that a symbolic link leads to."""
    ours.with_name("link.db").symlink_to("ours.db")
    ours.with_name("folder").symlink_to(".")
    leave_log(ours)
    with Archive.open(ours.parent / name) as archive:
        assert archive.count() == execute(ours, "SELECT count(*) FROM images")[0][0] == 99
        assert list(verify(archive)) == []


@pytest.mark.parametrize("name", ["ours.db", "link/ours.db"])
def test_a_writer_that_begins_while_an_archive_without_a_log_is_read_ends_the_reading(ours, tmp_path, name):
    """SQLite takes such a file for one that nobody changes; what it reads then can be of two states."""
    (tmp_path / "link").symlink_to(".")
    execute(ours, "PRAGMA journal_mode = WAL")
    with Archive.open(tmp_path / name) as archive:
        (group,) = archive.groups()
        rows = archive.rows(group.key)
        next(rows)
        with contextlib.closing(sqlite3.connect(ours)) as writer:
            writer.execute("UPDATE images SET clip_score_input = id")
            writer.commit()
            with pytest.raises(ArchiveError, match="again"):
                archive.count()
        with pytest.raises(ArchiveError, match="again"):  # also when the log has become part of the file
            archive.count()
    with Archive.open(tmp_path / name) as archive:
        assert next(archive.rows(group.key)).id == 100


def test_rows_that_a_writer_with_a_log_adds_are_read(ours):
    execute(ours, "PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(ours)) as writer:
        with writer:
            writer.execute("DELETE FROM images WHERE id = 1")
        with Archive.open(ours) as archive:
            assert archive.count() == 99
            with writer:
                writer.execute("DELETE FROM images WHERE id = 2")
            assert archive.count() == 98
            assert list(verify(archive)) == []


def dump(path: Path) -> Path:
    """A copy through SQL text, which has neither application_id nor user_version."""
    copy = path.with_name("dumped.db")
    with contextlib.closing(sqlite3.connect(path)) as old, contextlib.closing(sqlite3.connect(copy)) as new:
        new.executescript("\n".join(old.iterdump()))
    assert execute(copy, "PRAGMA application_id") == execute(copy, "PRAGMA user_version") == [(0,)]
    return copy


def test_an_archive_that_was_dumped_is_read_as_before(ours):
    copy = dump(ours)
    with Archive.open(copy) as archive, Archive.open(ours) as original:
        assert archive.version == original.version == 3
        assert archive.models() == original.models()
        assert list(archive.rows_to_score()) == list(original.rows_to_score())
        assert list(verify(archive)) == []
        assert info(archive).models == info(original).models
    merge([copy], ours.with_name("merged.db"))
    images = "SELECT generator_id, codec_id, quantvec FROM images"
    assert execute(ours.with_name("merged.db"), images) == execute(ours, images)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_archive_that_was_dumped_gets_its_identifiers_back_when_it_is_written(ours, tmp_path, version):
    copy = dump(ours if version == 3 else archive_v1(tmp_path / "old.db", range(100), version))
    with Archive.open(copy) as archive:
        assert archive.version == version
    with Archive.open(copy, "w") as archive:
        assert fill(archive, new_image(5), new_image(1000)) == 1
    schema = "SELECT type, name, tbl_name FROM sqlite_master ORDER BY name"
    for query in ("PRAGMA application_id", "PRAGMA user_version", schema):
        assert execute(copy, query) == execute(ours, query)


def test_a_damaged_archive_is_not_taken_for_the_2022_layout(ours):
    copy = dump(ours)
    execute(copy, "DROP TABLE models")
    for mode in ("r", "w"):
        with pytest.raises(ArchiveError, match="models"):
            Archive.open(copy, mode)
