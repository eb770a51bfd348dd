"""Processes that train together end as one that trains alone, and none waits for one that has ended."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from training_kit import read_log, train_words, write_archive

from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.training import hosts
from dm_generations.weights.native import flatten, read_params

LIMIT = 200  # seconds of a run


@pytest.fixture(scope="module")
def archive(models, tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("hosts") / "a.db", models)


def start(words_of, count=2):
    """Start processes that train together, each with its words."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "dm_generations", *words_of(process), "--cpu-only"),
                *("--coordinator", address, "--processes", str(count), "--process", str(process)),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def end(processes):
    """Wait for processes. Returns the exit status and what each has written."""
    try:
        return [(*process.communicate(timeout=LIMIT), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_near(one, other):
    """Check that weights are equal but for sums of another order."""
    first, second = (flatten(read_params(folder)) for folder in (one, other))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_allclose(second[name], leaf, rtol=1e-3, atol=1e-4, err_msg=name)


def train_together(models, archive, run, *words):
    return end(start(lambda process: train_words(models, archive, run, *words)))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), marks=pytest.mark.slow, id="whole"),
        pytest.param(("--shard-params",), marks=pytest.mark.e2e, id="divided"),
        pytest.param(("--lora-rank", 2), marks=pytest.mark.slow, id="low-rank"),
    ],
)
def test_two_processes_end_as_one(words, models, archive, tmp_path):
    words = (*words, "--sample-every", 4, "--sample-count", 1, "--tensorboard")
    assert main([*train_words(models, archive, tmp_path / "one", *words)]) == 0
    ends = train_together(models, archive, tmp_path / "two", *words)
    assert [status for *_, status in ends] == [0, 0], ends
    assert ["Wrote" in output for output, *_ in ends] == [True, False]
    assert_near(tmp_path / "one" / "model", tmp_path / "two" / "model")
    one, two = (read_log(tmp_path / run) for run in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    np.testing.assert_allclose(*([line["held_out_nats"] for line in log[-1:]] for log in (one, two)), rtol=1e-3)
    one, two = ({path.name for path in (tmp_path / run).iterdir()} for run in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(models, archive, tmp_path):
    words = ("--keep", 2)
    assert main([*train_words(models, archive, tmp_path / "one", *words)]) == 0
    assert [status for *_, status in train_together(models, archive, tmp_path / "two", *words)] == [0, 0]
    for name in ("model", "checkpoints/00000004"):
        shutil.rmtree(tmp_path / "two" / name)
    assert main([*train_words(models, archive, tmp_path / "two", *words)]) == 0
    assert_near(tmp_path / "one" / "model", tmp_path / "two" / "model")


@pytest.mark.slow
def test_a_codec_is_trained_together(models, archive, tmp_path):
    words = ("train", archive, "--train-codec", "--codec", models.vqgan, "--steps", 3, "--batch-size", 2, "--run")
    one, two = ([*map(str, words), str(tmp_path / run)] for run in ("one", "two"))
    assert main(one) == 0
    assert [status for *_, status in end(start(lambda process: two))] == [0, 0]
    assert_near(tmp_path / "one" / "model", tmp_path / "two" / "model")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("killed", [0, 1])
def test_processes_end_with_one_that_is_killed_and_go_on_together(killed, models, archive, tmp_path):
    words = ("--steps", 12, "--save-every", 2, "--log-every", 1)
    assert [status for *_, status in train_together(models, archive, tmp_path / "whole", *words)] == [0, 0]
    run = tmp_path / "run"
    processes = start(lambda process: train_words(models, archive, run, *words))
    until = time.monotonic() + LIMIT
    with contextlib.suppress(ProcessLookupError):
        while not list(run.glob("checkpoints/0*")) and time.monotonic() < until:
            time.sleep(0.05)
        processes[killed].send_signal(signal.SIGKILL)
    assert all(status != 0 for *_, status in end(processes))
    assert [status for *_, status in train_together(models, archive, run, *words)] == [0, 0]
    one, two = (flatten(read_params(folder / "model")) for folder in (tmp_path / "whole", run))
    for name, leaf in one.items():
        np.testing.assert_array_equal(two[name], leaf, name)


@pytest.mark.e2e
def test_an_error_of_one_process_ends_all(models, archive, tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    ends = train_together(models, archive, tmp_path / "run")
    assert [status for *_, status in ends] == [1, 1]
    assert all(str(tmp_path / "run") in errors.splitlines()[-1] for _, errors, _ in ends)

    ends = end(start(lambda process: train_words(models, archive, tmp_path / "other", "--log-every", 1 + process)))
    assert [status for *_, status in ends] == [1, 1]
    assert all("log_every" in errors.splitlines()[-1] for _, errors, _ in ends)
    assert not (tmp_path / "other" / "model").exists()


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "WAIT", 0)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=address), hosts.join(address, 2, 1):
        pass


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--processes", "2"], "--coordinator"),
        (["--coordinator", "auto", "--process", "0"], "--coordinator"),
        (["--coordinator", "localhost:1"], "--processes"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"], "--process"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "-1"], "--process"),
        (["--coordinator", "localhost", "--processes", "2", "--process", "0"], "localhost"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, name, tmp_path, capsys):
    assert main(["train", "a.db", "--run", str(tmp_path / "run"), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and not (tmp_path / "run").exists()
