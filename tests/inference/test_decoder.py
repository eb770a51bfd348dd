"""The decoder on the device: exact, compiled once, batch-invariant."""

import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from decode_kit import GOLDEN_CODEC, random_tokens
from helpers import ROOT

from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.models.loading import load_checkpoint


@pytest.fixture(scope="module")
def codec():
    return Decoder.from_checkpoint(load_checkpoint(GOLDEN_CODEC, "codec"), batch_size=4)


def test_decodes_the_golden_tokens(codec):
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        decoded = codec.decode(arrays["tokens"])
        assert decoded.dtype == np.uint8 and decoded.shape == arrays["decoded_uint8"].shape
        assert np.abs(decoded.astype(int) - arrays["decoded_uint8"]).max() <= 1


def test_decoding_is_batch_invariant_and_all_batches_have_one_shape(codec, monkeypatch):
    tokens = random_tokens(4, codec.token_count, codec.codebook_size)
    with jax.transfer_guard("disallow"):  # every copy to or from the device is one that was asked for
        together, alone = codec.decode(tokens), codec.decode(tokens[3:])
    np.testing.assert_array_equal(together[3:], alone)
    shapes, decode_batch = set(), codec.decode_batch
    monkeypatch.setattr(codec, "decode_batch", lambda batch: shapes.add(batch.shape) or decode_batch(batch))
    codec.decode(tokens[:1]), codec.decode(np.concatenate([tokens, tokens[:2]]))
    assert shapes == {(4, codec.token_count)}


def test_pixels_are_truncated_not_rounded(codec):
    """Half of all bytes would be one higher had they been rounded."""
    with np.load(GOLDEN_CODEC / "golden.npz") as arrays:
        scaled = arrays["decoded"].clip(0, 1) * 255
        inside = (scaled % 1 > 0.6) & (scaled % 1 < 0.99)
        np.testing.assert_array_equal(codec.decode(arrays["tokens"])[inside], np.floor(scaled[inside]))


def test_a_token_outside_the_codebook_is_refused(codec):
    tokens = np.full((1, codec.token_count), codec.codebook_size, np.uint16)
    with pytest.raises(UserError, match="outside the codec's codebook"):
        codec.decode(tokens)


def test_more_tokens_than_a_batch_are_decoded_in_parts(codec):
    tokens = random_tokens(10, codec.token_count, codec.codebook_size)
    parts = [codec.decode(tokens[first : first + 4]) for first in (0, 4, 8)]
    np.testing.assert_array_equal(codec.decode(tokens), np.concatenate(parts))
    assert codec.decode(tokens[:0]).shape == (0, codec.image_size, codec.image_size, 3)


@pytest.mark.e2e
@pytest.mark.parametrize(("dtype", "largest", "mean"), [("bfloat16", 40, 4), ("float16", 6, 0.6)])
def test_half_precision_is_near(codec, dtype, largest, mean):
    rounded = Decoder.from_checkpoint(load_checkpoint(GOLDEN_CODEC, "codec"), batch_size=4, dtype=dtype)
    tokens = random_tokens(4, codec.token_count, codec.codebook_size)
    error = np.abs(rounded.decode(tokens).astype(int) - codec.decode(tokens))
    assert error.max() <= largest and error.mean() <= mean, f"{error.max()} {error.mean():.2f}"


def test_auto_takes_what_memory_holds(monkeypatch):
    """An image of the golden codec is small, so a CPU takes many; with next to no memory it takes one."""
    checkpoint = load_checkpoint(GOLDEN_CODEC, "codec")
    assert Decoder.from_checkpoint(checkpoint, "auto").batch_size >= 64
    monkeypatch.setattr("dm_generations.runtime.device.free_bytes", lambda device: 1)
    assert Decoder.from_checkpoint(checkpoint, "auto").batch_size == 1


def failing(codec, monkeypatch, largest: int, when_fetched: bool = False) -> list[int]:
    """Lets batches above `largest` run out of memory, on starting or on waiting; the list grows by those tried."""
    tried, decode_batch = [], codec.decode_batch

    class Failed:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

    def limited(tokens):
        tried.append(len(tokens))
        images = decode_batch(tokens)
        if len(tokens) <= largest:
            return images
        return Failed(images) if when_fetched else Failed(images).block_until_ready()

    monkeypatch.setattr(codec, "decode_batch", limited)
    return tried


@pytest.mark.e2e
@pytest.mark.parametrize("when_fetched", [False, True])
def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch, when_fetched):
    codec = Decoder.from_checkpoint(load_checkpoint(GOLDEN_CODEC, "codec"), batch_size=16)
    tokens = random_tokens(21, codec.token_count, codec.codebook_size)
    expected = codec.decode(tokens)
    tried = failing(codec, monkeypatch, 4, when_fetched)
    np.testing.assert_array_equal(codec.decode(tokens), expected)
    assert codec.batch_size == 4 and max(tried) == 16
    tried.clear()
    np.testing.assert_array_equal(codec.decode(tokens), expected)
    assert tried == [4] * 6  # it stays at this size


def test_an_error_in_one_of_two_concurrent_batches_is_raised(monkeypatch):
    codec = Decoder.from_checkpoint(load_checkpoint(GOLDEN_CODEC, "codec"), batch_size=2)
    tokens = random_tokens(6, codec.token_count, codec.codebook_size)
    expected, decode_batch, calls = codec.decode(tokens), codec.decode_batch, []

    def broken(tokens):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise ValueError("the second batch")
        return decode_batch(tokens)

    monkeypatch.setattr(codec, "decode_batch", broken)
    with pytest.raises(ValueError, match="the second batch"):
        codec.decode(tokens)
    assert threading.current_thread() not in calls
    np.testing.assert_array_equal(codec.decode(tokens), expected)


@pytest.mark.e2e
def test_no_memory_for_one_image_is_an_error(monkeypatch):
    codec = Decoder.from_checkpoint(load_checkpoint(GOLDEN_CODEC, "codec"), batch_size=4)
    failing(codec, monkeypatch, 0)
    with pytest.raises(UserError, match="not enough memory"):
        codec.decode(random_tokens(1, codec.token_count, codec.codebook_size))


@pytest.mark.e2e
def test_several_devices_share_a_batch(codec, tmp_path):
    tokens = random_tokens(11, codec.token_count, codec.codebook_size)
    np.save(tmp_path / "tokens.npy", tokens)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = (str(GOLDEN_CODEC), str(tmp_path / "tokens.npy"), str(tmp_path / "images.npy"))
    subprocess.run(
        [sys.executable, "tests/programs/decode_on_four_devices.py", *arguments], check=True, env=environment, cwd=ROOT
    )
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), codec.decode(tokens))
