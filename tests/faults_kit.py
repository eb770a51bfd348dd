"""Decodes in processes of their own, to be killed, stopped or starved, and what they left behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from decode_kit import all_files
from helpers import ROOT

from dm_generations.cli import main
from dm_generations.export.journal import JOURNAL

CANNOT_MOUNT = 77
MODES = {
    "images": (),
    "gallery": ("--mode", "gallery", "--gallery-cols", "3", "--gallery-rows", "2"),
    "npy": ("--mode", "npy"),
    "tar": ("--mode", "tar", "--shard-size", "64"),
    "zip": ("--mode", "zip"),
}
PAGE = {"manifest.js", "samplebrowser.html", JOURNAL}


class Command:
    """The decode of one archive, to be run into any folder with any more flags."""

    def __init__(self, db: Path, codec: Path):
        self._arguments = ["decode", "--db", str(db), "--codec", str(codec), "--batch-size", "16", "--num-workers", "2"]

    def line(self, out: Path, *flags: str) -> list[str]:
        """What to start for a process of its own, in the folder ROOT."""
        return [sys.executable, "-m", "dm_generations", *self._arguments, "--cpu-only", "--out-dir", str(out), *flags]

    def run(self, out: Path, *flags: str) -> int:
        """The exit status of a decode in this process, which needs no start."""
        return main([*self._arguments, "--out-dir", str(out), *flags])

    def signalled(
        self, out: Path, byte_count: int, signal_number: int, *flags: str
    ) -> subprocess.CompletedProcess[str]:
        """A process that is sent a signal once `out` holds `byte_count` bytes, unless it ends before."""
        # Tests that a shell runs in the background ignore this signal, and what they start would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with subprocess.Popen(self.line(out, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None and bytes_under(out) < byte_count:
                    time.sleep(0.001)
                process.send_signal(signal_number)
                _, errors = process.communicate(timeout=100)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stderr=errors)


def undisturbed(command: Command, folder: Path, flags: tuple[str, ...]) -> dict[str, bytes]:
    """The files of a run into `folder` that nothing happens to, by path."""
    assert command.run(folder, *flags) == 0
    return all_files(folder)


def bytes_under(folder: Path) -> int:
    """Of all files, unfinished ones too; 0 if there is no such folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in set(names) - {JOURNAL}:
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
                total += os.stat(os.path.join(root, name)).st_size
    return total


def files_left(folder: Path) -> dict[str, bytes]:
    """Files of a decode that did not come to its end, by path: all but its journal."""
    return {path: data for path, data in all_files(folder).items() if path != JOURNAL}


def run_with_mounts(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script of tests/programs, started in ROOT, that may mount disks, which end with it.

    The test is skipped where the script ends with CANNOT_MOUNT.
    """
    if not shutil.which("unshare"):
        pytest.skip("needs unshare to mount a small disk")
    command = ["unshare", "--map-root-user", "--mount", "sh", f"tests/programs/{program}", *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode == CANNOT_MOUNT or "unshare" in ended.stderr:
        pytest.skip("may not mount a small disk here")
    return ended


def without_root_rights(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command, started in ROOT, that must heed permissions of files, whoever runs the tests."""
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read and write everything")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def error_line(errors: str) -> str:
    """The error of a command that printed this one on stderr, and nothing else."""
    lines = without_progress(errors)
    assert lines.startswith("error: ") and lines.count("\n") == 1, errors
    return lines


def without_progress(errors: str) -> str:
    """What a command printed on stderr, without the lines of progress that a slow one prints."""
    return re.sub(r"(?m)^([\d,]+ of [\d,]+ images.*|\w+: [\d,]+ s so far)\n", "", errors)
