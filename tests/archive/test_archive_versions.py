"""Version 1: read as it is, updated by the first program that writes, and never left half updated."""

import os
import shutil
import signal
import sqlite3
import subprocess
import threading

import pytest
from archive_kit import archive_v1, execute, fill, insert_v1, new_image, run_program, start_program
from helpers import ROOT

from dm_generations.archive import Archive, ArchiveError, GroupKey, info, verify
from dm_generations.archive.schema import ADDED_COLUMNS
from dm_generations.sampling.params import SamplingParams

GROUP = GroupKey(1, 1, SamplingParams(50, 0.9, 1.0, 3.0))
SCHEMA = "SELECT type, name, sql FROM sqlite_master ORDER BY name"


@pytest.fixture
def v1(tmp_path):
    return archive_v1(tmp_path / "v1.db", range(100))


def test_reading_version_1_changes_nothing(v1):
    v1.chmod(0o444)
    before = v1.read_bytes(), v1.stat().st_mtime_ns
    with Archive.open(v1) as archive:
        assert (archive.version, info(archive).layout) == (1, "1")
        assert [str(problem) for problem in verify(archive)] == []
        rows = list(archive.rows(GROUP))
        assert [row.key1 for row in rows] == list(range(100))
        assert {(row.log_prob, row.dtype, row.init_count, row.init_md5) for row in rows} == {(None, None, 0, "")}
        assert len(archive.existing_keys(GROUP, 1)) == 100 and not archive.existing_keys(GROUP, 1, init_md5="0" * 32)
    assert (v1.read_bytes(), v1.stat().st_mtime_ns) == before
    assert os.listdir(v1.parent) == ["v1.db"]


def test_opening_to_write_updates_version_1(v1):
    columns = "id, prompt_id, key0, key1, quantvec, quantvec_md5, time_start, generator_id, codec_id, sampler_version"
    before = execute(v1, f"SELECT {columns} FROM images")
    with Archive.open(v1, "w") as archive:
        assert archive.version == 3
        assert [str(problem) for problem in verify(archive)] == []
        assert fill(archive, new_image(5), new_image(200, log_prob=-1.5)) == 1  # 5 is there
    assert execute(v1, f"SELECT {columns} FROM images WHERE id <= 100") == before
    added = ", ".join(ADDED_COLUMNS[2])
    assert execute(v1, f"SELECT DISTINCT {added} FROM images") == [
        (None, None, 0, ""),
        (-1.5, None, 0, ""),
    ]
    assert execute(v1, "PRAGMA integrity_check") == [("ok",)]
    with Archive.open(v1) as archive:
        assert (archive.version, archive.count()) == (3, 101)


def test_the_steps_lead_to_what_a_new_archive_is(v1, tmp_path):
    Archive.open(v1, "w").close()
    Archive.create(tmp_path / "new.db").close()
    assert execute(v1, SCHEMA) == execute(tmp_path / "new.db", SCHEMA)
    assert execute(v1, "PRAGMA user_version") == execute(tmp_path / "new.db", "PRAGMA user_version") == [(3,)]
    assert execute(tmp_path / "new.db", "PRAGMA application_id") == [(0x444D4731,)]


def test_the_archive_that_ships_can_be_filled_further(tmp_path):
    path = shutil.copy(ROOT / "archive" / "emoji.db", tmp_path / "emoji.db")
    with Archive.open(path) as archive:
        before = [(row.id, row.key0, row.key1, row.quantvec) for row in archive.rows_to_score(rescore=True)]
    with Archive.open(path, "w") as archive:
        assert [str(problem) for problem in verify(archive)] == []
        after = [(row.id, row.key0, row.key1, row.quantvec) for row in archive.rows_to_score(rescore=True)]
    assert after == before and len(before) > 1000


def test_the_checks_of_the_new_columns_hold_in_an_old_file(v1):
    Archive.open(v1, "w").close()
    for change in ("log_prob = 9e999", "dtype = 'int8'", "init_count = 1", "init_md5 = '0'", "init_count = NULL"):
        with pytest.raises(sqlite3.IntegrityError):
            execute(v1, f"UPDATE images SET {change} WHERE id = 1")


def test_a_process_killed_in_an_update_leaves_version_1(tmp_path):
    v1 = archive_v1(tmp_path / "v1.db", range(5000))
    schema = execute(v1, SCHEMA)
    status, _, errors = run_program("upgrade_until_killed.py", v1)
    assert status == -signal.SIGKILL, errors
    assert v1.with_name("v1.db-journal").exists()  # the file holds half of the step
    with Archive.open(v1) as archive:
        assert (archive.version, archive.count()) == (1, 5000)
        assert [str(problem) for problem in verify(archive)] == []
    assert os.listdir(tmp_path) == ["v1.db"] and execute(v1, SCHEMA) == schema
    with Archive.open(v1, "w") as archive:
        assert (archive.version, archive.count()) == (3, 5000)


@pytest.mark.e2e
def test_an_update_killed_at_any_statement_leaves_version_2(tmp_path):
    original = archive_v1(tmp_path / "original.db", range(2000), version=2)
    schema = execute(original, SCHEMA)
    v2 = tmp_path / "v2.db"
    for number in range(3, 33):
        shutil.copy(original, v2)
        status, _, errors = run_program("upgrade_until_killed.py", v2, number)
        assert status == -signal.SIGKILL, errors
        with Archive.open(v2) as archive:
            assert (archive.version, archive.count()) == (2, 2000)
            assert [str(problem) for problem in verify(archive)] == []
        assert execute(v2, SCHEMA) == schema


def test_version_2_keeps_its_models_and_groups(tmp_path):
    v2 = archive_v1(tmp_path / "v2.db", range(100), version=2)
    with Archive.open(v2) as archive:
        assert archive.version == 2
        before = archive.models(), archive.groups(), list(archive.rows(GROUP))
    with Archive.open(v2, "w") as archive:
        assert archive.version == 3
        assert (archive.models(), archive.groups(), list(archive.rows(GROUP))) == before
        assert [str(problem) for problem in verify(archive)] == []
    assert execute(v2, "PRAGMA foreign_key_check") == []
    assert "claims" not in {name for _, name, _ in execute(v2, SCHEMA)}


def test_a_step_that_fails_leaves_version_1(v1):
    execute(v1, "CREATE TABLE claims (mine)")  # in the way of ours
    before = execute(v1, SCHEMA)
    with pytest.raises(ArchiveError, match="claims"):
        Archive.open(v1, "w")
    assert execute(v1, SCHEMA) == before and execute(v1, "PRAGMA user_version") == [(1,)]


def test_many_that_open_at_once_all_find_the_newest_version(tmp_path):
    v1 = archive_v1(tmp_path / "v1.db", range(5000))
    openers = [start_program("open_to_write.py", v1, stdin=subprocess.PIPE) for _ in range(4)]
    for opener in openers:
        opener.stdin.write("go\n")
        opener.stdin.flush()
    results = [opener.communicate(timeout=60) for opener in openers]
    assert results == [("3\n", "")] * 4
    assert execute(v1, "PRAGMA integrity_check") == [("ok",)]


def test_opening_waits_for_another_writer(v1):
    holder = sqlite3.connect(v1, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(ArchiveError, match="another program"):
        Archive.open(v1, "w", timeout=0.1)
    assert execute(v1, "PRAGMA user_version") == [(1,)]
    release = threading.Timer(0.3, lambda: holder.execute("ROLLBACK"))
    release.start()
    with Archive.open(v1, "w") as archive:
        assert archive.version == 3
    release.join()
    holder.close()


def test_programs_that_hold_version_1_open_go_on(v1):
    old_writer = sqlite3.connect(v1)
    with Archive.open(v1) as reader:
        rows = reader.rows(GROUP)
        next(rows)
        Archive.open(v1, "w").close()
        assert sum(1 for _ in rows) == 99 and len(list(reader.rows(GROUP))) == 100
        assert insert_v1(old_writer, new_image(7)) == 0 and insert_v1(old_writer, new_image(300)) == 1
        old_writer.commit()
        assert reader.count() == 101
    old_writer.close()
    with Archive.open(v1) as archive:
        assert [str(problem) for problem in verify(archive)] == []
