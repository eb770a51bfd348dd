"""The diffusion decoder on the device: an image is the same alone, in any batch and on any number of devices."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from decode_kit import random_tokens
from diffusion_kit import TINY, tiny_decoder
from helpers import ROOT
from tiny import CODEBOOK_SIZE, GRID, tiny_vqgan

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder, RowKey
from dm_generations.inference.diffusion import Diffusion, Guidance
from dm_generations.models.loading import load_checkpoint

KEYS = [RowKey(1, 2), RowKey(3, 4, 1), RowKey(5, 6)]
TOKENS = random_tokens(3, GRID**2, CODEBOOK_SIZE)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def codec(models):
    return load_checkpoint(models.vqgan, "codec")


def decoder_of(codec, file, batch_size=1, **options):
    return Decoder.from_checkpoint(codec, batch_size, diffusion=Diffusion.load(file, "3", **options))


@pytest.mark.e2e
def test_an_image_is_the_same_alone_and_in_any_batch(codec, file):
    alone, together = decoder_of(codec, file), decoder_of(codec, file, 4)
    images = alone(TOKENS, KEYS)
    assert images.shape == (3, alone.image_size, alone.image_size, 3) and len(np.unique(images)) > 1
    np.testing.assert_array_equal(together(TOKENS[::-1], KEYS[::-1])[::-1], images)
    # The key, the number of the decoding and the seed of the decoder each give another image.
    for key in (RowKey(1, 3), RowKey(2, 2), RowKey(1, 2, 1)):
        assert (alone(TOKENS[:1], [key]) != images[:1]).any()
    assert (decoder_of(codec, file, seed=1)(TOKENS[:1], KEYS[:1]) != images[:1]).any()


@pytest.mark.e2e
def test_four_devices_give_the_image_of_one(models, codec, file, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    program = ROOT / "tests" / "programs" / "decode_by_diffusion_on_four_devices.py"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = [models.vqgan, file, tmp_path / "tokens.npy", tmp_path / "images.npy"]
    subprocess.run([sys.executable, program, *map(str, paths)], check=True, cwd=ROOT, env=environment, timeout=120)
    keys = [RowKey(number) for number in range(3)]
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), decoder_of(codec, file)(TOKENS, keys))


@pytest.mark.e2e
def test_guidance_goes_towards_the_prompt(models, codec, file):
    clip = load_checkpoint(models.clip, "clip")
    guided = decoder_of(codec, file, guidance=Guidance(clip, 1e3, cutouts=2))
    images = guided(TOKENS[:1], [RowKey(1, 2, prompt="a boat")])
    assert (images != guided(TOKENS[:1], [RowKey(1, 2, prompt="a cat")])).any()
    assert (images != decoder_of(codec, file)(TOKENS[:1], [RowKey(1, 2)])).any()


@pytest.mark.e2e
def test_steps_are_told(codec, file):
    decoder, told = decoder_of(codec, file), []
    decoder.on_step = lambda done, total: told.append((done, total))
    decoder(TOKENS[:1])
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_sixteen_bits(codec, file):
    expected = decoder_of(codec, file)(TOKENS[:1]).astype(int)
    for dtype in ("bfloat16", "float16"):
        decoder = Decoder.from_checkpoint(codec, 1, dtype, diffusion=Diffusion.load(file, "3"))
        found = decoder(TOKENS[:1]).astype(int)
        assert np.abs(found - expected).mean() < 12


def test_a_codec_of_another_width_is_refused(file, tmp_path):
    other = load_checkpoint(tiny_vqgan(tmp_path, embed_dim=8), "codec")
    with pytest.raises(UserError, match="vectors of 4 numbers"):
        decoder_of(other, file)


def test_a_grid_of_another_image_size_is_refused(codec, tmp_path):
    wide = tiny_decoder(tmp_path, dataclasses.replace(TINY, image_size=64))
    with pytest.raises(UserError, match="64"):
        decoder_of(codec, wide)


def test_there_are_no_sheets(codec, file):
    with pytest.raises(UserError, match="seamless"):
        decoder_of(codec, file).tiled(2, 2)
