"""Decodes of archives that are locked, cut short or damaged, at the start or on the way, or that hold odd names."""

import contextlib
import functools
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import unicodedata
import zipfile

import numpy as np
import pytest
from archive_kit import execute
from decode_kit import all_files, change, random_tokens, read_images, write_archive_2022
from faults_kit import MODES, PAGE, error_line, files_left, undisturbed, without_progress
from helpers import ROOT, first_of
from tiny import CODEBOOK_SIZE, GRID, IMAGE_SIZE

from dm_generations.archive import Archive, merge
from dm_generations.inference.decoder import Decoder

pytestmark = pytest.mark.e2e

PICTURE_MODES = {mode: flags for mode, flags in MODES.items() if mode != "npy"}  # which need a codec


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits long for a lock."""
    monkeypatch.setattr(Archive, "open", functools.partial(Archive.open, timeout=0.1))


@pytest.fixture
def on_the_way(monkeypatch):
    """A function that lets something happen once, when the third batch starts."""
    start, batch_count = Decoder.start, 0

    def happen(action):
        def start_after_action(codec, tokens, keys=None):
            nonlocal batch_count
            batch_count += 1
            if batch_count == 3:
                action()
            return start(codec, tokens, keys)

        monkeypatch.setattr(Decoder, "start", start_after_action)

    return happen


@contextlib.contextmanager
def locked(path, kind):
    """Another process's lock: EXCLUSIVE while it commits, IMMEDIATE while it gathers what it is to write."""
    command = [sys.executable, str(ROOT / "tests/programs/hold_lock.py"), str(path), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            yield
        finally:
            holder.stdin.close()
            holder.wait(60)


def test_a_locked_archive(decode, archive, tmp_path, impatient):
    with locked(archive, "EXCLUSIVE"):
        status, errors = decode()
    assert status == 1 and "another program is using the archive; try again" in error_line(errors)
    assert not (tmp_path / "out").exists()


def test_a_lock_that_is_given_back_is_waited_for(decode, archive, tmp_path):
    with contextlib.closing(sqlite3.connect(archive, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.3, connection.execute, ["ROLLBACK"])
        timer.start()
        status, errors = decode()
        timer.join()
    assert (status, errors) == (0, "") and len(read_images(tmp_path / "out")) == 6


def test_a_writer_that_has_not_committed_disturbs_nobody(decode, archive, tmp_path, impatient):
    with locked(archive, "IMMEDIATE"):
        assert decode() == (0, "")
    assert len(read_images(tmp_path / "out")) == 6


@pytest.mark.parametrize("mode", first_of(PICTURE_MODES))
def test_an_archive_that_is_locked_on_the_way(command, many, tmp_path, impatient, on_the_way, capfd, mode):
    flags, out = PICTURE_MODES[mode], tmp_path / "out"
    whole = undisturbed(command, tmp_path / "whole", flags)
    with contextlib.ExitStack() as stack:
        on_the_way(lambda: stack.enter_context(locked(many, "EXCLUSIVE")))
        assert command.run(out, *flags) == 1
        assert "another program is using the archive; try again" in error_line(capfd.readouterr().err)
        left = {path: data for path, data in files_left(out).items() if path not in PAGE}  # which lists them
        assert left.items() < whole.items() and bool(left) == (mode != "zip")
    assert command.run(out, *flags) == 0 and all_files(out) == whole


@pytest.mark.parametrize("mode", first_of(PICTURE_MODES))
def test_an_archive_that_is_cut_short_on_the_way(command, many, tmp_path, on_the_way, capfd, mode):
    flags, out = PICTURE_MODES[mode], tmp_path / "out"
    whole = undisturbed(command, tmp_path / "whole", flags)
    content = many.read_bytes()
    on_the_way(lambda: many.write_bytes(content[: len(content) // 2]))
    assert command.run(out, *flags) == 1
    lines = without_progress(capfd.readouterr().err).splitlines()
    assert 0 < len(lines) < 1400
    assert all(re.match(r"error: image \d+ was not decoded: ", line) for line in lines)
    if mode == "images":
        assert len(read_images(out)) + len(lines) == 1500
    left = {path: data for path, data in all_files(out).items() if path not in PAGE}
    assert {path: data for path, data in left.items() if "incomplete" not in path}.items() < whole.items()
    if mode in ("tar", "zip"):
        assert any("incomplete" in path for path in left)
    many.write_bytes(content)
    assert command.run(out, *flags) == 0 and all_files(out) == whole


def test_an_archive_that_is_replaced_on_the_way_is_read_to_its_end(command, many, whole, tmp_path, on_the_way):
    other = write_archive_2022(tmp_path / "other.db", random_tokens(1, GRID**2, CODEBOOK_SIZE))
    on_the_way(lambda: shutil.move(other, many))
    assert command.run(tmp_path / "out") == 0
    assert all_files(tmp_path / "out") == whole


def test_an_archive_that_is_cut_short(decode, many, tmp_path):
    content = many.read_bytes()
    cut = tmp_path / "cut.db"
    for size in (1, 99, 100, 4096, len(content) // 2, len(content) - 4096, len(content) - 1):
        cut.write_bytes(content[:size])
        status, errors = decode(db=cut)
        assert status == 1 and str(cut) in error_line(errors), size
        assert not (tmp_path / "out").exists(), size
    assert cut.read_bytes() == content[:-1]


def damaged_pages(db, damaged):
    """Writes `damaged`, a copy of `db` with one page overwritten, for each page in turn; gives the page's number."""
    content = db.read_bytes()
    page_bytes = int.from_bytes(content[16:18], "big")
    for start in range(0, len(content), page_bytes):
        first = start or 100  # without its header the file is no database
        end = start + page_bytes
        damaged.write_bytes(content[:first] + b"\xff" * (end - first) + content[end:])
        yield start // page_bytes + 1


@pytest.mark.parametrize("layout", ["2022", "ours"])
def test_a_damaged_page_gives_no_wrong_image(decode, tmp_path, layout):
    damaged = tmp_path / "damaged.db"
    tokens = random_tokens(60, GRID**2, CODEBOOK_SIZE)
    db = write_archive_2022(tmp_path / "2022.db", tokens, ("a boat", "a ship"))
    if layout == "ours":
        merge([db], tmp_path / "ours.db")
        db = tmp_path / "ours.db"
    assert decode("--mode", "npy", db=db, out=tmp_path / "whole") == (0, "")
    whole = all_files(tmp_path / "whole")
    partial_count = 0
    for page in damaged_pages(db, damaged):
        status, errors = decode("--mode", "npy", db=damaged)
        lines = errors.splitlines()
        made = all_files(tmp_path / "out") if (tmp_path / "out").exists() else {}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if status == 0:
            assert (errors, made) == ("", whole), page
        elif not errors.startswith("error: image "):
            assert not made and "damaged" in error_line(errors), page
        else:
            assert made.items() < whole.items() and len(made) + len(lines) == len(whole), page
            assert all(re.match(r"error: image \d+ was not decoded: ", line) for line in lines), page
            partial_count += bool(made)
    assert bool(partial_count) == (layout == "ours")  # which has an index that knows the order of the rows


def test_a_flipped_bit_of_the_tokens_is_found_by_its_md5(decode, archive, tmp_path):
    content = archive.read_bytes()
    blob = execute(archive, "SELECT quantvec FROM images WHERE id = 4")[0][0]
    position = content.index(blob)
    archive.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    status, errors = decode()
    assert status == 1 and "image 4 was not decoded: its tokens do not match their MD5" in error_line(errors)
    assert len(read_images(tmp_path / "out")) == 5


@pytest.mark.parametrize("mode", MODES)
def test_bad_rows_of_every_kind_are_named_and_the_rest_written(decode, archive, tmp_path, mode):
    change(archive, "UPDATE images SET quantvec = x'0102' WHERE id = 1")  # 1 token
    change(archive, "UPDATE images SET quantvec_md5 = 'none' WHERE id = 3")
    change(archive, "UPDATE images SET quantvec = NULL WHERE id = 4")
    change(archive, "UPDATE images SET quantvec = zeroblob(31), quantvec_md5 = NULL WHERE id = 6")
    bad = [1, 3, 4, 6]
    if mode != "npy":  # which holds any token
        outside = CODEBOOK_SIZE.to_bytes(2, "little") * GRID**2
        change(archive, "UPDATE images SET quantvec = ?, quantvec_md5 = NULL WHERE id = 5", outside)
        bad = [1, 3, 4, 5, 6]
    status, errors = decode(*MODES[mode])
    assert status == 1
    assert [int(re.match(r"error: image (\d+) was not decoded: ", line)[1]) for line in errors.splitlines()] == bad
    good_ranks = sorted(set(range(6)) - {number - 1 for number in bad})
    assert ranks_in(tmp_path / "out", mode) == good_ranks


def ranks_in(folder, mode):
    """Ranks of the images of one group that were written; of a gallery, the cells that are not black."""
    files = [path for path in folder.rglob("*.*") if path.name not in PAGE]
    if mode == "tar":
        (file,) = files
        with tarfile.open(file) as tar:
            names = tar.getnames()
        return sorted(int(name.split(".")[0]) - 1 for name in names if name.endswith(".png"))  # ids count from 1
    if mode == "gallery":
        (sheet,) = read_images(folder).values()
        cells = sheet.reshape(2, IMAGE_SIZE, 3, IMAGE_SIZE, 3).swapaxes(1, 2).reshape(6, -1)
        return [rank for rank, cell in enumerate(cells) if cell.any()]
    names = [path.name for path in files]
    if mode == "zip":
        (file,) = files
        with zipfile.ZipFile(file) as found:
            names = [name for name in found.namelist() if name not in PAGE]
    return sorted(int(name.split("_")[-2]) for name in names)


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_a_shard_that_lacks_an_image_does_not_pass_for_finished(decode, archive, tmp_path, mode):
    out, shards = tmp_path / "out", ("--mode", mode)
    ((blob,),) = execute(archive, "SELECT quantvec FROM images WHERE id = 2")
    change(archive, "UPDATE images SET quantvec = x'00' WHERE id = 2")
    for _ in range(2):
        status, errors = decode(*shards)
        assert status == 1 and "image 2 was not decoded" in error_line(errors)
        assert [path.stem.endswith("-incomplete") for path in out.iterdir()] == [True]
    change(archive, "UPDATE images SET quantvec = ? WHERE id = 2", blob)
    assert decode(*shards) == (0, "")
    assert decode(*shards, out=tmp_path / "fresh") == (0, "")
    assert all_files(out) == all_files(tmp_path / "fresh") and len(all_files(out)) == 1


@pytest.mark.parametrize("mode", first_of(PICTURE_MODES))
def test_keys_of_any_type_are_told_in_json(decode, archive, tmp_path, mode):
    """In the layout of 2022 nothing says what a column holds."""
    change(archive, "UPDATE images SET key0 = x'ff00' WHERE id = 1")
    change(archive, "UPDATE images SET key0 = 9e999, key1 = NULL WHERE id = 2")
    change(archive, "UPDATE images SET key0 = 'four' WHERE id = 3")
    assert decode(*MODES[mode], "--metadata") == (0, "")
    before = all_files(tmp_path / "out")
    assert b"Infinity" not in before.get("manifest.js", b"")
    assert decode(*MODES[mode]) == (0, "") and all_files(tmp_path / "out") == before


# Alike once a file name cannot hold what tells them apart, or where a file system takes them for the same.
ALIKE = ("a/b", "a:b", "ab", "AB", "ab.", "ab ", "a\0b", "", "caf\u00e9", "cafe\u0301", "x" * 300, "x" * 301, None)


def test_no_two_images_share_a_name(decode, codec, tmp_path):
    settings = [(50, 1.0, 1.0, 10.0), (50, 1.0, np.nextafter(1.0, 2), 10.0), (50, 1.0, 1.0, 10), (5, 0.1, 1.0, 1e22)]
    tokens = random_tokens(len(ALIKE) * len(ALIKE) * len(settings), GRID**2, CODEBOOK_SIZE).astype("<u2")
    db = write_archive_2022(tmp_path / "alike.db", tokens[:0])
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DELETE FROM prompts")
        for table in ("prompts", "sc_prompts"):
            connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", enumerate(ALIKE, 1))
        vectors = iter(tokens)
        for prompt_id in range(1, len(ALIKE) + 1):
            for sc_prompt_id in range(1, len(ALIKE) + 1):
                for values in settings:
                    row = (prompt_id, sc_prompt_id, *map(float, values), next(vectors).tobytes())
                    connection.execute(
                        "INSERT INTO images (prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, quantvec)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?)",
                        row,
                    )
        connection.commit()
    assert decode("--mode", "npy", db=db) == (0, "")
    written = {
        path.relative_to(tmp_path / "out").as_posix(): np.load(path) for path in (tmp_path / "out").rglob("*.npy")
    }
    assert len(written) == len(tokens)
    assert len({unicodedata.normalize("NFKD", path).casefold() for path in written}) == len(tokens)
    assert {vector.astype("<u2").tobytes() for vector in written.values()} == {vector.tobytes() for vector in tokens}
    assert decode("--mode", "zip", db=db, out=tmp_path / "zip") == (0, "")
    (path,) = (tmp_path / "zip").iterdir()
    with zipfile.ZipFile(path) as found:
        names = [name.removesuffix(".png") for name in found.namelist() if name not in PAGE]
    assert sorted(names) == sorted(path.removesuffix(".npy") for path in written)
