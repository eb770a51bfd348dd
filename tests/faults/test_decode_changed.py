"""Decodes again of an archive that has changed since: no name shows an image that it does not belong to any more."""

import hashlib
import shutil
import subprocess
import time

import faults_kit
import pytest
from decode_kit import all_files, change, random_tokens, write_archive_2022
from faults_kit import bytes_under
from helpers import ROOT, first_of
from tiny import CODEBOOK_SIZE, GRID

from dm_generations.archive import merge
from dm_generations.export import exporter as exporter_module
from dm_generations.export import writers as writers_module
from dm_generations.export.journal import JOURNAL, Journal

pytestmark = pytest.mark.e2e

MODES = {
    "images": (),
    "gallery": ("--mode", "gallery", "--gallery-cols", "2", "--gallery-rows", "2"),
    "npy": ("--mode", "npy"),
}
ADD_BEST = """
INSERT INTO images (prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, key0, key1, quantvec, quantvec_md5,
    clip_score_input)
SELECT prompt_id, sc_prompt_id, top_k, top_p, temperature, cond_scale, 0, 99, ?, ?, 99.0 FROM images WHERE id = 1
"""


def add_best(archive):
    """One more image, better than all others of its group."""
    tokens = random_tokens(7, GRID**2, CODEBOOK_SIZE)[-1].astype("<u2").tobytes()
    change(archive, ADD_BEST, tokens, hashlib.md5(tokens).hexdigest())


def add_twin(archive):
    """One more image, better than all others, with the key of the first: it goes on from initial tokens, say."""
    add_best(archive)
    change(archive, "UPDATE images SET (key0, key1) = (SELECT key0, key1 FROM images WHERE id = 1) WHERE key1 = 99")


def rescore(archive):
    """The last image is the best, the first one the worst."""
    change(archive, "UPDATE images SET clip_score_input = -clip_score_input")


@pytest.mark.parametrize("mode", first_of(MODES))
@pytest.mark.parametrize("change_archive", [add_best, add_twin, rescore])
def test_files_show_the_images_of_their_rank(decode, archive, tmp_path, mode, change_archive):
    assert decode(*MODES[mode]) == (0, "")
    change_archive(archive)
    assert decode(*MODES[mode]) == (0, "")
    assert decode(*MODES[mode], out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


OTHER_DECODES = {"prompt": ("--prompt-ids", "2"), "best": ("--n-best", "1"), "format": ("--format", "webp")}


@pytest.mark.parametrize("other", [*OTHER_DECODES.values(), MODES["gallery"]], ids=[*OTHER_DECODES, "gallery"])
def test_a_decode_of_others_into_the_folder_forgets_nothing(decode, tmp_path, other):
    tokens = random_tokens(6, GRID**2, CODEBOOK_SIZE)
    archive = write_archive_2022(tmp_path / "two.db", tokens, ("a boat", "a ship"))
    for flags in ((), other):
        assert decode(*flags, db=archive)[0] == 0
    add_best(archive)
    assert decode(db=archive)[0] == 0 and decode(db=archive, out=tmp_path / "fresh") == (0, "")
    fresh, found = all_files(tmp_path / "fresh"), all_files(tmp_path / "out")
    assert {path for path in fresh if found[path] != fresh[path]} <= {JOURNAL}  # which lists the others too


@pytest.fixture
def stopped(decode, monkeypatch):
    """Runs `decode` until it has written one file and none of the lists."""

    def run(*flags, **options):
        write, written = writers_module.write_atomic, []

        def write_one(path, data):
            if written:
                raise KeyboardInterrupt
            write(path, data)
            written.append(path)

        with monkeypatch.context() as patched:
            patched.setattr(writers_module, "write_atomic", write_one)
            assert decode(*flags, "--num-workers", "1", **options)[0] == 130

    return run


@pytest.mark.parametrize("mode", first_of(MODES))
def test_a_first_run_was_stopped_before_the_archive_changed(decode, stopped, archive, tmp_path, mode):
    stopped(*MODES[mode])
    assert any("/" in path for path in all_files(tmp_path / "out"))
    add_best(archive)
    assert decode(*MODES[mode]) == (0, "") and decode(*MODES[mode], out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


@pytest.mark.parametrize("mode", first_of(MODES))
def test_a_run_of_another_archive_was_stopped(decode, stopped, archive, tmp_path, mode):
    """What it was to replace may show either image."""
    assert decode(*MODES[mode]) == (0, "")
    expected = all_files(tmp_path / "out")
    rescored = shutil.copy(archive, tmp_path / "rescored.db")
    rescore(rescored)
    stopped(*MODES[mode], db=rescored)
    assert any(all_files(tmp_path / "out").get(path) != data for path, data in expected.items())
    assert decode(*MODES[mode]) == (0, "")
    assert all_files(tmp_path / "out") == expected


def test_a_run_was_stopped_between_the_page_and_the_journal(decode, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    archive = write_archive_2022(tmp_path / "two.db", random_tokens(6, GRID**2, CODEBOOK_SIZE), ("a boat", "a ship"))
    assert decode("--prompt-ids", "1", db=archive) == (0, "")
    for prompt_id in ("2", "1"):
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "compact", stop)
            assert decode("--prompt-ids", prompt_id, db=archive)[0] == 130
    add_best(archive)
    change(archive, "UPDATE images SET clip_score_input = -clip_score_input WHERE prompt_id = 2")
    assert decode(db=archive) == (0, "") and decode(db=archive, out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


@pytest.fixture
def growing(decode, archive, tmp_path, monkeypatch):
    """Runs `decode` on an archive of ours that gets a better image once the run knows what is due."""
    native = tmp_path / "native.db"
    merge([archive], native)
    run_job = exporter_module.Exporter.run

    def grow_and_run(job, *arguments):
        add_best(native)
        run_job(job, *arguments)

    def run(*flags):
        with monkeypatch.context() as patched:
            patched.setattr(exporter_module.Exporter, "run", grow_and_run)
            return decode(*flags, db=native)

    run.archive = native
    return run


@pytest.mark.parametrize("mode", first_of(MODES))
def test_an_archive_shrinks_while_a_run_goes_on(decode, archive, tmp_path, monkeypatch, mode):
    native = tmp_path / "native.db"
    merge([archive], native)
    assert decode(*MODES[mode], db=native) == (0, "")
    run_job = exporter_module.Exporter.run

    def shrink_and_run(job, *arguments):
        change(native, "DELETE FROM images WHERE id > 4")
        run_job(job, *arguments)

    monkeypatch.setattr(exporter_module.Exporter, "run", shrink_and_run)
    status, errors = decode(*MODES[mode], db=native)
    assert status == 1
    problems = [line for line in errors.splitlines() if not line.startswith("warning")]
    assert problems and all("native.db changed while it was read" in line for line in problems)


@pytest.mark.parametrize("mode", first_of(MODES))
def test_an_archive_grows_while_a_run_goes_on(decode, growing, tmp_path, mode):
    assert decode(*MODES[mode], db=growing.archive) == (0, "")
    sorted((tmp_path / "out").rglob("0001_k*"))[-1].unlink()
    growing(*MODES[mode])
    assert decode(*MODES[mode], db=growing.archive) == (0, "")
    assert decode(*MODES[mode], db=growing.archive, out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


def test_an_archive_grows_while_a_run_that_finds_all_done_reads_it(decode, growing, tmp_path):
    assert decode(db=growing.archive) == (0, "")
    status, errors = growing()
    assert status == 1 and errors.count("native.db changed while it was read") == 6
    assert decode(db=growing.archive) == (0, "") and decode(db=growing.archive, out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


def test_galleries_without_scores_are_told_apart(decode, archive, tmp_path):
    other = write_archive_2022(tmp_path / "other.db", random_tokens(12, GRID**2, CODEBOOK_SIZE)[6:])
    for db in (archive, other):
        change(db, "UPDATE images SET clip_score_input = NULL")
    change(other, "UPDATE images SET key1 = key1 + 6")
    for db in (archive, other):
        assert decode(*MODES["gallery"], db=db) == (0, "")
    assert decode(*MODES["gallery"], db=other, out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


@pytest.mark.parametrize("mode", ["tar", "zip"])
def test_shards_hold_the_scores_that_their_rows_have(decode, archive, tmp_path, mode):
    assert decode("--mode", mode) == (0, "")
    change(archive, "UPDATE images SET clip_score_input = clip_score_input + 1, clip_score_tokenized = 9")
    assert decode("--mode", mode) == (0, "") and decode("--mode", mode, out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "fresh").items() <= all_files(tmp_path / "out").items()


@pytest.mark.parametrize("rest", [b"", b"\xff\n[]\n{}\n[1,2]\n", b'\n["0001_a boat/0001_k=50,p=1.0,t'])
def test_journals_that_were_cut_off_or_are_someone_elses(decode, stopped, archive, tmp_path, rest):
    stopped()
    with open(tmp_path / "out" / JOURNAL, "ab") as journal:
        journal.write(rest)
    stopped()
    add_best(archive)
    assert decode() == (0, "") and decode(out=tmp_path / "fresh") == (0, "")
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")


@pytest.mark.parametrize("mode", first_of(MODES))
def test_images_that_take_more_than_their_key_to_draw_again_are_decoded_once(decode, archive, tmp_path, mode):
    native = tmp_path / "native.db"
    merge([archive], native)
    change(native, "UPDATE images SET dtype = 'bfloat16' WHERE id <= 3")
    assert decode(*MODES[mode], db=native) == (0, "")
    times = times_of_images(tmp_path / "out")
    assert times and decode(*MODES[mode], db=native) == (0, "")
    assert times_of_images(tmp_path / "out") == times


@pytest.mark.parametrize("mode", ["images", "gallery"])
def test_wrong_images_of_a_version_without_a_journal_are_mended(decode, archive, tmp_path, mode):
    """Two decodes at the same time left images of one archive under the names and lists of another."""
    rescored = shutil.copy(archive, tmp_path / "rescored.db")
    rescore(rescored)
    assert decode(*MODES[mode], db=rescored, out=tmp_path / "other") == (0, "")
    assert decode(*MODES[mode]) == (0, "")
    expected = all_files(tmp_path / "out")
    (tmp_path / "out" / JOURNAL).unlink()
    for path in expected:
        if "/" in path:
            shutil.copy(tmp_path / "other" / path, tmp_path / "out" / path)
    assert decode(*MODES[mode]) == (0, "")
    mended = all_files(tmp_path / "out")
    assert {path for path in expected if mended[path] != expected[path]} == {JOURNAL}
    times = times_of_images(tmp_path / "out")
    assert decode(*MODES[mode]) == (0, "") and times_of_images(tmp_path / "out") == times


def times_of_images(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("0001*/*")}


@pytest.mark.parametrize("content", [b"", b"window.DM_MANIFEST = {};", b"window.DM_MANIFEST = {", b"\xff", b"[]"])
def test_a_manifest_of_someone_else_is_no_news(decode, tmp_path, content):
    assert decode() == (0, "")
    expected = all_files(tmp_path / "out")
    (tmp_path / "out" / "manifest.js").write_bytes(content)
    assert decode() == (0, "")
    assert all_files(tmp_path / "out") == expected


@pytest.mark.parametrize("mode", first_of(faults_kit.MODES))
def test_two_decodes_of_a_folder_at_a_time_and_then_a_third(command, many, tmp_path, mode):
    """The archive changes between the first two, which are processes of their own."""
    flags, out = faults_kit.MODES[mode], tmp_path / "out"
    with subprocess.Popen(command.line(out, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        while first.poll() is None and bytes_under(out) < 20_000:
            time.sleep(0.001)
        rescore(many)
        second = subprocess.run(command.line(out, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        _, errors = first.communicate(timeout=200)
    assert "Traceback" not in errors + second.stderr
    assert {first.returncode, second.returncode} <= {0, 1}
    assert command.run(out, *flags) == 0 and command.run(tmp_path / "fresh", *flags) == 0
    fresh, found = all_files(tmp_path / "fresh"), all_files(out)
    assert fresh.items() <= found.items()
    # Shards of what the archive was before are another set, and stay.
    assert all(path.endswith((".tar", ".zip")) for path in found.keys() - fresh.keys())
