"""What a folder says of its files: the journal, the lists of earlier versions, and files of strangers."""

import json
import os
import stat
import subprocess
import sys

import pytest
from helpers import ROOT

from dm_generations.errors import UserError
from dm_generations.export import journal as journal_module
from dm_generations.export.journal import JOURNAL, Journal
from dm_generations.export.manifest import GalleryEntry, ImageEntry

ENTRY = ImageEntry("0001_a/0001_b.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, 0, 21.5, 7, 9, "mine", 1)
GALLERY = GalleryEntry("0001_a/0001_g.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, (21.5, None), 0, "0123abcd")


def write_image(folder, path):
    file = folder / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.stat("/dev/zero").st_rdev)
    except PermissionError:
        pytest.skip("may not make a device here")


def known(folder, path, identity) -> bool:
    """Whether the folder says that the file shows just these images."""
    with Journal(folder) as journal:
        journal.open()
        return not journal.is_empty and not journal.is_stale(path, identity) and journal.is_stale(path, "other")


def test_the_last_line_of_a_file_counts(tmp_path):
    with Journal(tmp_path) as journal:
        journal.open(create=True)
        assert journal.is_empty
        journal.begin("a/1.png", "one", is_there=False)
        journal.begin("a/1.png", "two", is_there=False)
    assert known(tmp_path, "a/1.png", "two")


def test_a_file_that_is_being_replaced_shows_either_image_until_it_is_written(tmp_path):
    write_image(tmp_path, "a/1.png")
    for replaced in (False, True):
        with Journal(tmp_path) as journal:
            journal.open(create=True)
            journal.begin("a/1.png", "new", is_there=True)
            assert journal.is_stale("a/1.png", "old") and journal.is_stale("a/1.png", "new")
            if replaced:
                journal.confirm("a/1.png")
        assert known(tmp_path, "a/1.png", "new") == replaced


def test_compacting_keeps_the_files_that_are_there(tmp_path):
    write_image(tmp_path, "a/1.png")
    write_image(tmp_path, "a/2.png")
    for _ in range(2):
        with Journal(tmp_path) as journal:
            journal.open(create=True)
            journal.begin("a/3.png", "three", is_there=False)
            journal.assume("a/2.png", "two")
            journal.begin("a/1.png", "one", is_there=True)
            journal.confirm("a/1.png")
            journal.compact()
        lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().split("\n") if line]
        assert lines == [["a/1.png", "one"], ["a/2.png", "two"]]
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a" / "2.png").unlink()
    with Journal(tmp_path) as journal:
        journal.open()
        journal.compact()
    assert not (tmp_path / JOURNAL).exists()


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\n\xff\n[]\n{}\n[1,2]\n[1,null]\n" + b"[" * 100_000,
        b'\n["a/2.png","tw',
        b'\n["a/1.png",' + b"[]," * 100_000 + b"1]",
    ],
)
def test_lines_that_were_cut_off_or_are_someone_elses_cost_only_themselves(tmp_path, rest):
    with Journal(tmp_path) as journal:
        journal.open(create=True)
        journal.begin("a/1.png", "one", is_there=False)
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(rest)
    with Journal(tmp_path) as journal:
        journal.open()
        journal.begin("a/3.png", "three", is_there=False)
    assert known(tmp_path, "a/1.png", "one") and known(tmp_path, "a/3.png", "three")


def test_reading_makes_nothing(tmp_path):
    with Journal(tmp_path) as journal:
        journal.open()
    assert os.listdir(tmp_path) == []


# What version 0.1.0 wrote beside its images.
EARLIER = ("manifest.js", ".others.json", ".under-way.jsonl")


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("content", ["window.DM_MANIFEST = {};", "[" * 200_000, None])
def test_files_of_earlier_versions_may_show_anything(tmp_path, name, content):
    if content is None:
        (tmp_path / name).symlink_to("nowhere")
    else:
        (tmp_path / name).write_text(content)
    for path in ("a/1.png", "a/2.png", "a/3.png"):
        write_image(tmp_path, path)
    for number in (1, 2):  # the first run decodes one of the files; the second is stopped
        with Journal(tmp_path) as journal:
            journal.open()
            assert journal.is_stale(f"a/{number}.png", "one")
            journal.open(create=True)
            journal.begin(f"a/{number}.png", "one", is_there=True)
            journal.confirm(f"a/{number}.png")
            if number == 1:
                journal.compact()
    assert known(tmp_path, "a/1.png", "one") and known(tmp_path, "a/2.png", "one")
    with Journal(tmp_path) as journal:
        journal.open()
        assert journal.is_stale("a/3.png", "one")
    assert not any(os.path.lexists(tmp_path / earlier) for earlier in EARLIER[1:])


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder", "large", "sparse", "many lines"])
def test_a_journal_that_is_not_a_usual_file_is_refused(tmp_path, monkeypatch, kind):
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    if kind == "link":
        mine.write_text("mine")
    if kind.endswith("link"):
        (out / JOURNAL).symlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(out / JOURNAL)
    elif kind == "device":
        make_device(out / JOURNAL)
    elif kind == "sparse":
        with open(out / JOURNAL, "wb") as file:
            file.truncate(20 << 30)
    elif kind == "many lines":
        monkeypatch.setattr(journal_module, "MAX_LINES", 10)
        (out / JOURNAL).write_bytes(b"\n" * 11)
    elif kind == "folder":
        (out / JOURNAL).mkdir()
    else:
        monkeypatch.setattr(journal_module, "MAX_BYTES", 10)
        (out / JOURNAL).write_bytes(b"\n" * 11)
    with Journal(out) as journal:
        for create in (False, True):
            with pytest.raises(UserError, match=JOURNAL) as error:
                journal.open(create)
            assert "\n" not in str(error.value)
    assert (mine.read_text() == "mine") if kind == "link" else not mine.exists()


def test_a_second_decode_of_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "tests/programs/hold_journal.py", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "open\n"
            for create in (False, True):
                with Journal(tmp_path) as journal, pytest.raises(UserError, match=tmp_path.name):
                    journal.open(create)
        finally:
            holder.kill()
    with Journal(tmp_path) as journal:
        journal.open(create=True)


def test_a_journal_that_was_rewritten_by_another_is_opened_anew(tmp_path, monkeypatch):
    """The first decode ends between the opening and the locking of its journal by the second."""
    write_image(tmp_path, "a/1.png")
    first, lock = Journal(tmp_path), journal_module.lock_file
    first.open(create=True)

    def end_first_and_lock(file):
        monkeypatch.setattr(journal_module, "lock_file", lock)
        first.begin("a/1.png", "one", is_there=False)
        first.confirm("a/1.png")
        first.compact()
        lock(file)

    monkeypatch.setattr(journal_module, "lock_file", end_first_and_lock)
    assert known(tmp_path, "a/1.png", "one")
