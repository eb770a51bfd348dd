"""What all commands share."""

import pytest

from dm_generations.cli import main


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["decode", "--n-best", "0"], "argument --n-best: 0 is not at least 1"),
        (["generate", "--db", "x.db", "--prompts", "a", "--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
        (["info", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_flag_is_one_line(words, what, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"error: {what}; see --help\n")
