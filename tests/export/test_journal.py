"""What a folder says of its files: the journal, the lists of earlier versions, and files of strangers."""

import json
import os
import subprocess
import sys

import pytest
from decode_kit import build_manifest_1, write_manifest_1
from helpers import ROOT

from dm_generations.errors import UserError
from dm_generations.export import journal as journal_module
from dm_generations.export.journal import JOURNAL, Journal, identify
from dm_generations.export.manifest import GalleryEntry, ImageEntry

ENTRY = ImageEntry("0001_a/0001_b.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, 0, 21.5, 7, 9, "mine", 1)
GALLERY = GalleryEntry("0001_a/0001_g.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, (21.5, None), 0, "0123abcd")


def write_image(folder, path):
    file = folder / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")


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


@pytest.mark.parametrize("rest", [b"", b"\n\xff\n[]\n{}\n[1,2]\n[1,null]\n" + b"[" * 100_000, b'\n["a/2.png","tw'])
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
OTHERS = {"0002_c/0001_d.png": [20.0, 1, 2]}


@pytest.mark.parametrize("entry", [ENTRY, GALLERY], ids=["images", "gallery"])
def test_the_lists_of_earlier_versions_are_read_once(tmp_path, entry):
    mode = "images" if entry is ENTRY else "gallery"
    write_manifest_1(tmp_path, build_manifest_1(mode, "a.db", [entry]))
    (tmp_path / ".others.json").write_text(json.dumps(OTHERS))
    (tmp_path / ".under-way.jsonl").write_text('\n["0003_e/0001_f.png",[19.5,3,4]]\n["0002_c/0001_d.png",[]]')
    for path in (entry.file, "0002_c/0001_d.png", "0003_e/0001_f.png"):
        write_image(tmp_path, path)
    other = ImageEntry("0003_e/0001_f.png", 1, "a", 1, None, 50, 1.0, 1.0, 3.0, 0, 19.5, 3, 4, "embedded/x", 1)
    for create in (False, True, False):  # from the lists, and then from a journal
        with Journal(tmp_path) as journal:
            journal.open(create)
            assert not journal.is_stale(entry.file, identify(entry)) and journal.is_stale(entry.file, "other")
            assert not journal.is_stale(other.file, identify(other)) and journal.is_stale(other.file, "other")
            assert journal.is_stale("0002_c/0001_d.png", "anything")
        (tmp_path / "manifest.js").write_text("nothing") if create else None
    with Journal(tmp_path) as journal:
        journal.open(create=True)
        journal.compact()
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {JOURNAL, "manifest.js"}


@pytest.mark.parametrize("start", ["", "window.DM_MANIFEST = "])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"groups": 1}',
        '{"a": 1}',
        "[" * 200_000,
        '{"version": 1, "mode": "images", "groups": [[1, 2, [[3, 0, 4, 5]]]]}',
        '{"version": 1, "mode": "images", "groups": [["a", ["b"], [["c", 0, 4, 5]]]]}',
    ],
)
def test_lists_of_someone_else_are_left_alone(tmp_path, start, text):
    for name in ("manifest.js", ".others.json", ".under-way.jsonl"):
        (tmp_path / name).write_text(start + text)
    with Journal(tmp_path) as journal:
        journal.open(create=True)
        journal.compact()
        assert journal.is_empty


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "large"])
def test_a_journal_that_is_not_a_usual_file_is_refused(tmp_path, monkeypatch, kind):
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    if kind == "link":
        mine.write_text("mine")
    if kind.endswith("link"):
        (out / JOURNAL).symlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(out / JOURNAL)
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


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_lists_of_earlier_versions_are_not_read_through_links(tmp_path):
    out = tmp_path / "out"
    write_image(tmp_path, "out/x.png")
    (tmp_path / "others.json").write_text(json.dumps({"x.png": [1.0, 2, 3]}))
    (out / ".others.json").symlink_to(tmp_path / "others.json")
    with Journal(out) as journal:
        journal.open()
        assert journal.is_empty


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
