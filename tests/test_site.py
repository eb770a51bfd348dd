"""The documents as a site: it builds without a warning, has every option and name, and loads nothing from elsewhere."""

import html
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import dm_generations
from dm_generations.cli import COMMANDS, build_parser

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.e2e
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built without network: every request would go to a proxy that is not there."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_there(site, name, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([name, "--help"])
    text = html.unescape((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    section = text.partition(f'id="{name}"')[2].partition("<h2")[0]
    for option in re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE):
        assert f"<code>{option}" in section


def test_every_public_name_is_there(site):
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in dm_generations.__all__:
        assert f'id="dm_generations.{name}"' in text, name


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert not LOADED.findall(page.read_text(encoding="utf-8")), page.name
