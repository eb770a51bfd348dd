"""Ctrl-C: among threads it waits until no lock of theirs is half taken; a command ends with one line at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from faults_kit import without_progress
from helpers import ROOT, first_of
from PIL import Image

from dm_generations.cli import main
from dm_generations.errors import INTERRUPTED, INTERRUPTED_LINE, defer_sigint, handle_sigint
from dm_generations.export.writers import FileWriter, Shard, ShardWriter


@pytest.fixture
def _python_handler():
    """Python's own handler before and after the test, whatever the test does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_handler")
def test_it_comes_at_the_end_of_a_deferring_block():
    passed = []

    @defer_sigint()
    def pass_on():
        signal.raise_signal(signal.SIGINT)
        passed.append(True)

    with pytest.raises(KeyboardInterrupt):
        pass_on()
    assert passed == [True]
    with defer_sigint():
        passed.append(True)
    assert passed == [True, True]


@pytest.mark.usefixtures("_python_handler")
def test_deferring_changes_nothing_in_other_threads():
    seen = []

    @defer_sigint()
    def look():
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.usefixtures("_python_handler")
def test_a_pool_is_never_left_in_the_middle(tmp_path):
    """The callbacks of the writers run where the writers use their pool."""
    done = []

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        done.append(arguments)

    with pytest.raises(KeyboardInterrupt), FileWriter(1) as files:
        files.submit(tmp_path / "a", lambda: b"a", interrupt)
    assert done == [(None,)]
    assert (tmp_path / "a").read_bytes() == b"a"

    shard = Shard("a.zip", "a.incomplete.zip")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "zip", 1, interrupt, interrupt) as shards:
        shards.submit(shard, lambda: [("a", b"a")])
    assert len(done) == 3
    assert (tmp_path / "a.zip").exists()


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        handle_sigint()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def start(*words: str) -> subprocess.Popen[str]:
    """Start Python in a process that hears of Ctrl-C, also where these tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, *words], env=environment, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("module", ["dm_generations.cli", "dm_generations.archive", "sqlite3", "jax", "jaxlib"])
def test_a_command_can_be_interrupted_while_it_imports(module):
    program = ROOT / "tests" / "programs" / "interrupt_import.py"
    with start(str(program), module, "verify", "--regenerate") as process:
        _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (INTERRUPTED, f"{INTERRUPTED_LINE}\n")


def test_it_is_heard_where_python_only_prints_errors():
    """In a finalizer, and in a callback of the garbage collector, of SQLite or of another library in C."""
    program = """
import signal, sys
from dm_generations.errors import handle_sigint
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
handle_sigint()
Finalized()
print("went on")
"""
    with start("-c", program) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (INTERRUPTED, "", f"{INTERRUPTED_LINE}\n")


MAKES = ("--db", "--out-dir", "--into", "--out", "--run")  # flags of what a command makes
READY = """
import sys
from dm_generations.__main__ import start
from dm_generations.errors import handle_sigint
handle_sigint()
print("ready", flush=True)
start(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def commands(models, tmp_path_factory):
    """Words of each command, which ends with the name of what it makes, if anything."""
    db = tmp_path_factory.mktemp("interrupts") / "a.db"
    tiny = ["--model", models.dalle_bart, "--codec", models.vqgan, "--clip", models.clip, "--prompts", "a boat"]
    assert main([str(word) for word in ["generate", *tiny, "--n", 4, "--batch-size", 4, "--db", db]]) == 0
    emoji = ["--cpu-only", "--batch-size", 8]
    steps = ["--batch-size", 2, "--steps", 2000, "--held-out", 0, "--save-every", 5, "--log-every", 1000]
    images = db.with_name("images")
    images.mkdir()
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"image {number}")
    table = db.with_name("table")
    assert main(["export", str(db), "--to", "parquet", "--no-images", "--out", str(table)]) == 0
    return {
        "generate": ["generate", *emoji, "--prompts", "a boat", "--n", 64, "--db"],
        "score": ["score", "--all", "--codec", models.vqgan, "--clip", models.clip, "--db", db],
        "decode": ["decode", *emoji, "--prompt-ids", 1, 2, "--n-best", 16, "--out-dir"],
        "info": ["info"],
        "verify": ["verify"],
        "replay": ["verify", "--replay", *emoji],
        "regenerate": ["verify", "--regenerate", *emoji],
        "merge": ["merge", ROOT / "archive/emoji.db", db, "--into"],
        "convert": ["convert", models.dalle_bart, "--out"],
        "train": ["train", db, "--model", models.dalle_bart, "--codec", models.vqgan, *steps, "--run"],
        "encode": ["encode", images, "--cpu-only", "--batch-size", 2, "--db"],
        "browse": ["browse", db, "--codec", models.vqgan, "--cpu-only", "--no-open", "--port", 0],
        "import": ["import", table, "--into"],
        "export": ["export", db, "--codec", models.vqgan, "--cpu-only", "--to", "parquet", "--out"],
        "export-site": ["export-site", db, "--codec", models.vqgan, "--cpu-only", "--out-dir"],
        "list": ["list", "--limit", 20],
        "plot": ["plot", "--out"],
    }


@pytest.mark.e2e
@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
@pytest.mark.parametrize(
    "try_count", [1, pytest.param(25, marks=[pytest.mark.slow, pytest.mark.timeout(1800)], id="many")]
)
@pytest.mark.parametrize(
    "command",
    first_of(
        [
            *("generate", "decode", "replay", "train", "browse", "score", "info", "verify", "regenerate", "merge"),
            *("convert", "encode", "import", "export", "export-site", "list", "plot"),
        ],
        count=5,
    ),
)
def test_a_command_can_be_interrupted_at_any_moment(command, try_count, commands, tmp_path):
    words = [str(word) for word in commands[command]]
    for number in range(try_count):
        made = [str(tmp_path / f"{number}{'.png' * (command == 'plot')}")] if words[-1] in MAKES else []
        seconds = random.choice((0.5, 8)) * random.random()  # while it imports; while it loads, compiles and runs
        with start("-c", READY, *words, *made) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=100)
        if process.returncode == 0:
            assert INTERRUPTED_LINE not in errors, seconds
        else:
            assert process.returncode == INTERRUPTED, (seconds, errors)
            assert without_progress(errors).splitlines()[-1] == INTERRUPTED_LINE, seconds
            assert "Traceback" not in errors, seconds
            assert command == "train" or without_progress(errors).count("\n") <= 1 + (command == "generate"), errors
