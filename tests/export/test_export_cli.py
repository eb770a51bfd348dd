"""The flags of the decode command."""

import subprocess
import sys
from pathlib import Path

import pytest

from dm_generations.cli import build_parser, main

ROOT = Path(__file__).parents[2]


def parse(*flags):
    return build_parser().parse_args(["decode", *flags])


def test_the_flags_of_2022_have_their_defaults():
    args = vars(parse())
    expected = {
        "db": None,  # the archive that ships
        "batch_size": None,  # 32, with the decoder of a codec
        "cpu_only": False,
        "num_workers": None,
        "mode": "images",
        "out_dir": None,  # the mode's name
        "overwrite": False,
        "gallery_cols": 8,
        "gallery_rows": 4,
        "prompt_ids": [],
        "sc_prompt_ids": [],
        "prompt_texts": [],
        "sc_prompt_texts": [],
        "n_best": None,
    }
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    "flags",
    [
        ["--n-best", "0"],
        ["--batch-size", "-1"],
        ["--num-workers", "0"],
        ["--gallery-cols", "0"],
        ["--mode", "video"],
        ["--prompt-ids"],
        ["--prompt-id", "1"],  # no abbreviations: a later flag could change what they mean
        ["--n-best", "many"],
    ],
)
def test_values_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["decode", *flags])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_script_is_the_command():
    """Run from elsewhere, as people do."""
    command = [sys.executable, str(ROOT / "dm_generations_decode.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    assert "--gallery-cols" in shown and "--codec" in shown
