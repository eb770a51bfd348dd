"""`train --decoder`: its loss, runs that are stopped, and what it writes decodes."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_kit import random_params
from decode_kit import read_images
from diffusion_kit import TINY
from PIL import Image
from tiny import IMAGE_SIZE, tiny_vqgan
from training_kit import read_log, write_archive

from dm_generations.cli import main
from dm_generations.errors import UserError
from dm_generations.inference.diffusion import Diffusion, DiffusionDecoder
from dm_generations.models.diffusion_decoder.network import UNet
from dm_generations.models.loading import load_checkpoint
from dm_generations.training.decoder import DecoderTrainer, hybrid_loss
from dm_generations.weights.native import flatten, read_params, unflatten

# Quick to compile: of 4x4 tokens it makes 2 pixels a side.
CONFIG = {"image_size": 2, "num_channels": 32, "num_res_blocks": 1, "emb_output_dims": 32, "attention_levels": []}
COUNT = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, pixels in enumerate(np.random.default_rng(0).integers(256, size=(COUNT, 9, 9, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def train(models, images, config):
    def train(run, *flags, source=images, status=0):
        words = ["train", source, "--decoder", "--run", run, "--codec", models.vqgan, "--config", config]
        words += ["--steps", 4, "--batch-size", 4, "--save-every", 2, "--log-every", 1, "--held-out", 0.3]
        assert main([str(word) for word in (*words, *flags)]) == status
        return run

    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("train") / "whole")


def cosine_share(step: int, count: int) -> float:
    """Share of the image in the variance after a step of the cosine schedule, from its definition."""

    def remaining(place: float) -> float:
        return math.cos((place / count + 0.008) / 1.008 * math.pi / 2) ** 2

    share = 1.0
    for place in range(step + 1):
        share *= 1 - min(1 - remaining(place + 1) / remaining(place), 0.999)
    return share


def bits_of(image, x, noise_found, variance, step: int, count: int) -> float:
    """The variational bound of one image at one step, in bits a value, pixel by pixel in Python's float64."""
    now, then = cosine_share(step, count), cosine_share(step - 1, count) if step else 1.0
    beta = 1 - now / then
    first = (
        (1 - cosine_share(0, count))
        / (1 - cosine_share(1, count))
        * (1 - cosine_share(1, count) / cosine_share(0, count))
    )
    smallest = math.log(first if step == 0 else beta * (1 - then) / (1 - now))
    total = 0.0
    for true, noisy, eps, value in zip(
        *(np.float64(each).ravel() for each in (image, x, noise_found, variance)), strict=True
    ):
        predicted = (noisy - math.sqrt(1 - now) * eps) / math.sqrt(now)
        weights = beta * math.sqrt(then) / (1 - now), (1 - then) * math.sqrt(1 - beta) / (1 - now)
        mean, wanted = (weights[0] * each + weights[1] * noisy for each in (predicted, true))
        log_variance = smallest + (value + 1) / 2 * (math.log(beta) - smallest)
        if step:
            ratio = math.exp(smallest - log_variance)
            total += 0.5 * (ratio - 1 - math.log(ratio) + (wanted - mean) ** 2 / math.exp(log_variance))
            continue
        below, above = (
            0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            for z in ((true - mean + side / 255) / math.exp(log_variance / 2) for side in (-1, 1))
        )
        probability = above if true < -0.999 else 1 - below if true > 0.999 else above - below
        total -= math.log(max(probability, 1e-12))
    return total / image.size / math.log(2)


@pytest.mark.e2e
def test_the_loss_is_that_of_a_computation_in_float64():
    config = dataclasses.replace(TINY, noise_schedule="cosine", diffusion_steps=50)
    params = random_params("diffusion_decoder", config, 0)
    rng = np.random.default_rng(1)
    steps = np.array([0, 1, 20, 49], np.int32)
    images = rng.integers(256, size=(4, 4, 4, 3)) / 127.5 - 1
    noise = rng.standard_normal(images.shape)
    vectors = rng.standard_normal((4, 4, 4, config.emb_input_dims)).astype(np.float32)

    @jax.jit
    def network(x, times):
        return UNet(config).apply({"params": unflatten(params)}, x, times, vectors)

    found = jax.jit(lambda *rows: hybrid_loss(network, config, *rows))(jnp.float32(images), steps, jnp.float32(noise))
    shares = np.array([cosine_share(step, 50) for step in steps])[:, None, None, None]
    x = np.sqrt(shares) * images + np.sqrt(1 - shares) * noise
    predicted = np.float64(network(jnp.float32(x), jnp.float32(steps * (1000 / 50))))
    mse = ((noise - predicted[..., :3]) ** 2).mean((1, 2, 3))
    bits = [bits_of(images[i], x[i], predicted[i, ..., :3], predicted[i, ..., 3:], int(steps[i]), 50) for i in range(4)]
    np.testing.assert_allclose(found["mse"], mse, rtol=1e-4)
    np.testing.assert_allclose(found["vb"], np.array(bits) * 50 / 1000, rtol=1e-3)
    np.testing.assert_allclose(found["loss"], found["mse"] + found["vb"], rtol=1e-6)


def test_only_the_variance_lowers_the_bound():
    """And without a learned variance there is none."""
    rng = np.random.default_rng(2)
    images, noise, output = (jnp.float32(rng.standard_normal((2, 2, 2, width))) for width in (3, 3, 6))
    steps = jnp.array([0, 700])

    def loss_of(name, config):
        return jax.jit(
            jax.grad(lambda output: hybrid_loss(lambda x, times: output, config, images, steps, noise)[name].sum())
        )

    bound = np.array(loss_of("vb", TINY)(output))
    assert not bound[..., :3].any() and np.abs(bound[..., 3:]).min() > 0
    fixed = dataclasses.replace(TINY, learn_sigma=False)
    np.testing.assert_array_equal(loss_of("loss", fixed)(output[..., :3]), loss_of("mse", TINY)(output)[..., :3])


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(train, whole, tmp_path, monkeypatch):
    step = DecoderTrainer.step

    def stop_at_3(self, state, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, state, number)

    monkeypatch.setattr(DecoderTrainer, "step", stop_at_3)
    with pytest.raises(AssertionError):
        train(tmp_path / "run")
    monkeypatch.setattr(DecoderTrainer, "step", step)
    train(tmp_path / "run")
    one, two = (flatten(read_params(folder / "model")) for folder in (whole, tmp_path / "run"))
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[path], path)
    losses = [[line["loss"] for line in read_log(run)] for run in (whole, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.e2e
def test_what_it_writes_decodes_the_tokens_of_its_codec(models, whole, tmp_path):
    archive = write_archive(tmp_path / "a.db", models, count=2)
    words = ["decode", archive, "--decoder", whole / "model", "--decoder-steps", "2"]
    words += ["--codec", whole / "model", "--out-dir", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    assert {image.shape for image in read_images(tmp_path / "out").values()} == {(2, 2, 3)}
    diffusion = Diffusion.load(whole / "model", "2")
    assert diffusion.checkpoint.lineage["step"] == 4 and diffusion.checkpoint.config.image_size == CONFIG["image_size"]
    other = load_checkpoint(tiny_vqgan(tmp_path / "other", seed=5), "codec")
    with pytest.raises(UserError, match=diffusion.checkpoint.lineage["codec"][:8]):
        DiffusionDecoder(other, diffusion, 1)


@pytest.mark.slow
def test_it_goes_on_from_a_decoder_on_the_images_of_an_archive(train, models, tmp_path):
    """With an average that forgets all but the last weights."""
    path = tmp_path / "eight.json"
    path.write_text(json.dumps(CONFIG | {"image_size": IMAGE_SIZE}))
    archive = write_archive(tmp_path / "a.db", models, count=8)
    run = train(tmp_path / "run", "--config", path, "--ema", 0, "--steps", 2, source=archive)
    assert "held_out_loss" in read_log(run)[-1]
    state = flatten(read_params(run / "model"))
    again = ["train", archive, "--decoder", "--run", tmp_path / "again", "--codec", models.vqgan]
    again += ["--model", run / "model", "--steps", 1, "--batch-size", 4, "--learning-rate", 0]
    assert main([str(word) for word in again]) == 0
    moved = flatten(read_params(tmp_path / "again" / "model"))
    for name, leaf in state.items():
        np.testing.assert_allclose(leaf, moved[name], rtol=1e-6, err_msg=name)
    lineage = load_checkpoint(tmp_path / "again" / "model", "decoder").lineage
    assert lineage["base"]["lineage"]["step"] == 2


def test_options_that_do_nothing_are_refused(train, tmp_path, capsys):
    for flags in (("--lora-rank", 4), ("--sample-every", 1), ("--objective", "dpo")):
        train(tmp_path / "run", *flags, status=1)
        assert flags[0] in capsys.readouterr().err
    assert main(["train", "a.db", "--run", str(tmp_path / "run"), "--ema", "0.5"]) == 1
    assert "--ema" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"level_channels": [32, 32]}, "image_size"),
        ({"kind": "vqgan"}, "kind"),
        ({"emb_input_dims": 7}, "7"),
        ({"num_channels": 30}, "30"),
        ({"image_size": "big"}, "image_size"),
        ({"num_channels": "wide"}, "num_channels"),
    ],
)
def test_a_config_that_does_not_suit_the_codec_is_refused(train, values, named, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(CONFIG | values))
    train(tmp_path / "run", "--config", path, status=1)
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_an_archive_of_images_of_another_size_is_refused(train, models, tmp_path, capsys):
    archive = write_archive(tmp_path / "a.db", models, count=2)
    train(tmp_path / "run", source=archive, status=1)
    assert str(archive) in capsys.readouterr().err


@pytest.mark.e2e
def test_images_that_cannot_be_read_are_left_out(train, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    train(tmp_path / "run", source=folder, status=1)
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pairs").exists()
