"""The package's layout, as the architecture page shows it: layers, sizes, and how many files a task runs through."""

import ast
import json
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "dm_generations"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up. A module imports from its own layer (within its own folder) and from layers below.
LAYERS = [
    {"errors"},
    {"atomic_io", "paths"},
    {"archive", "weights"},
    {"runtime"},
    {"sampling", "models"},
    {"inference"},
    {"pipelines", "export"},
    {"api", "compat", "server", "training"},
    {"cli"},
]
# They import nothing of the package but errors, so that all layers may use them.
LEAVES = {"dm_generations.sampling.params", "dm_generations.sampling.prng"}
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60


def layer_name(module: str) -> str:
    return module.split(".")[1]


def imports(path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, except for type checkers."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "dm_generations":
            found |= {f"dm_generations.{alias.name}" for alias in node.names}
        elif node.module.startswith("dm_generations."):
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    own = LAYER_OF[parts[0]]
    for module in imports(path) - LEAVES - {"dm_generations.__version__"}:
        name = layer_name(module)
        assert name == parts[0] or LAYER_OF[name] < own, f"{path.relative_to(PACKAGE)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path.name}: {node.name}"


def files_run(*command: str) -> list[str]:
    program = ROOT / "tests" / "programs" / "count_files.py"
    done = subprocess.run([sys.executable, program, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.e2e
def test_a_row_becomes_a_png_through_few_files(tmp_path):
    files = files_run("decode", "--prompt-ids", "1", "--n-best", "1", "--out-dir", str(tmp_path / "images"))
    assert len(files) <= 31, files


@pytest.mark.e2e
def test_a_prompt_becomes_a_row_through_few_files(tmp_path):
    files = files_run("generate", "--db", str(tmp_path / "new.db"), "--prompts", "a rocket", "--n", "1")
    assert len(files) <= 37, files
