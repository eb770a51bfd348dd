"""A run goes on where it was stopped, keeps its checkpoints whole, and stops at a loss that is no number."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dm_generations.errors import UserError
from dm_generations.training import run as module
from dm_generations.training.run import Run

SETTINGS = {"steps": 6, "learning_rate": 0.1}


def initial():
    return {"params": {"kernel": np.zeros((2, 3), np.float32)}, "opt": (np.ones(3, np.float32), np.zeros((), np.int32))}


def train_step(state, step):
    grown = jax.tree.map(lambda leaf: leaf * 1.5 + step, state["params"])
    return {"params": grown, "opt": (state["opt"][0] / 3, state["opt"][1] + 1)}, {"loss": np.float32(1 / (step + 1))}


def open_run(folder, **options):
    return Run(folder, initial(), SETTINGS, **{"save_every": 2, **options})


def read_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def fail_at(stop, error):
    def step(state, number):
        if number == stop:
            raise error
        return train_step(state, number)

    return step


def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path):
    with open_run(tmp_path / "whole") as whole:
        whole.train(6, train_step, log_every=1)
    for stop in (1, 3, 5):
        with open_run(tmp_path / "parts") as parts, pytest.raises(KeyboardInterrupt):
            parts.train(6, fail_at(stop, KeyboardInterrupt), log_every=1)
    with open_run(tmp_path / "parts") as parts:
        parts.train(6, train_step, log_every=1)
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert read_steps(tmp_path / "parts") == read_steps(tmp_path / "whole") == [1, 2, 3, 4, 5, 6]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with open_run(tmp_path, save_every=1, keep=2) as run:
        run.train(6, train_step, log_every=6)
    assert checkpoints(tmp_path) == ["00000005", "00000006"]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    for _ in range(2):
        with open_run(tmp_path) as run:
            run.train(6, train_step, log_every=1)
    assert run.step == 6 and read_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_parameters_are_written_as_a_model_of_their_own(tmp_path):
    written = []

    def write_model(folder, state, step):
        module.native.save(folder, "toy", {}, state["params"])
        written.append(step)

    with open_run(tmp_path, write_model=write_model) as run:
        run.train(4, train_step, log_every=1)
    with open_run(tmp_path, write_model=write_model) as again:
        jax.tree.map(np.testing.assert_array_equal, again.state, run.state)
    assert written == [2, 4]


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(loss, tmp_path):
    def bad_step(state, step):
        state, metrics = train_step(state, step)
        return state, {"loss": np.float32(loss)} if step >= 2 else metrics

    with open_run(tmp_path) as run, pytest.raises(UserError, match=r"at step 3 .*00000002"):
        run.train(6, bad_step, log_every=10)
    assert checkpoints(tmp_path) == ["00000002"]


def test_a_value_of_an_evaluation_that_is_no_number_stops_before_the_checkpoint(tmp_path):
    def evaluate(state):
        return {"held_out": np.nan if state["opt"][1] > 3 else 1.0}

    with open_run(tmp_path) as run, pytest.raises(UserError, match=r"held_out .*at step 4 .*00000002"):
        run.train(6, train_step, log_every=1, evaluate=evaluate, evaluate_every=1)
    assert checkpoints(tmp_path) == ["00000002"] and read_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_weights_that_are_no_numbers_make_no_checkpoint(dtype, tmp_path):
    """The loss of a step is that of the weights before it."""

    def bad_step(state, step):
        state, metrics = train_step(state, step)
        kernel = state["params"]["kernel"].astype(dtype)
        return state | {"params": {"kernel": kernel * np.inf if step == 3 else kernel}}, metrics

    with open_run(tmp_path) as run, pytest.raises(UserError, match=r"kernel .*at step 4 .*00000002"):
        run.train(4, bad_step, log_every=1)
    assert checkpoints(tmp_path) == ["00000002"]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)

        def refuse(tensors, path):
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(module, "save_file", refuse)
            with pytest.raises(UserError, match="No space left"):
                run.train(6, train_step, log_every=1)
    assert checkpoints(tmp_path) == ["00000002"]
    with open_run(tmp_path) as run:
        assert run.step == 2


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    open_run(tmp_path).__exit__()
    with pytest.raises(UserError, match=r"learning_rate 0\.1, not 0\.2"):
        Run(tmp_path, initial(), SETTINGS | {"learning_rate": 0.2}, 2)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with open_run(tmp_path), pytest.raises(UserError, match=str(tmp_path)):
        open_run(tmp_path)


@pytest.mark.parametrize("kernel", [np.zeros((4, 3), np.float32), np.zeros((2, 3), np.int8)], ids=["shape", "dtype"])
def test_a_checkpoint_of_another_model_is_refused(kernel, tmp_path):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)
    other = initial() | {"params": {"kernel": kernel}}
    with pytest.raises(UserError, match="00000002"):
        Run(tmp_path, other, SETTINGS, 2)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize(
    "name",
    [
        *(".lock", "config.json", "log.jsonl", "held_out.txt", "samples.db", "model", ".model.unfinished"),
        *("checkpoints/00000002", "checkpoints/00000002/step.json", "checkpoints/00000002/state.safetensors"),
    ],
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_folder_of_others_are_refused(name, kind, tmp_path):
    with open_run(tmp_path / "run") as run:
        run.train(2, train_step, log_every=1)
    other, place = tmp_path / "other", tmp_path / "run" / name
    if place.exists():
        place.rename(other)
    else:
        other.write_text("mine")
    before = other.read_bytes() if other.is_file() else sorted(other.iterdir())
    place.symlink_to(other) if kind == "link" else os.mkfifo(place)
    with pytest.raises(UserError, match=place.name):
        open_run(tmp_path / "run")
    assert before == (other.read_bytes() if other.is_file() else sorted(other.iterdir()))


@pytest.mark.parametrize(
    "about",
    [
        *('{"step": 1e400, "seconds": 1}', '{"step": -1, "seconds": 1}', '{"step": "x", "seconds": 1}', "{}", "\0"),
        '{"step": {}, "seconds": ' + "[" * 10**5 + "]" * 10**5 + "}",
    ],
)
def test_a_damaged_step_is_one_line(about, tmp_path):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)
    (tmp_path / "checkpoints" / "00000002" / "step.json").write_text(about)
    with pytest.raises(UserError, match=r"step\.json"):
        open_run(tmp_path)


def test_lines_of_a_log_that_are_someone_elses_cost_only_themselves(tmp_path):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n" + b"[" * 10**6 + b"\n" + b'{"step": "x"}\n[]\n\0\n')
    with open_run(tmp_path) as run:
        run.train(4, train_step, log_every=1)
    assert read_steps(tmp_path) == [1, 2, 3, 4]


def test_a_line_that_a_kill_cut_off_is_removed(tmp_path):
    with open_run(tmp_path) as run:
        run.train(2, train_step, log_every=1)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    with open_run(tmp_path) as run:
        run.train(4, train_step, log_every=1)
    assert read_steps(tmp_path) == [1, 2, 3, 4]
