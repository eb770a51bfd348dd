"""Decodes that are killed or interrupted at any moment: nothing half done passes for done, and the next run goes on."""

import os
import random
import shutil
import signal

import pytest
from decode_kit import all_files
from faults_kit import MODES, PAGE, bytes_under, files_left, undisturbed, without_progress
from helpers import first_of

pytestmark = pytest.mark.e2e


def check_kills(command, out, whole, flags, kill_count, seed):
    """Kill decodes into one folder, each at a random moment of what is left to do, `kill_count` times in all.

    Whenever little is left, a run may end, its folder must be whole, and a new one is begun.
    """
    moments = random.Random(seed)
    picture_bytes = sum(len(data) for path, data in whole.items() if path not in PAGE)
    while kill_count:
        if bytes_under(out) > 0.9 * picture_bytes:
            check_whole(command, out, whole, flags, seed)
            shutil.rmtree(out)
        byte_count = moments.randrange(bytes_under(out), picture_bytes)
        killed = command.signalled(out, byte_count, signal.SIGKILL, *flags)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        kill_count -= killed.returncode == -signal.SIGKILL
        assert finished_files(out).items() <= whole.items(), f"half done at {byte_count:,} bytes, seed {seed}"
    check_whole(command, out, whole, flags, seed)


def check_whole(command, out, whole, flags, seed):
    """A run that nothing happens to brings what earlier ones left to the tree of an undisturbed run."""
    assert command.run(out, *flags) == 0
    assert all_files(out) == whole, f"seed {seed}"


def finished_files(folder):
    """All files but notes, and those under temporary names, which a killed run may leave."""
    if not folder.exists():
        return {}
    return {path: data for path, data in files_left(folder).items() if not os.path.basename(path).startswith(".dmg-")}


@pytest.mark.slow
def test_five_killed_runs_go_on_to_the_same_tree(command, whole, tmp_path):
    check_kills(command, tmp_path / "cut", whole, (), kill_count=5, seed=random.randrange(10**6))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
def test_fifty_killed_runs_go_on_to_the_same_tree(command, tmp_path, mode):
    flags = MODES[mode]
    whole = undisturbed(command, tmp_path / "whole", flags)
    check_kills(command, tmp_path / "cut", whole, flags, kill_count=50, seed=random.randrange(10**6))


@pytest.mark.parametrize("mode", first_of(MODES))
def test_an_interrupted_run_says_so_and_goes_on(command, tmp_path, mode):
    flags, out = MODES[mode], tmp_path / "cut"
    expected = undisturbed(command, tmp_path / "whole", flags)
    byte_count = sum(map(len, expected.values())) // 4
    stopped = command.signalled(out, byte_count, signal.SIGINT, *flags)
    assert stopped.returncode == 130, stopped.stderr
    assert without_progress(stopped.stderr) == "interrupted; repeat the command to go on\n"
    left = files_left(out)
    assert left or mode == "zip"
    assert left.items() < expected.items()
    assert command.run(out, *flags) == 0
    assert all_files(out) == expected


def test_a_finished_folder_is_left_as_it_is(command, tmp_path):
    out = tmp_path / "out"
    assert command.run(out) == 0
    before = {path: os.stat(path).st_mtime_ns for path in out.rglob("*.png")}
    assert len(before) == 1500
    assert command.run(out) == 0
    assert {path: os.stat(path).st_mtime_ns for path in out.rglob("*.png")} == before
