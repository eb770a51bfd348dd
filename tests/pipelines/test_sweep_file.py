"""Sweeps from a TOML file: what they generate, that flags take precedence, and what is refused."""

import pytest

from dm_generations import cli
from dm_generations.errors import UserError
from dm_generations.pipelines.sweep import SWEEP_KEYS, read_sweep_file

SWEEP = """
prompts = ["a cat", "a dog"]
top_k = [5, 0]
top_p = 0.9
temperature = [0.7, 1, 2.0]
cond_scale = 3
n = 4
seed = 18446744073709551615
"""


@pytest.fixture
def sweep_file(tmp_path):
    def write(text):
        path = tmp_path / "sweep.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def planned(tmp_path, capsys, *words) -> str:
    words = ["generate", "--db", tmp_path / "x.db", "--no-score", "--dry-run", *words]
    assert cli.main([str(word) for word in words]) == 0
    assert not (tmp_path / "x.db").exists()
    return capsys.readouterr().out.splitlines()[0]


def test_a_file_describes_a_sweep_and_flags_take_precedence(tmp_path, capsys, sweep_file):
    path = sweep_file(SWEEP)
    assert planned(tmp_path, capsys, "--sweep", path).startswith("12 combinations x 4 = 48 images")
    found = planned(tmp_path, capsys, "--sweep", path, "--temperature", 1, "--n", 3, "--prompts", "a bee")
    assert found.startswith("2 combinations x 3 = 6 images")


def test_single_values_and_lists_are_read_alike(sweep_file):
    values = read_sweep_file(sweep_file(SWEEP))
    assert values["top_p"] == [0.9] and values["temperature"] == [0.7, 1, 2.0] and values["n"] == 4


def test_every_key_is_a_flag():
    flags = vars(cli.build_parser().parse_args(["generate", "--db", "x.db"]))
    assert SWEEP_KEYS.keys() <= flags.keys() and all(flags[key] is None for key in SWEEP_KEYS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt = 'a cat'", "unknown key 'prompt'"),
        ("n = [1, 2]", "n takes one value"),
        ("top_k = [1.5]", "top_k must be a whole number, not 1.5"),
        ("top_p = true", "top_p must be a whole number or a number, not True"),
        ("prompts = [1]", "prompts must be text, not 1"),
        ("prompts = [", "not a TOML file"),
        (b"prompts = ['\xff']", "not a TOML file"),
        ("[prompts]\na = 1", "prompts must be text"),
    ],
)
def test_what_is_wrong_is_named(sweep_file, text, expected):
    with pytest.raises(UserError, match="--sweep") as caught:
        read_sweep_file(sweep_file(text))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature = 1" + 400 * "0", "temperature must be from 0 to 3e+38, not inf"),
        ("cond_scale = -1" + 400 * "0", "cond_scale must be from 0 to 3e+38, not -inf"),
        ("n = 0x1" + 5000 * "0", "n must be from 1 to 10,000,000, not a number of more than 40 digits"),
        ("seed = 0x1" + 5000 * "0", "not a number of more than 40 digits"),
        ("top_k = [5, 0x1" + 5000 * "0" + "]", "top_k must be from 0 to 2,147,483,647, not a number of more"),
        ("keys = []", "keys needs at least one value"),
        ("keys = ['0x1:2']", "'0x1:2' is not two whole numbers"),
    ],
)
def test_values_that_cannot_be_sampled_are_one_line_too(tmp_path, capsys, sweep_file, text, expected):
    path = sweep_file("prompts = 'a cat'\n" + text)
    assert cli.main(["generate", "--db", str(tmp_path / "x.db"), "--sweep", str(path), "--dry-run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and len(told) < 200 and expected in told


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_sweep_file(tmp_path / "none.toml")
