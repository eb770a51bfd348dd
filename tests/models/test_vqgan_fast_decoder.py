"""The fast decoder against the network as it is written, in all its variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_kit import compiled, random_params
from helpers import first_of, golden

from dm_generations.models.loading import load_checkpoint
from dm_generations.models.vqgan import fast_decoder
from dm_generations.models.vqgan.fast_decoder import VQGANDecoder
from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from dm_generations.weights.native import unflatten

CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=16,
    z_channels=32,
    n_embed=50,
    embed_dim=6,
)
VARIANTS = {
    "vqgan-jax": CONFIG,
    "signed": dataclasses.replace(CONFIG, is_signed=True),
    "gumbel": dataclasses.replace(CONFIG, is_gumbel=True),
    "resampled without convolution": dataclasses.replace(CONFIG, resamp_with_conv=False),
    "one level": dataclasses.replace(CONFIG, ch_mult=(2,), resolution=8, attn_resolutions=(8,)),
    "few groups": dataclasses.replace(CONFIG, num_groups=4, group_norm_eps=1e-3),
}


def params_of(config):
    return unflatten(random_params("vqgan", config))


def tokens_of(config, count, side=None):
    return np.random.default_rng(1).integers(config.n_embed, size=(count, (side or config.grid) ** 2), dtype=np.int32)


def exact(config, params, tokens):
    return compiled(VQGAN(config), "decode_code")(params, tokens)


def fast(config, params, tokens, dtype="float32", platform="cpu"):
    decoder = VQGANDecoder(config, np.dtype(dtype), platform)
    return jax.jit(decoder.decode)(decoder.prepare_params(params), tokens)


@pytest.fixture(params=first_of(["winograd", "elsewhere"]))
def platform(request, monkeypatch):
    """The networks of these tests are too small for Winograd's convolutions as they are."""
    if request.param == "winograd":
        monkeypatch.setattr(fast_decoder, "WINOGRAD_CH", 1)
    return "gpu" if request.param == "elsewhere" else "cpu"


@pytest.mark.e2e
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_network(config, platform):
    params, tokens = params_of(config), tokens_of(config, 3)
    expected, found = exact(config, params, tokens), fast(config, params, tokens, platform=platform)
    assert found.shape == expected.shape and found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.e2e
def test_decodes_other_grids(platform):
    params, tokens = params_of(CONFIG), tokens_of(CONFIG, 2, side=5)
    expected, found = exact(CONFIG, params, tokens), fast(CONFIG, params, tokens, platform=platform)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.e2e
def test_decodes_the_golden_tokens(platform):
    file = sorted(golden("vqgan_jax").glob("*/golden.npz"))[0]
    checkpoint = load_checkpoint(file.parent, "codec")
    with np.load(file) as arrays:
        pixels = fast(checkpoint.config, checkpoint.params, arrays["tokens"].astype(np.int32), platform=platform)
        assert np.abs(pixels - arrays["decoded"]).max() < 5e-5


@pytest.mark.e2e
def test_images_do_not_depend_on_the_batch(monkeypatch):
    """On a CPU: bit for bit, so that a run with another batch size writes the same files."""
    monkeypatch.setattr(fast_decoder, "WINOGRAD_CH", 1)
    tokens = tokens_of(CONFIG, 3)
    decoder = VQGANDecoder(CONFIG, np.dtype("float32"), "cpu")
    weights, decode = decoder.prepare_params(params_of(CONFIG)), jax.jit(decoder.decode)
    alone = [decode(weights, tokens[i : i + 1]) for i in range(3)]
    np.testing.assert_array_equal(decode(weights, tokens), np.concatenate(alone))


@pytest.mark.e2e
@pytest.mark.parametrize(("dtype", "tolerance"), first_of([("bfloat16", 0.06), ("float16", 0.008)]))
def test_half_precision_stays_near(dtype, tolerance, platform):
    params, tokens = params_of(CONFIG), tokens_of(CONFIG, 2)
    expected, found = exact(CONFIG, params, tokens), fast(CONFIG, params, tokens, dtype, platform)
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.e2e
def test_weights_of_half_precision_are_read(platform):
    """Files often hold float16; what is computed is computed in float32."""
    params, tokens = params_of(CONFIG), tokens_of(CONFIG, 2)
    halved = jax.tree.map(lambda leaf: leaf.astype(np.float16), params)
    expected = exact(CONFIG, jax.tree.map(lambda leaf: leaf.astype(np.float32), halved), tokens)
    assert np.abs(fast(CONFIG, halved, tokens, platform=platform) - expected).max() < 2e-5 * np.abs(expected).max()


def test_tokens_that_fill_no_square_are_refused():
    with pytest.raises(ValueError, match="6 tokens do not fill a square"):
        fast(CONFIG, params_of(CONFIG), np.zeros((1, 6), np.int32))


def test_the_order_in_memory_rounds_nothing_differently(platform):
    """Files of PyTorch have other axes than ours: their arrays are views, and BLAS adds up such matrices otherwise."""
    config = dataclasses.replace(CONFIG, z_channels=256, embed_dim=256, n_embed=1)  # sums of one row show it everywhere
    params = params_of(config)
    layouts = (params, jax.tree.map(np.asfortranarray, params))
    decoder = VQGANDecoder(config, np.dtype("float32"), platform)
    jax.tree.map(np.testing.assert_array_equal, *map(decoder.prepare_params, layouts))
