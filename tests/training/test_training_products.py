"""Products in bfloat16: rounded once, summed in float32, and so are their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from dm_generations.models.dalle_mini.network import DalleBart
from training.common import bfloat16_product, dense_in_bfloat16, multiplies_bfloat16
from training.dalle_bart import config_for


def rounded(x):
    """float64 of x rounded to bfloat16."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"), [("flags : fpu amx_bf16 amx_tile\n", True), ("flags : fpu avx2\n", False), (None, False)]
)
def test_of_cpus_those_with_amx_multiply_bfloat16(cpuinfo, expected, monkeypatch):
    def read_text(path, errors):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr("dm_generations.compile_cache.Path.read_text", read_text)
    assert multiplies_bfloat16() is expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert multiplies_bfloat16()


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_product_and_gradients_are_those_of_rounded_matrices():
    rows, kernel, gradient = random(33, 20), random(20, 7), random(33, 7)
    product, gradients_of = jax.vjp(bfloat16_product, rows, kernel)
    of_rows, of_kernel = gradients_of(gradient)
    for found, exact in (
        (product, rounded(rows) @ rounded(kernel)),
        (of_rows, rounded(gradient) @ rounded(kernel).T),
        (of_kernel, rounded(rows).T @ rounded(gradient)),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, atol=2e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_dense_layers_without_bias_alone_are_rounded(use_bias):
    layer, x = nn.Dense(5, use_bias=use_bias), random(2, 3, 16)
    params = layer.init(jax.random.key(0), x)
    exact = layer.apply(params, x)
    with nn.intercept_methods(dense_in_bfloat16):
        found = layer.apply(params, x)
        jax.tree.map(np.testing.assert_array_equal, layer.init(jax.random.key(0), x), params)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    if use_bias:
        np.testing.assert_array_equal(found, exact)
    else:
        expected = rounded(x) @ rounded(params["params"]["kernel"])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (found != exact).any()


def test_scanned_layers_are_rounded_too():
    """As in DALL-E mega's checkpoint."""
    small = {"d_model": 32, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "use_scan": True}
    model = DalleBart(dataclasses.replace(config_for(64, 4, 400), **small))
    text, codes = np.ones((2, 8), np.int32), np.ones((2, 4), np.int32)
    params = model.init(jax.random.key(0), text, text, codes)
    exact = model.apply(params, text, text, codes)
    with nn.intercept_methods(dense_in_bfloat16):
        found = model.apply(params, text, text, codes)
    assert (found != exact).any()
    np.testing.assert_allclose(found, exact, atol=0.01)
