"""The optimiser, and products in bfloat16: rounded once, summed in float32, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn

from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.training.optimizers import MUON_RMS
from recipes.emoji.common import bfloat16_matmul, has_bfloat16_units, make_optimizer, use_bfloat16_dense
from recipes.emoji.dalle_bart import make_config

pytestmark = pytest.mark.slow


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_hidden_kernels_move_alike_in_every_direction_and_the_rest_by_adam():
    shapes = {
        "conv": (3, 3, 8, 12),
        "dense": (16, 8),
        "embed_tokens": (32, 8),
        "lm_head": (8, 32),
        "conv_in": (3, 3, 3, 16),
        "bias": (8,),
    }
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    grads = {name: {"kernel": random(*shape)} for name, shape in shapes.items()}
    optimizer = make_optimizer(learning_rate=1.0, steps=10, warmup=0, weight_decay=0.0, adam_share=0.7)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for name in ("conv", "dense"):
        matrix = np.asarray(updates[name]["kernel"]).reshape(-1, shapes[name][-1])
        values = np.linalg.svd(matrix, compute_uv=False) / (MUON_RMS * max(matrix.shape) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.3
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.7, b2=0.98, nesterov=True))
    expected, _ = adam.update(grads, adam.init(params), params)
    for name in ("embed_tokens", "lm_head", "conv_in", "bias"):
        np.testing.assert_allclose(updates[name]["kernel"], expected[name]["kernel"], rtol=1e-4)


def round_to_bfloat16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"), [("flags : fpu amx_bf16 amx_tile\n", True), ("flags : fpu avx2\n", False), (None, False)]
)
def test_of_cpus_only_those_with_amx_have_bfloat16_units(cpuinfo, expected, monkeypatch):
    def read_text(path, errors):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr("recipes.emoji.common.Path.read_text", read_text)
    assert has_bfloat16_units() is expected
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert has_bfloat16_units()


def test_product_and_gradients_are_those_of_rounded_matrices():
    rows, kernel, gradient = random(33, 20), random(20, 7), random(33, 7)
    product, gradients_of = jax.vjp(bfloat16_matmul, rows, kernel)
    of_rows, of_kernel = gradients_of(gradient)
    for found, exact in (
        (product, round_to_bfloat16(rows) @ round_to_bfloat16(kernel)),
        (of_rows, round_to_bfloat16(gradient) @ round_to_bfloat16(kernel).T),
        (of_kernel, round_to_bfloat16(rows).T @ round_to_bfloat16(gradient)),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, atol=2e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_only_dense_layers_without_bias_are_rounded(use_bias):
    layer, x = nn.Dense(5, use_bias=use_bias), random(2, 3, 16)
    params = layer.init(jax.random.key(0), x)
    exact = layer.apply(params, x)
    with nn.intercept_methods(use_bfloat16_dense):
        found = layer.apply(params, x)
        jax.tree.map(np.testing.assert_array_equal, layer.init(jax.random.key(0), x), params)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    if use_bias:
        np.testing.assert_array_equal(found, exact)
    else:
        expected = round_to_bfloat16(x) @ round_to_bfloat16(params["params"]["kernel"])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (found != exact).any()


def test_scanned_layers_are_rounded_too():
    """As in DALL-E mega's checkpoint."""
    small = {"d_model": 32, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "use_scan": True}
    model = DalleBart(dataclasses.replace(make_config(64, 4, 400), **small))
    text, tokens = np.ones((2, 8), np.int32), np.ones((2, 4), np.int32)
    params = model.init(jax.random.key(0), text, text, tokens)
    exact = model.apply(params, text, text, tokens)
    with nn.intercept_methods(use_bfloat16_dense):
        found = model.apply(params, text, text, tokens)
    assert (found != exact).any()
    np.testing.assert_allclose(found, exact, atol=0.01)
