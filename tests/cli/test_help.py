"""What every command says of itself."""

import argparse

import pytest

from dm_generations.cli import COMMANDS, build_parser


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_and_ends_with_an_example(name):
    (subparsers,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    command = subparsers.choices[name]
    assert all(action.help for action in command._actions)
    assert f"  python -m dm_generations {name} " in command.format_help().rpartition("\nexample")[2]
