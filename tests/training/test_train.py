"""`train` on tiny models: it resumes to the same weights, and what it writes loads, draws and converts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, time_limit
from tiny import DALLE_BART_CONFIG, tiny_dalle_bart
from training_kit import PROMPTS, read_log, run_train, train_words, write_archive

from dm_generations.archive import Archive
from dm_generations.cli import main
from dm_generations.models.loading import load_checkpoint
from dm_generations.training import finetune
from dm_generations.weights.native import flatten, read_params


@pytest.fixture(scope="module")
def archive(models, tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("train") / "a.db", models)


@pytest.fixture(scope="module")
def whole(models, archive, tmp_path_factory):
    """An undisturbed run, with samples."""
    run = tmp_path_factory.mktemp("train") / "whole"
    words = ("--sample-every", 2, "--sample-prompts", PROMPTS[0], "--sample-count", 2, "--n-best", 4)
    assert run_train(models, archive, run, *words) == 0
    return run


def assert_equal_weights(one, other):
    first, second = (flatten(read_params(folder)) for folder in (one, other))
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], path)


@pytest.mark.e2e
def test_a_stopped_run_ends_with_the_same_weights(models, archive, whole, tmp_path, monkeypatch):
    words = ("--sample-every", 2, "--sample-prompts", PROMPTS[0], "--sample-count", 2, "--n-best", 4)
    step = finetune.Trainer.step

    def stop_at_3(self, state, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, state, number)

    monkeypatch.setattr(finetune.Trainer, "step", stop_at_3)
    assert run_train(models, archive, tmp_path / "run", *words) != 0
    monkeypatch.setattr(finetune.Trainer, "step", step)
    assert run_train(models, archive, tmp_path / "run", *words) == 0
    assert_equal_weights(whole / "model", tmp_path / "run" / "model")
    losses = [[line["loss"] for line in read_log(run)] for run in (whole, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_model_that_is_not_trained_is_refused_before_it_is_made(models, archive, tmp_path, capsys):
    config = tmp_path / "large.json"
    config.write_text('{"kind": "amused"}')
    with time_limit(20):
        words = [archive, "--config", config, "--tokenizer", models.dalle_bart, "--run", tmp_path / "run"]
        assert main(["train", *map(str, words)]) == 1
    assert "large.json" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_the_model_loads_with_its_lineage_draws_and_converts(models, archive, whole, tmp_path):
    trained, base = load_checkpoint(whole / "model", "generator"), load_checkpoint(models.dalle_bart, "generator")
    assert load_checkpoint(whole / "model", "codec").sha256 == load_checkpoint(models.vqgan, "codec").sha256
    assert trained.config == dataclasses.replace(base.config, use_scan=False)
    assert trained.lineage["base"]["sha256"] == base.sha256 and trained.lineage["step"] == 4
    assert trained.lineage["selection"] == {"n_best": 4}
    words = ["--prompts", "a", "--n", "2", "--no-score", "--batch-size", "2"]
    assert main(["generate", "--db", str(tmp_path / "b.db"), "--model", str(whole / "model"), *words]) == 0
    with Archive.open(tmp_path / "b.db") as drawn:
        (model,) = [model for model in drawn.models().values() if model.kind == "generator"]
        assert model.sha256 == trained.sha256 and model.config["lineage"] == trained.lineage
    assert main(["convert", str(whole / "model"), "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 0
    assert load_checkpoint(tmp_path / "half", "generator").lineage == trained.lineage


@pytest.mark.e2e
def test_samples_have_the_same_keys_at_every_step(whole):
    with Archive.open(whole / "samples.db") as samples:
        (group,) = samples.groups()
        rows = list(samples.rows(group.key))
        by_model = {row.generator_id: set() for row in rows}
        for row in rows:
            by_model[row.generator_id].add((row.key0, row.key1))
        first, second = by_model.values()
        assert first == second and len(first) == 2
        steps = [model.config["lineage"]["step"] for model in samples.models().values() if model.kind == "generator"]
        assert sorted(steps) == [2, 4]


@pytest.mark.e2e
def test_checkpoints_are_models_too(whole):
    assert_equal_weights(whole / "checkpoints" / "00000004", whole / "model")
    assert load_checkpoint(whole / "checkpoints" / "00000002", "generator").lineage["step"] == 2


@pytest.mark.slow
def test_training_lowers_the_loss(models, archive, tmp_path):
    words = ("--steps", 40, "--caption-dropout", 0, "--held-out", 0, "--save-every", 40, "--log-every", 39)
    assert run_train(models, archive, tmp_path / "run", *words, "--prompt-texts", PROMPTS[0], "--batch-size", 6) == 0
    first, *_, last = read_log(tmp_path / "run")
    assert last["nats"] < 0.8 * np.log(32)
    assert "held_out_nats" not in last
    del first


@pytest.mark.slow
def test_gradients_of_small_batches_add_up_to_those_of_a_large_one(models, archive, tmp_path):
    """Also when activations are computed again."""
    base = tiny_dalle_bart(tmp_path / "base", dropout=0.0)
    words = ("--model", base, "--optimizer", "sgd", "--steps", 1, "--warmup", 0, "--clip-norm", 0)
    assert run_train(models, archive, tmp_path / "one", *words, "--batch-size", 4) == 0
    small = ("--batch-size", 2, "--accumulate", 2, "--recompute")
    assert run_train(models, archive, tmp_path / "two", *words, *small) == 0
    one, two = (flatten(read_params(tmp_path / name / "model")) for name in ("one", "two"))
    base = flatten(read_params(base))
    moved = max(np.abs(one[path] - base[path]).max() for path in base)
    for path in base:
        np.testing.assert_allclose(two[path], one[path], atol=1e-3 * moved)


@pytest.mark.slow
def test_low_rank_changes_stay_in_the_chosen_layers(models, archive, tmp_path):
    words = ("--lora-rank", 2, "--lora-layers", "q_proj$", "--dtype", "bfloat16")
    assert run_train(models, archive, tmp_path / "run", *words) == 0
    base, trained = flatten(read_params(models.dalle_bart)), flatten(read_params(tmp_path / "run" / "model"))
    changed = {path for path in base if (base[path] != trained[path]).any()}
    assert changed == {path for path in base if path.endswith("q_proj/kernel")}


@pytest.mark.slow
def test_preferences_are_learnt(models, archive, tmp_path):
    words = ("--objective", "dpo", "--min-gap", 0.2, "--steps", 12, "--learning-rate", 0.02, "--held-out", 0)
    assert run_train(models, archive, tmp_path / "run", *words) == 0
    log = read_log(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # model and reference are the same yet
    assert log[-1]["loss"] < 0.6 and log[-1]["accuracy"] > 0.7


@pytest.mark.slow
def test_a_model_is_trained_from_random_weights(models, archive, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"kind": "dalle_bart", **DALLE_BART_CONFIG}))
    words = ["train", archive, "--run", tmp_path / "run", "--config", config, "--tokenizer", models.dalle_bart]
    words += ["--codec", models.vqgan, "--steps", 2, "--batch-size", 4]
    assert main([str(word) for word in words]) == 0
    assert load_checkpoint(tmp_path / "run" / "model", "generator").lineage["base"]["name"] == "config"


def run_words(words, stderr=subprocess.DEVNULL, **environment):
    command = [sys.executable, "-m", "dm_generations", *words]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=stderr, text=True)


@pytest.mark.slow
def test_parameters_divided_among_devices_end_as_whole_ones(models, archive, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = train_words(models, archive, tmp_path / "run", "--n-best", 4, "--shard-params", "--cpu-only")
    process = run_words(words, subprocess.PIPE, **flags)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    alone = tmp_path / "alone"
    assert run_train(models, archive, alone, "--n-best", 4) == 0
    one, two = (flatten(read_params(run / "model")) for run in (alone, tmp_path / "run"))
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, atol=2e-3, err_msg=path)


def count_lines(run):
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_as_an_undisturbed_one(models, archive, tmp_path):
    words = ("--steps", 150, "--n-best", 4, "--save-every", 3, "--keep", 1, "--cpu-only")
    words += ("--sample-every", 50, "--sample-count", 1)
    assert run_words(train_words(models, archive, tmp_path / "whole", *words)).wait(600) == 0
    run = tmp_path / "killed"
    command = train_words(models, archive, run, *words)
    rng, steps = np.random.default_rng(0), []
    for _ in range(10):
        process = run_words(command)
        # Some steps later, and a part of the time that a step or a checkpoint takes; or while it starts.
        wanted, delay = count_lines(run) + rng.integers(12), rng.uniform(0, 0.05)
        while process.poll() is None and count_lines(run) < wanted:
            time.sleep(0.002)
        time.sleep(delay)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(count_lines(run))
    assert run_words(command).wait(600) == 0
    assert_equal_weights(tmp_path / "whole" / "model", run / "model")
    assert len({*steps}) > 5, steps  # the moments were many
    whole, killed = ([(line["step"], line["loss"]) for line in read_log(each)] for each in (tmp_path / "whole", run))
    assert killed == whole


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs limits of a process")
@pytest.mark.parametrize("size", [2_000, 60_000])
def test_a_file_that_cannot_be_written_whole_costs_only_steps(size, models, archive, tmp_path):
    """The size of a process's files is limited, so that a checkpoint fails as on a full disk."""
    words = ("--sample-every", 2, "--sample-prompts", PROMPTS[0], "--sample-count", 2, "--n-best", 4)
    command = train_words(models, archive, tmp_path / "run", *words, "--cpu-only")
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    program = f"{limit}; from dm_generations.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    limited = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert limited.returncode == 1
    (line,) = [line for line in limited.stderr.splitlines() if line.startswith("error")]
    assert str(tmp_path / "run") in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "model").exists()
    assert run_words(command).wait(600) == 0
    assert len(read_log(tmp_path / "run")) == 4
    assert load_checkpoint(tmp_path / "run" / "model", "generator").lineage["step"] == 4


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--held-out", 1), ["--held-out"]),
        (("--lora-layers", "q"), ["--lora-layers"]),
        (("--where", "score=99.."), ["score"]),
        (("--weight-by", "rating"), ["rating"]),
        (("--prefer", "pairs", "--objective", "dpo"), ["pair"]),
        (("--learning-rate", "nan"), ["--learning-rate"]),
        (("--learning-rate", "1e30", "--warmup", 0), ["at step", "--learning-rate"]),
        (("--rank-by", "none-such", "--n-best", 2), ["none-such"]),
        (("--codec", "none-such"), ["none-such"]),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_leaves_nothing(words, names, models, archive, tmp_path, capsys):
    assert run_train(models, archive, tmp_path / "run", *words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert all(name in line for name in names)
    assert not (tmp_path / "run" / "model").exists()
