"""What is installed is what is imported."""

import ast
import re
import sys
import tomllib

from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"beautifulsoup4": "bs4", "pillow": "PIL", "pyyaml": "yaml"}  # by distribution, where its name is another


def modules(requirements) -> set[str]:
    names = (re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
    return {MODULES.get(name.lower(), name) for name in names}


def imported() -> set[str]:
    """Top-level modules that the package imports, anywhere, but for its own and the standard library's."""
    found = set()
    for path in (ROOT / "dm_generations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"dm_generations", "compression"}  # zstd, of Python 3.14


def test_every_requirement_is_imported_and_every_import_is_required():
    extras = PROJECT["optional-dependencies"]
    used = ["browse", "checkpoints", "completion", "datasette", "notebook", "plot", "ray", "site", "tables"]
    used += ["tensorboard", "train"]
    names = [name for extra in used for name in extras[extra]]
    optional = modules(names) | {
        "IPython",
        "google",
        "zstandard",
    }  # of a notebook, of Colab, and used where JAX uses it
    assert imported() - optional == modules(PROJECT["dependencies"])


def test_requirements_txt_is_the_same_list():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == PROJECT["dependencies"]
