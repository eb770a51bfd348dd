"""The wheel holds everything: installed by itself into another environment, it works from any folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

pytest.importorskip("hatchling")
pytestmark = pytest.mark.e2e


def run(*program: str | Path, folder: Path) -> str:
    """Run a program that has to succeed, without the variables that could lead it to the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), folder=ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory):
    """The installed command, in an environment with this one's packages, but not with a checkout installed here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # The path of a folder in a .pth file is added as it is: .pth files in that folder are not read.
    (Path(paths["purelib"]) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(scripts / "python"),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run(*pip, str(wheel), folder=folder)
    return scripts / "dm-generations"


def test_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "dm_generations"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert files
    for path in files:
        assert path.relative_to(ROOT).as_posix() in names


def test_installed_program_works_from_another_folder(program, tmp_path):
    assert "decode" in run(program, "--help", folder=tmp_path)
    assert "a rocket" in run(program, "info", folder=tmp_path)
    run(program, "generate", "--db", "mine.db", "--prompts", "a rocket", "--n", "1", folder=tmp_path)
    assert "1 image " in run(program, "info", "--db", "mine.db", folder=tmp_path)
    run(program, "decode", "--prompt-texts", "a pizza", "--n-best", "1", folder=tmp_path)
    images = list((tmp_path / "images").rglob("*.png"))
    assert len(images) == 54
    assert all(Image.open(path).getextrema()[0][0] < 255 for path in images)  # not white
    assert (tmp_path / "images" / "samplebrowser.html").read_bytes() == (ROOT / "samplebrowser.html").read_bytes()
