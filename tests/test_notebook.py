"""The notebook: text and calls, without definitions. It is run, except for the cell that installs the package."""

import ast
import json
import os
import shlex
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from dm_generations.cli import build_parser

pytestmark = pytest.mark.e2e

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


@pytest.mark.e2e
def test_it_runs(tmp_path, monkeypatch):
    """All cells in order, in a temporary folder, with the package of this environment."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(PATH.parent))
    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "%pip" not in cell.source]
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 6 + 2  # galleries of the shipped archive, and of the new images
    assert len(list((tmp_path / "gallery").rglob("*.png"))) == 2 * 54
    assert (tmp_path / "mine.db").stat().st_size > 0 and (tmp_path / "mine.zip").stat().st_size > 0
