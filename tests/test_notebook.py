"""The notebook explains and calls; these tests read it and run none of it."""

import ast
import json
import shlex
from pathlib import Path

import pytest

from dm_generations.cli import build_parser

PATH = Path(__file__).resolve().parent.parent / "dm_generations_decode.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [line[1:] for code in CODE for line in code.splitlines() if line.startswith("!python")]


def test_it_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']}: clear its output"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_these_flags(command):
    start, words = shlex.split(command)[:3], shlex.split(command)[3:]
    assert start == ["python", "-m", "dm_generations"]
    build_parser().parse_args(words)  # exits where a command or flag is unknown


def test_it_calls_each_step_of_the_pipeline():
    assert {shlex.split(command)[3] for command in COMMANDS} == {"info", "decode", "generate"}


@pytest.mark.parametrize("code", CODE)
def test_cells_are_python_and_define_nothing(code):
    lines = ["pass" if line.startswith(("!", "%")) else line for line in code.splitlines()]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse("\n".join(lines))))
