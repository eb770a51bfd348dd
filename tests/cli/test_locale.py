"""Commands on a system whose locale is not UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from tiny import tiny_dalle_bart, tiny_vqgan

from dm_generations.archive import Archive

PROMPT = "émoji 🚀"
# ASCII, everywhere: without the two variables Python would not use it.
LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def run(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dm_generations", *map(str, words)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | LOCALE
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)


def png_names(folder) -> list[str]:
    return sorted(os.fsdecode(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.mark.slow
def test_files_have_the_same_names_as_in_a_utf_8_locale(tmp_path):
    model, codec = tiny_dalle_bart(tmp_path / "model"), tiny_vqgan(tmp_path / "codec")
    sweep, db, partial, out = (tmp_path / name for name in ("sweep.toml", "a.db", "partial", "out"))
    sweep.write_text(f'prompts = ["{PROMPT}"]\nn = 1\ntop_k = 8\n', encoding="utf-8")
    words = ["--model", model, "--codec", codec, "--no-score", "--batch-size", 1]
    words += ["--progressive", 16, "--progressive-dir", partial]
    assert run("generate", "--db", db, "--sweep", sweep, *words).returncode == 0
    assert [name[-len(PROMPT) - 9 :] for name in png_names(partial)] == [f"0016_{PROMPT}.png"]

    decode = ["decode", "--db", db, "--codec", codec, "--out-dir", out]
    for _ in range(2):  # the second time, they are found
        done = run(*decode)
        assert (done.returncode, done.stderr) == (0, b"")
        assert png_names(out) == [f"0001_{PROMPT}/0001_k=8,p=1.0,t=1.0,c=3.0_00_None.png"]
    assert b"0 files written" in done.stdout


def test_a_prompt_that_the_locale_cannot_spell_is_one_line(tmp_path):
    done = run("generate", "--db", tmp_path / "a.db", "--prompts", PROMPT)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are not UTF-8")
@pytest.mark.parametrize("locale", [LOCALE, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}])
def test_names_that_are_no_text(tmp_path, locale):
    db, merged, missing = (
        os.path.join(os.fsencode(tmp_path), name) for name in (b"\xff\xe9.db", b"\xfe.db", b"\xfd.db")
    )
    with Archive.create(Path(os.fsdecode(db))):
        pass
    command, environment = [sys.executable, "-m", "dm_generations"], os.environ | {"PYTHONPATH": str(ROOT)} | locale
    for words, status in (
        (["info", "--db", db], 0),
        (["info", "--json", "--db", db], 0),
        (["verify", "--db", db], 0),
        (["merge", db, "--into", merged], 0),
        (["info", "--db", missing], 1),
    ):
        done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == status, done.stderr
        assert done.stderr.count(b"\n") == status
        assert (done.stdout + done.stderr).isascii()
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"\xfe.db", b"\xff\xe9.db"]
