"""Every command that README.md shows, run as it stands there, in order, in a copy of the checkout.

The set-up of an environment is cut off where it can be, and done for real once, by the slow test and by `.ci/run`.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"python3 -m venv \.venv\s*&& \.venv/bin/pip install -q [^&]*&&\s*")
SHIPPED = ("dm_generations", "schema", "archive", "benchmarks", "samplebrowser.html", "dm_generations_decode.py")


def commands() -> list[str]:
    joined = "".join(BLOCKS).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


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


def test_readme_shows_both_set_ups():
    found = [command for command in commands() if SET_UP.match(command)]
    assert len(found) == 2
    assert "dm_generations_decode.py" in found[0]
    assert "pytest" in found[1]


@pytest.mark.timeout(900)
def test_every_command_of_the_readme_works(checkout):
    ran = 0
    for command in commands():
        if "pytest" in command:  # this very run
            continue
        command = SET_UP.sub("", command).replace(".venv/bin/python", sys.executable)
        done = subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 8
    assert len(list((checkout / "images").rglob("*.png"))) == 6048
    assert (checkout / "images" / "samplebrowser.html").is_file()


def test_the_python_of_the_readme_runs(checkout):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for code in blocks:
        done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert (checkout / "rockets.png").stat().st_size > 1000


def test_readme_names_every_subcommand_and_its_pictures_exist():
    from dm_generations.cli import COMMANDS

    for name in COMMANDS:
        assert re.search(rf"dm_generations {name}\b", README), name
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_command_does_its_own_set_up(checkout, tmp_path):
    """From nothing but Python: a fresh virtual environment, packages from the index, pictures."""
    folder = tmp_path / "fresh"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("images", "gallery"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    command = next(command for command in commands() if SET_UP.match(command))
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, timeout=900)
    assert len(list((folder / "images").rglob("*.png"))) == 6048
