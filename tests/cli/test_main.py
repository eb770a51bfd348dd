"""What all commands share: flags that are wrong, output that goes nowhere, memory that runs out."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from decode_kit import read_images
from helpers import ROOT
from tiny import IMAGE_SIZE

from dm_generations.archive import Archive
from dm_generations.cli import COMMANDS, main

# Followed by an unset variable of a shell: not the archive that ships, and not this folder.
UNSET = [
    *([command, "--db"] for command in ("info", "verify", "decode", "score")),
    ["generate", "--prompts", "a", "--db"],
    ["merge", "x.db", "--into"],
]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["decode", "--n-best", "0"], ["--n-best", "0"]),
        (["generate", "--db", "x.db", "--prompts", "a", "--seed", "1.5"], ["--seed", "'1.5'"]),
        (["verify", "--batch-size", "0"], ["--batch-size", "0"]),
        (["generate", "--progressive", "0"], ["--progressive", "0"]),
        (["info", "--nonsense"], ["--nonsense"]),
        *(([*words, ""], [words[-1], "empty"]) for words in UNSET),
        (["merge", "--into", "x.db", ""], ["FILE", "empty"]),
        (["encode", "", "--db", "x.db"], ["SOURCE", "empty"]),
        (["import", "", "--into", "x.db"], ["PATH", "empty"]),
        ([], ["COMMAND"]),
    ],
)
def test_a_wrong_flag_is_one_line(words, names, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert all(name in printed.err for name in [*names, "--help"])


def run_info(**streams) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dm_generations", "info"]
    return subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=60, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which is as a full disk")
def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        run = run_info(stdout=full)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in run.stderr


def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = run_info(stdout=writing)
    finally:
        os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


CLOSED = {"input": "<&-", "output": ">&-", "errors": "2>&-", "all": "<&- >&- 2>&-"}


def run_closed(closed: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard streams are closed. Files that it opens must not get their numbers."""
    shell = ["sh", "-c", f'exec "$0" -m dm_generations "$@" {CLOSED[closed]}', sys.executable, *map(str, words)]
    return subprocess.run(shell, capture_output=True, text=True, timeout=100, cwd=ROOT)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams_are_no_error(closed):
    for words in (["info"], ["--help"]):
        run = run_closed(closed, *words)
        assert (run.returncode, run.stderr) == (0, "")
        assert bool(run.stdout) == (closed in ("input", "errors"))
    run = run_closed(closed, "info", "--db", "nowhere")
    assert (run.returncode, run.stdout, bool(run.stderr)) == (1, "", closed in ("input", "output"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_commands_do_their_work_with_closed_streams(models, tmp_path):
    db, merged, out, model = (tmp_path / name for name in ("a.db", "b.db", "out", "model"))
    codec = ["--codec", models.vqgan, "--batch-size", 4]
    made = ["--model", models.dalle_bart, *codec, "--prompts", "a boat", "--n", 4, "--no-score"]
    for words in (
        ["generate", "--db", db, *made],
        ["score", "--db", db, *codec, "--clip", models.clip],
        ["verify", "--db", db, "--regenerate", "--model", models.dalle_bart, "--batch-size", 4],
        ["merge", db, "--into", merged],
        ["decode", "--db", merged, *codec, "--out-dir", out],
        ["convert", models.vqgan, "--out", model],
    ):
        run = run_closed("all", *words)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", ""), words
    assert main(["verify", "--db", str(merged)]) == 0
    with Archive.open(merged) as archive:
        assert archive.count() == 4
    assert [image.shape for image in read_images(out).values()] == [(IMAGE_SIZE, IMAGE_SIZE, 3)] * 4
    assert (model / "model.safetensors").exists()


@pytest.fixture
def db(models, tmp_path):
    """An archive with one image and no score."""
    path = tmp_path / "a.db"
    words = ["generate", "--db", path, "--model", models.dalle_bart, "--codec", models.vqgan, "--batch-size", 4]
    assert main([str(word) for word in [*words, "--prompts", "a boat", "--n", 1, "--no-score"]]) == 0
    return path


@pytest.mark.parametrize(
    "error",
    [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore\nlines"), MemoryError()],
    ids=["device", "host"],
)
@pytest.mark.parametrize("command", ["generate", "decode", "score", "verify"])
def test_weights_that_do_not_fit_are_one_line(command, error, db, models, tmp_path, monkeypatch, capsys):
    words = {
        "generate": ["--model", models.dalle_bart, "--codec", models.vqgan, "--prompts", "a cat", "--no-score"],
        "decode": ["--codec", models.vqgan, "--out-dir", tmp_path / "out"],
        "score": ["--codec", models.vqgan, "--clip", models.clip],
        "verify": ["--model", models.dalle_bart, "--regenerate"],
    }

    def fail(*arguments, **options):
        raise error

    before = db.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(jax, "device_put", fail)
    assert main([str(word) for word in [command, "--db", db, *words[command]]]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "memory" in errors
    assert db.read_bytes() == before


def test_memory_that_runs_out_anywhere_is_one_line(monkeypatch, capsys):
    def fail(args):
        raise MemoryError

    monkeypatch.setattr(COMMANDS["info"], "run", fail)
    assert main(["info"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
