"""Documents point to things that exist: links, files of the package, the functions named with them, tests, commands."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "dm_generations"
SKIPPED = {"build", "images", "gallery", "shared", "golden", "node_modules", "site"}
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
FILE = re.compile(r"[\w/]+\.py")
FUNCTION = re.compile(r"([A-Za-z_][\w.]*)\(\)")


def anchors(path: Path) -> set[str]:
    """The names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined_names(path: Path) -> set[str]:
    """Functions and classes of a module, and methods as "Class.method"."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = ast.FunctionDef | ast.AsyncFunctionDef
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, functions)}
    return names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_resolve(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_architecture_names_files_and_functions_that_exist():
    """In each line, functions `f()` and methods `C.f()` belong to the last file of the package named before them."""
    for line in (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8").splitlines():
        file = None
        for code in CODE.findall(line):
            if FILE.fullmatch(code):
                file = PACKAGE / code if (PACKAGE / code).is_file() else ROOT / code
                assert file.is_file(), code
            elif (match := FUNCTION.fullmatch(code)) and file is not None:
                assert match[1] in defined_names(file), f"{file.name} has no {match[1]}"


def test_architecture_describes_every_folder_of_the_package():
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    folders = {path.parent for path in PACKAGE.glob("*/__init__.py")} | {PACKAGE / "embedded"}
    for folder in folders:
        assert f"`{folder.name}/`" in text, folder.name


def test_security_names_tests_that_exist():
    text = (ROOT / "docs" / "explanation" / "security.md").read_text(encoding="utf-8")
    files = re.findall(r"`(tests/[\w/]+(?:\.py)?/?)`", text)
    assert files
    for file in files:
        assert (ROOT / file).exists(), file


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_readme_names_every_command():
    from dm_generations.cli import COMMANDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert re.search(rf"dm_generations {name}\b|`{name}`", readme), name
