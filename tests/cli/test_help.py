"""What every command says of itself."""

import re

import pytest

from dm_generations.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_and_ends_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    flags = re.split(r"^  (?=-)", printed, flags=re.MULTILINE)[1:]
    assert flags
    # The explanation stands after two spaces or more, or below.
    assert all(re.search(r"\S(?: {2,}|\n {4,})\S", flag) for flag in flags), flags
    assert f"  python -m dm_generations {name} " in printed.rpartition("\nexample")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_has_an_empty_name(name, capsys):
    """As an unset variable of a shell gives it: it would mean this folder, or the archive that ships."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    flags = re.findall(r"^  (--[\w-]+) \[?(?:FILE|FOLDER)(?!\|TEXT)", capsys.readouterr().out, flags=re.MULTILINE)
    for flag in flags:
        with pytest.raises(SystemExit) as ended:
            main([name, flag, ""])
        assert ended.value.code == 2
        assert f"argument {flag}: " in capsys.readouterr().err
