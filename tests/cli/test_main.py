"""What all commands share."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dm_generations.cli import main


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["decode", "--n-best", "0"], "argument --n-best: 0 is not at least 1"),
        (["generate", "--db", "x.db", "--prompts", "a", "--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
        (["verify", "--batch-size", "0"], "argument --batch-size: 0 is not at least 1"),
        (["generate", "--progressive", "0"], "argument --progressive: 0 is not at least 1"),
        (["info", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_flag_is_one_line(words, what, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"error: {what}; see --help\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which is as a full disk")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "dm_generations", "info"]
        run = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (1, f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n")
