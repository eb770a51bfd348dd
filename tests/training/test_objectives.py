"""Losses against those that the original recorded, and against float64 computations of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import first_fast, golden

from dm_generations.models.base import TrainingLogits
from dm_generations.models.dalle_mini.network import DalleBart, DalleBartConfig
from dm_generations.models.dalle_pytorch import checkpoint
from dm_generations.models.dalle_pytorch.network import DallePytorch
from dm_generations.models.kakao_mindalle.network import KakaoMinDalle, KakaoMinDalleConfig
from dm_generations.training.objectives import (
    TEXT_WEIGHT,
    cross_entropy,
    image_log_probs,
    next_token_loss,
    preference_loss,
)

GOLDEN = golden("dalle_pytorch")
CASES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.glob("*/*/dalle.pt"))


@functools.cache
def has_loss(case):
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        return "loss" in arrays


def source(case):
    return checkpoint.read_generator(GOLDEN / case)


@pytest.mark.parametrize("case", first_fast(filter(has_loss, CASES)))
def test_the_loss_of_dalle_pytorch_is_the_recorded_one(case):
    raw = source(case)
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        text, tokens, loss = (jnp.asarray(arrays[name]) for name in ("text", "image_tokens", "loss"))
    model, params = DallePytorch(raw.config), jax.tree.map(jnp.asarray, raw.params)
    logits = training_logits(model, params, text, jnp.ones_like(text), tokens)
    losses, _ = next_token_loss(logits, tokens, jnp.zeros(len(tokens)), TEXT_WEIGHT)
    np.testing.assert_allclose(losses.mean(), loss, rtol=2e-5)


def training_logits(model, params, *inputs):
    return jax.jit(functools.partial(model.apply, method="training_logits"))({"params": params}, *inputs)


def softmax_nats(logits, targets):
    """Mean nats of targets (B, L) by logits (B, L, V), row by row in float64."""
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    rows, places = np.indices(targets.shape)
    return (log_z - logits[rows, places, targets]).mean(-1)


@pytest.mark.e2e
def test_mindalle_predicts_each_word_and_token_from_those_before():
    config = KakaoMinDalleConfig(
        vocab_size_txt=11, vocab_size_img=13, embed_dim=8, n_layers=1, n_heads=2, ctx_len_img=4, ctx_len_txt=5
    )
    model, rng = KakaoMinDalle(config), np.random.default_rng(0)
    ids, tokens = rng.integers(11, size=(3, 5)), rng.integers(13, size=(3, 4))
    params, apply = jax.jit(model.init)(jax.random.key(0), ids, tokens), jax.jit(model.apply)
    logits = training_logits(model, params["params"], ids, ids, tokens)
    found, nats = next_token_loss(logits, jnp.asarray(tokens), jnp.zeros(3), 0.25)
    # Logits of one position at a time, of a sequence that ends there.
    image = np.stack(
        [apply(params, ids, np.pad(tokens[:, :n], ((0, 0), (0, 4 - n))))[0][:, n] for n in range(4)], axis=1
    )
    np.testing.assert_allclose(nats, softmax_nats(image, tokens), rtol=1e-5)
    text = apply(params, ids, tokens)[1]
    expected = 0.25 * softmax_nats(text, ids[:, 1:]) + 0.75 * softmax_nats(image, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.e2e
def test_dalle_bart_predicts_each_token_from_those_before():
    from tiny import DALLE_BART_CONFIG

    config = DalleBartConfig.from_dict(DALLE_BART_CONFIG)
    model, rng = DalleBart(config), np.random.default_rng(0)
    ids, mask = rng.integers(config.encoder_vocab_size, size=(2, 6)), np.array([[1] * 6, [1] * 3 + [0] * 3])
    tokens = rng.integers(config.codebook_size, size=(2, config.image_length))
    params = jax.jit(model.init)(jax.random.key(0), ids, mask, tokens)
    logits = training_logits(model, params["params"], ids, mask, tokens)
    losses, nats = next_token_loss(logits, jnp.asarray(tokens), jnp.zeros(2), TEXT_WEIGHT)
    inputs = np.concatenate([np.full((2, 1), config.start_token), tokens[:, :-1]], axis=1)
    np.testing.assert_allclose(losses, softmax_nats(jax.jit(model.apply)(params, ids, mask, inputs), tokens), rtol=1e-5)
    np.testing.assert_array_equal(losses, nats)


def test_smoothing_shares_the_target_among_all_tokens():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(5, size=(2, 3))
    shares = np.array([0.0, 0.3])
    probabilities = np.exp(logits.astype(np.float64))
    log_p = np.log(probabilities / probabilities.sum(-1, keepdims=True))
    target = (1 - shares[:, None, None]) * np.eye(5)[targets] + shares[:, None, None] / 5
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(shares[:, None], jnp.float32))
    np.testing.assert_allclose(found, -(target * log_p).sum(-1), rtol=1e-5)


def test_a_preference_costs_less_the_more_the_better_image_gains_on_the_worse():
    rng = np.random.default_rng(0)
    better, worse, old_better, old_worse = rng.normal(size=(4, 6)).astype(np.float32) * 9
    beta = 0.3
    losses, metrics = preference_loss(*map(jnp.asarray, (better, worse, old_better, old_worse)), beta)
    margin = beta * ((better.astype(np.float64) - old_better) - (worse.astype(np.float64) - old_worse))
    np.testing.assert_allclose(losses, np.log1p(np.exp(-margin)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], margin > 0)


def test_the_log_probability_of_an_image_is_that_of_all_its_tokens():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(5, size=(2, 3))
    found = image_log_probs(TrainingLogits(jnp.asarray(logits)), jnp.asarray(tokens))
    np.testing.assert_allclose(found, -3 * softmax_nats(logits, tokens), rtol=1e-5)
