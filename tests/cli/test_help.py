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
