"""A run that is stopped and resumed equals one that is not, and what it writes loads."""

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dm_generations.errors import UserError
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights import native
from recipes.emoji import background_decoder, vqgan
from recipes.emoji.__main__ import STEPS
from recipes.emoji.backgrounds import find_backgrounds
from recipes.emoji.common import open_run
from recipes.emoji.vqgan import Trainer, reconstruct

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


def test_a_decoder_learns_backgrounds_and_tokens_keep_their_meaning(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, ch_mult=(1, 1, 1, 2), resolution=64, n_embed=256)
    model = VQGAN(config)
    params = jax.device_get(model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))["params"])
    rng = np.random.default_rng(0)
    pixels = np.full((70, 64, 64, 3), 255, np.uint8)
    pixels[:, 16:48, 16:48] = rng.integers(0, 256, (70, 1, 1, 3))
    outputs = vqgan.apply_model(model, params, pixels[:8] / np.float32(255), method="encode_continuous")
    codebook = rng.permutation(np.asarray(outputs).reshape(-1, config.embed_dim))[: config.n_embed]
    params = vqgan.replace_codebook(params, codebook)
    native.save(tmp_path / "model", "vqgan", dataclasses.asdict(config), params, np.float32)
    emoji = [
        {"name": f"thing {i}", "group": "Objects", "style": "3d", "keywords": [], "tone": "", "held_out": i >= 6}
        for i in range(len(pixels))
    ]
    monkeypatch.setattr(background_decoder, "load_dataset", lambda path, with_tones: (pixels, emoji))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # the devices are set up already
    words = (
        f"background_decoder --init {tmp_path / 'model'} --run {tmp_path / 'run'} --out {tmp_path / 'out'} --steps 2"
    )
    monkeypatch.setattr(sys, "argv", [*words.split(), "--batch-size", "4"])
    background_decoder.main()
    made = load_checkpoint(tmp_path / "out", "codec")
    assert made.config == config
    same = {
        name: all(
            np.allclose(one, other, atol=1e-2)
            for one, other in zip(jax.tree.leaves(made.params[name]), jax.tree.leaves(value), strict=True)
        )
        for name, value in params.items()
    }
    assert same["encoder"] and not same["quantize"]
    before, after = (vqgan.encode_images(model, each, pixels) for each in (params, made.params))
    codebooks = [np.asarray(vqgan.get_codebook(each)) for each in (params, made.params)]
    assert find_backgrounds(codebooks[0]) is None
    changed = np.flatnonzero((np.abs(codebooks[0] - codebooks[1]) > 1e-2).any(1))
    taken = np.concatenate([tokens.ravel() for tokens in find_backgrounds(codebooks[1])])
    np.testing.assert_array_equal(changed, np.sort(taken))
    assert not np.isin(after, changed).any()
    assert (before == after)[~np.isin(before, changed)].mean() > 0.7  # weights in float16 round


def test_every_part_of_the_recipe_knows_its_flags(monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    readme = (Path(__file__).parents[2] / "recipes" / "emoji" / "README.md").read_text().replace("\\\n", " ")
    told = [words.split() for words in re.findall(r"^    python -m (recipes\.emoji\.\w+ .*)$", readme, re.MULTILINE)]
    assert len(told) >= 3
    for module, *arguments in [*STEPS, *told]:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
