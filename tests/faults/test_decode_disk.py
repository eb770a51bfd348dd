"""Decodes onto disks that fill up, that may only be read, or that forbid some of it."""

import re

import pytest
from decode_kit import all_files, read_images
from faults_kit import error_line, files_left, run_with_mounts, without_progress, without_root_rights

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="images"),
        pytest.param(("--mode", "gallery", "--gallery-cols", "2"), id="gallery", marks=pytest.mark.slow),
        pytest.param(("--mode", "npy"), id="npy", marks=pytest.mark.slow),
        pytest.param(("--mode", "tar", "--shard-size", "64"), id="tar", marks=pytest.mark.slow),
        pytest.param(("--mode", "zip"), id="zip", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_keeps_whole_files_and_the_next_run_goes_on(command, tmp_path, flags):
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    assert command.run(whole, *flags) == 0
    ended = run_with_mounts("fill_disk.sh", disk, "400k", *command.line(disk, *flags))
    assert re.fullmatch(r"1\n[\d,]+ files? written to .*\n0\n", ended.stdout), ended
    assert re.search("cannot write .*: No space left on device", error_line(ended.stderr))
    expected, kept = all_files(whole), files_left(tmp_path / "disk.full")
    assert kept or len(expected) == 1
    assert kept.items() < expected.items()
    assert all_files(tmp_path / "disk.roomy") == expected


def test_a_disk_with_room_for_all_but_the_page(command, tmp_path):
    disk, whole, flags = tmp_path / "disk", tmp_path / "whole", ("--prompt-ids", "1", "--n-best", "8")
    disk.mkdir()
    assert command.run(whole, *flags) == 0
    ended = run_with_mounts("fill_disk.sh", disk, "48k", *command.line(disk, *flags))
    assert ended.stdout.split("\n")[0] == "1" and ended.stdout.endswith("\n0\n"), ended
    assert str(disk) in error_line(ended.stderr) and "No space left" in ended.stderr
    expected = all_files(whole)
    assert all_files(tmp_path / "disk.full").items() >= {p: b for p, b in expected.items() if "/" in p}.items()
    assert all_files(tmp_path / "disk.roomy") == expected


def test_an_archive_on_a_read_only_disk(command, archive, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    ended = run_with_mounts(
        "use_read_only_disk.sh", disk, archive, *command.line(out, "--db", str(disk / "archive.db"))
    )
    assert ended.stdout.endswith("\n0\narchive.db\n") and without_progress(ended.stderr) == "", ended
    assert len(read_images(out)) == 6


def test_an_output_folder_on_a_read_only_disk(command, archive, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = run_with_mounts("use_read_only_disk.sh", disk, archive, *command.line(disk / "out"))
    assert ended.stdout == "1\narchive.db\n"
    assert re.search("cannot write into .*: Read-only file system", error_line(ended.stderr))


def test_a_folder_that_may_not_be_written_costs_its_own_images_only(command, tmp_path):
    out, whole, flags = tmp_path / "out", tmp_path / "whole", ("--n-best", "2")
    forbidden = out / "0003_a boat of elm"
    forbidden.mkdir(parents=True, mode=0o500)
    ended = without_root_rights(command.line(out, *flags))
    forbidden.chmod(0o700)
    assert ended.returncode == 1
    lines = without_progress(ended.stderr).splitlines()
    assert len(lines) == 2 and all(re.search("error: .*_None.png was not written: Permission denied", x) for x in lines)
    assert len(read_images(out)) == 8 and not any(forbidden.iterdir())
    assert "elm" not in (out / "manifest.js").read_text()
    assert command.run(out, *flags) == 0 and command.run(whole, *flags) == 0
    assert all_files(out) == all_files(whole)


@pytest.mark.parametrize("what", ["archive", "codec", "out"])
def test_what_may_not_be_read_or_written_is_named(command, archive, codec, tmp_path, what):
    out = tmp_path / "out"
    out.mkdir()
    path, mode = {"archive": (archive, 0), "codec": (codec, 0), "out": (out, 0o500)}[what]
    usual = path.stat().st_mode
    path.chmod(mode)
    try:
        ended = without_root_rights(command.line(out, "--db", str(archive)))
    finally:
        path.chmod(usual)
    assert ended.returncode == 1 and ended.stdout == ""
    assert path.name in error_line(ended.stderr) and "denied" in ended.stderr
    assert not any(out.iterdir())
