"""Sweeps from a TOML file: what they generate, that flags take precedence, and what is refused."""

import pytest

from dm_generations import cli
from dm_generations.errors import UserError
from dm_generations.pipelines.sweep import SWEEP_KEYS, load_sweep, read_sweep_file

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


def test_a_file_describes_a_sweep_and_flags_take_precedence(sweep_file):
    path = sweep_file(SWEEP)
    sweep = load_sweep({}, path)
    assert (sweep.combination_count, sweep.image_count) == (12, 48)
    assert sweep.unset == set()
    changed = load_sweep({"temperature": [1], "n": 3, "prompts": ["a bee"]}, path)
    assert (changed.combination_count, changed.image_count) == (2, 6)
    assert changed.prompts == ("a bee",)


def test_single_values_and_lists_are_read_alike(sweep_file):
    values = read_sweep_file(sweep_file(SWEEP))
    assert (values["top_p"], values["temperature"], values["n"]) == ([0.9], [0.7, 1, 2.0], 4)


def test_every_key_is_a_flag():
    flags = vars(cli.build_parser().parse_args(["generate", "--db", "x.db"]))
    assert SWEEP_KEYS.keys() <= flags.keys() and all(flags[key] is None for key in SWEEP_KEYS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt = 'a cat'", ["'prompt'", *SWEEP_KEYS]),
        ("n = [1, 2]", ["n takes one value"]),
        ("top_k = [1.5]", ["top_k", "1.5"]),
        ("top_p = true", ["top_p", "True"]),
        ("prompts = [1]", ["prompts", "1"]),
        ("prompts = [", ["TOML"]),
        (b"prompts = ['\xff']", ["TOML"]),
        ("[prompts]\na = 1", ["prompts"]),
    ],
)
def test_what_is_wrong_is_named(sweep_file, text, expected):
    with pytest.raises(UserError, match="--sweep") as caught:
        read_sweep_file(sweep_file(text))
    assert all(name in str(caught.value) for name in ["sweep.toml", *expected])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature = 1" + 400 * "0", ["temperature", "3e+38", "inf"]),
        ("cond_scale = -1" + 400 * "0", ["cond_scale", "3e+38", "-inf"]),
        ("n = 0x1" + 5000 * "0", ["n ", "10,000,000"]),
        ("seed = 0x1" + 5000 * "0", ["seed"]),
        ("top_k = [5, 0x1" + 5000 * "0" + "]", ["top_k", "2,147,483,647"]),
        ("keys = []", ["keys"]),
        ("keys = ['0x1:2']", ["--keys", "'0x1:2'"]),
    ],
)
def test_values_that_cannot_be_sampled_are_one_line_too(sweep_file, text, expected):
    with pytest.raises(UserError) as caught:
        load_sweep({}, sweep_file("prompts = 'a cat'\n" + text))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    assert all(name in message for name in expected)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml"):
        read_sweep_file(tmp_path / "none.toml")
