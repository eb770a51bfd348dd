"""Every command and Python example of the documents, run as they stand there, in order, in one copy of the checkout.

A block of `text` after the commands is what they print, line by line. Commands that need a download or a GPU, or
that would take long, stand in `bash` blocks, and are only parsed. Setting up an environment is left out, except in the
slow test and in `.ci/run`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.e2e

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", *PAGES, "archive/README.md"]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"python3 -m venv \.venv\s*&& \.venv/bin/pip install -q [^&]*&&\s*")
PYTHON = re.compile(r"^(\.venv/bin/)?python(?= )")
SHIPPED = (
    "dm_generations",
    "schema",
    "archive",
    "benchmarks",
    "browser",
    "samplebrowser.html",
    "dm_generations_decode.py",
)
# A task of an array job, for commands that ask which one they are.
ENVIRONMENT = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of each block of a document."""
    found = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    return [(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(program: list[str], folder: Path) -> str:
    """Run a program that has to succeed; returns all that it prints."""
    done = subprocess.run(program, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{program[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def set_ups() -> list[str]:
    found = [command for language, text in blocks("README.md") if language == "sh" for command in commands(text)]
    return [command for command in found if SET_UP.match(command)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if any(kind in ("sh", "python") for kind, _ in blocks(name))]
)
def test_commands_and_examples_run(checkout, document):
    printed = ""
    for language, text in blocks(document):
        if language == "sh":
            printed = ""
            for command in commands(text):
                if "pytest" not in command:  # this very run
                    command = PYTHON.sub(sys.executable, SET_UP.sub("", command))
                    printed += run(["bash", "-c", command], checkout)
        elif language == "python":
            printed = run([sys.executable, "-c", text], checkout)
        elif language == "text":
            for line in text.splitlines():
                assert line in printed.splitlines(), f"{line!r} is not among\n{printed}"
    if document == "README.md":
        assert len(list((checkout / "images").rglob("*.png"))) == 6048
        assert (checkout / "images" / "samplebrowser.html").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_that_are_not_run_have_flags_that_exist(document):
    from dm_generations.cli import build_parser

    for language, text in blocks(document):
        for command in commands(text) if language == "bash" else ():
            words = shlex.split(command)
            if words[1:3] == ["-m", "dm_generations"]:
                build_parser().parse_args(words[3:])


def test_readme_shows_both_set_ups():
    decode, test = set_ups()
    assert "dm_generations_decode.py" in decode and "pytest" in test


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_command_does_its_own_set_up(checkout, tmp_path):
    """From nothing but Python: a fresh virtual environment, packages from the index, images."""
    folder = tmp_path / "fresh"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("images", "gallery"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    run(["bash", "-c", set_ups()[0]], folder)
    assert len(list((folder / "images").rglob("*.png"))) == 6048
