"""A run that is stopped and resumed gives what an undisturbed one gives, and what it writes loads."""

import argparse
import dataclasses
import importlib
import sys

import jax
import numpy as np
import pytest

from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights import native
from training import data, vqgan
from training.__main__ import STEPS
from training.common import Run
from training.vqgan import Trainer, encode, encode_frugally, reconstruct

CONFIG = VQGANConfig(
    ch=4,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=8,
    z_channels=4,
    n_embed=8,
    embed_dim=4,
    num_groups=2,
)


@pytest.fixture(scope="module")
def trainer():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    args = argparse.Namespace(seed=0, steps=6, continuous_steps=2, batch_size=4, learning_rate=1e-3)
    return Trainer(CONFIG, pixels, np.ones(40), args)


@pytest.fixture(scope="module")
def initial(trainer):
    return jax.device_get(trainer.init(None))


def train(trainer, initial, folder, count):
    run = Run(folder, initial, save_every=4, args=trainer.args)
    run.loop(count, trainer.step, log_every=2)
    return run


def test_resumed_run_equals_an_undisturbed_one(trainer, initial, tmp_path):
    whole = train(trainer, initial, tmp_path / "whole", 6)
    train(trainer, initial, tmp_path / "parts", 4)
    resumed = train(trainer, initial, tmp_path / "parts", 6)
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(one, other)
    logged = [line.split(",")[0] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == ['{"step": 2', '{"step": 4', '{"step": 6']


def test_run_is_not_resumed_with_other_numbers(trainer, initial, tmp_path):
    train(trainer, initial, tmp_path, 2)
    others = argparse.Namespace(**vars(trainer.args) | {"batch_size": 8, "out": tmp_path})
    with pytest.raises(SystemExit, match="was begun with --batch-size 4: do so again, or give another --run"):
        Run(tmp_path, initial, save_every=4, args=others)


@pytest.mark.parametrize(("begun", "flag"), [(True, "--bfloat16"), (False, "--no-bfloat16")])
def test_run_is_not_resumed_in_another_precision(begun, flag, trainer, initial, tmp_path):
    Run(tmp_path, initial, save_every=4, args=argparse.Namespace(bfloat16=begun)).save()
    with pytest.raises(SystemExit, match=f"was begun with {flag}: do so again"):
        Run(tmp_path, initial, save_every=4, args=argparse.Namespace(bfloat16=not begun))


def test_trained_model_loads_and_rebuilds_pictures(trainer, initial, tmp_path):
    run = train(trainer, initial, tmp_path / "run", 4)
    params = jax.device_get(run.state["params"])
    native.save(tmp_path / "model", "vqgan", dataclasses.asdict(CONFIG), params, np.float16)
    loaded = load_checkpoint(tmp_path / "model", "codec")
    assert loaded.config == CONFIG
    pictures, tokens = reconstruct(trainer.model, loaded.params, np.asarray(trainer.pixels))
    assert pictures.shape == (40, 8, 8, 3) and pictures.dtype == np.uint8
    assert tokens.shape == (40, 16) and tokens.max() < 8
    one_batch = trainer.apply(loaded.params, np.asarray(trainer.pixels) / np.float32(255), method="encode")[1]
    np.testing.assert_array_equal(tokens, one_batch)  # in order, and none of the rows that fill the last batch up


def test_thrift_makes_codes_common_at_little_cost(trainer, initial, tmp_path):
    params = jax.device_get(train(trainer, initial, tmp_path, 6).state["params"])

    def entropy_and_error(tokens):
        shares = np.bincount(tokens.ravel(), minlength=CONFIG.n_embed) / tokens.size
        outputs = trainer.model.apply({"params": params}, trainer.pixels / 255.0, method="encode_continuous")
        codes = params["quantize"]["embedding"]["embedding"][tokens]
        error = np.square(np.asarray(outputs).reshape(codes.shape) - codes).sum(-1).mean()
        return -(shares[shares > 0] * np.log(shares[shares > 0])).sum(), error

    pixels = np.asarray(trainer.pixels)
    nearest = encode(trainer.model, params, pixels)
    np.testing.assert_array_equal(encode_frugally(trainer.model, params, pixels, 0.0), nearest)
    entropy, error = entropy_and_error(nearest)
    costs = []
    for thrift in (0.3, 1.0):
        frugal_entropy, frugal_error = entropy_and_error(encode_frugally(trainer.model, params, pixels, thrift))
        assert frugal_entropy < entropy
        # No choice of codes costs less: the nearest do not either.
        assert frugal_error + thrift * error * frugal_entropy <= error + thrift * error * entropy
        costs.append(frugal_error)
    assert error < costs[0] <= costs[1]


def test_fine_tuning_goes_on_from_the_codebook(trainer, initial, tmp_path, monkeypatch):
    native.save(tmp_path / "model", "vqgan", dataclasses.asdict(CONFIG), initial["params"], np.float32)
    pixels = np.asarray(trainer.pixels)
    rows = [{"held_out": i % 4 == 0, "tone": False} for i in range(len(pixels))]
    monkeypatch.setattr(data, "load", lambda path: (pixels, rows))
    monkeypatch.setattr(Trainer, "start_codebook", None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # of devices, which are there already
    words = f"vqgan --init {tmp_path / 'model'} --run {tmp_path / 'run'} --out {tmp_path / 'out'} --steps 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--batch-size", "4"])
    vqgan.main()
    assert load_checkpoint(tmp_path / "out", "codec").config == CONFIG


def test_every_part_of_the_recipe_knows_its_flags(monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for module, *arguments in STEPS:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
