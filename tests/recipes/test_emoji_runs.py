"""A run that is stopped and resumed equals one that is not, and what it writes loads."""

import argparse
import dataclasses
import importlib
import sys

import jax
import numpy as np
import pytest

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.weights import native
from recipes.emoji import vqgan
from recipes.emoji.__main__ import STEPS
from recipes.emoji.common import open_run
from recipes.emoji.vqgan import Trainer, encode_entropy_constrained, encode_images, reconstruct

pytestmark = pytest.mark.slow

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
    with open_run(folder, initial, save_every=4, args=trainer.args) as run:
        run.train(count, trainer.step, log_every=2)
        return run


def test_a_resumed_run_equals_an_undisturbed_one(trainer, initial, tmp_path):
    whole = train(trainer, initial, tmp_path / "whole", 6)
    train(trainer, initial, tmp_path / "parts", 4)
    resumed = train(trainer, initial, tmp_path / "parts", 6)
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(one, other)
    logged = [line.split(",")[0] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == ['{"step": 2', '{"step": 4', '{"step": 6']


def test_a_run_is_not_resumed_with_other_numbers(trainer, initial, tmp_path):
    train(trainer, initial, tmp_path, 2)
    others = argparse.Namespace(**vars(trainer.args) | {"batch_size": 8, "out": tmp_path})
    with pytest.raises(UserError, match="batch_size 4"):
        open_run(tmp_path, initial, save_every=4, args=others)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_is_not_resumed_in_another_precision(begun, trainer, initial, tmp_path):
    with open_run(tmp_path, initial, save_every=4, args=argparse.Namespace(bfloat16=begun)) as run:
        run.save()
    with pytest.raises(UserError, match=f"bfloat16 {begun}"):
        open_run(tmp_path, initial, save_every=4, args=argparse.Namespace(bfloat16=not begun))


def test_a_trained_model_loads_and_reconstructs_images(trainer, initial, tmp_path):
    run = train(trainer, initial, tmp_path / "run", 4)
    params = jax.device_get(run.state["params"])
    native.save(tmp_path / "model", "vqgan", dataclasses.asdict(CONFIG), params, np.float16)
    loaded = load_checkpoint(tmp_path / "model", "codec")
    assert loaded.config == CONFIG
    images, tokens = reconstruct(trainer.model, loaded.params, np.asarray(trainer.pixels))
    assert images.shape == (40, 8, 8, 3) and images.dtype == np.uint8
    assert tokens.shape == (40, 16) and tokens.max() < 8
    one_batch = vqgan.apply_model(
        trainer.model, loaded.params, np.asarray(trainer.pixels) / np.float32(255), method="encode"
    )[1]
    np.testing.assert_array_equal(tokens, one_batch)  # in order, without the padding of the last batch


def test_an_entropy_weight_lowers_entropy_at_little_cost(trainer, initial, tmp_path):
    params = jax.device_get(train(trainer, initial, tmp_path, 6).state["params"])

    def entropy_and_error(tokens):
        shares = np.bincount(tokens.ravel(), minlength=CONFIG.n_embed) / tokens.size
        outputs = trainer.model.apply({"params": params}, trainer.pixels / 255.0, method="encode_continuous")
        vectors = params["quantize"]["embedding"]["embedding"][tokens]
        error = np.square(np.asarray(outputs).reshape(vectors.shape) - vectors).sum(-1).mean()
        return -(shares[shares > 0] * np.log(shares[shares > 0])).sum(), error

    pixels = np.asarray(trainer.pixels)
    nearest = encode_images(trainer.model, params, pixels)
    np.testing.assert_array_equal(encode_entropy_constrained(trainer.model, params, pixels, 0.0), nearest)
    entropy, error = entropy_and_error(nearest)
    costs = []
    for weight in (0.3, 1.0):
        low_entropy, high_error = entropy_and_error(encode_entropy_constrained(trainer.model, params, pixels, weight))
        assert low_entropy < entropy
        # No tokens cost less, not even the nearest.
        assert high_error + weight * error * low_entropy <= error + weight * error * entropy
        costs.append(high_error)
    assert error < costs[0] <= costs[1]


def test_fine_tuning_does_not_restart_the_codebook(trainer, initial, tmp_path, monkeypatch):
    native.save(tmp_path / "model", "vqgan", dataclasses.asdict(CONFIG), initial["params"], np.float32)
    pixels = np.asarray(trainer.pixels)
    emoji = [{"held_out": i % 4 == 0, "tone": ""} for i in range(len(pixels))]
    monkeypatch.setattr(vqgan, "load_dataset", lambda path: (pixels, emoji))
    monkeypatch.setattr(Trainer, "start_codebook", None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # the devices are set up already
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
