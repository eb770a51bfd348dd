"""The text model's batches, and what training makes of its unconditional half."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dm_generations import sampling
from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.models.loading import load_checkpoint
from dm_generations.text import PromptTokenizer
from dm_generations.weights import native
from training.captions import train_tokenizer
from training.common import in_float32
from training.dalle_bart import FIRST_COUNT_MORE, LABEL_SMOOTHING, Trainer, config_for

CODES, LENGTH, STEPS, SMOOTHING = 64, 4, 150, 1.0
ROWS = [
    {"style": "flat", "tone": "", "name": name, "group": group, "keywords": []}
    for name, group in (
        *(("rocket", "Travel & Places"), ("castle", "Travel & Places"), ("rose", "Animals & Nature")),
        *(("person", "People & Body"), ("ok button", "Symbols"), ("chequered flag", "Flags")),
    )
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(ROWS, 400, ("<s>", "</s>"), ends_last=False).save(str(folder / "tokenizer.json"))
    return PromptTokenizer(folder)


def new_trainer(tokenizer, batch_size=16, smoothing=SMOOTHING, bfloat16=True):
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = dataclasses.replace(config_for(CODES, LENGTH, 400), **small)
    tokens = np.random.default_rng(0).permutation(CODES)[: len(ROWS) * LENGTH].reshape(len(ROWS), LENGTH)
    args = argparse.Namespace(
        seed=0,
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=1e-2,
        dropped=0.15,
        unconditional_smoothing=smoothing,
        bfloat16=bfloat16,
    )
    return Trainer(DalleBart(config), tokens, ROWS, tokenizer, args)


def train(tokenizer, smoothing):
    """A trainer and the weights that STEPS steps of it give."""
    trainer = new_trainer(tokenizer, smoothing=smoothing)
    state = trainer.init(None)
    for step in range(STEPS):
        state, _ = trainer.step(state, step)
    return trainer, state["params"]


@pytest.fixture(scope="module")
def trained(tokenizer):
    return train(tokenizer, SMOOTHING)


def log_probs(trainer, params, texts):
    """(B, L, codebook) of each text beside the codes of its row of ROWS."""
    ids, mask = trainer.tokenizer.encode(texts, trainer.config.max_text_length)
    return jax.nn.log_softmax(trainer.logits(params, ids, mask, trainer.tokens)[..., :CODES])


def test_rows_without_caption_alone_are_asked_for_all_codes_alike(tokenizer):
    ids, mask, inputs, targets, smoothing = new_trainer(tokenizer, batch_size=256).batch(8)
    is_dropped = mask.sum(1) == 2  # the two ends
    assert 0.05 < is_dropped.mean() < 0.3
    np.testing.assert_array_equal(smoothing, np.where(is_dropped, SMOOTHING, LABEL_SMOOTHING).astype(np.float32))
    assert ids.shape == mask.shape == (256, 32) and inputs.shape == targets.shape == (256, LENGTH)


@pytest.mark.parametrize("batch_size", [4, 16])  # fewer and more than there are
def test_every_picture_is_shown_before_one_is_shown_again(batch_size, tokenizer):
    trainer = new_trainer(tokenizer, batch_size)
    targets = np.concatenate([trainer.batch(step)[3] for step in range(3 * len(ROWS))])
    is_of = (targets[:, None] == trainer.tokens).all(-1)  # (shown, picture)
    assert (is_of.sum(1) == 1).all()
    epochs = is_of.reshape(-1, len(ROWS), len(ROWS))
    assert (epochs.sum(1) == 1).all()
    assert len({tuple(epoch.argmax(1)) for epoch in epochs}) > 2


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    first, again, next_step = (new_trainer(tokenizer).batch(step) for step in (3, 3, 4))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first[3] != next_step[3]).any()


def test_products_are_rounded_where_asked(tokenizer):
    losses = []
    for bfloat16 in (True, False):
        trainer = new_trainer(tokenizer, bfloat16=bfloat16)
        losses.append(float(trainer.step(trainer.init(None), 0)[1]["loss"]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_the_first_codes_count_more(tokenizer):
    trainer = new_trainer(tokenizer, bfloat16=False)
    params = trainer.init(None)["params"]
    params["lm_head"]["kernel"] = 10 * params["lm_head"]["kernel"]  # as they start, all codes are nearly alike
    state = trainer.init(params)
    ids, mask, inputs, targets, smoothing = trainer.batch(0)
    log_p = np.asarray(jax.nn.log_softmax(trainer.logits(state["params"], ids, mask, inputs)))
    chosen = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing[:, None]) * chosen - smoothing[:, None] * log_p.mean(-1)  # (B, 4): two rows of two codes
    weights = 1 + FIRST_COUNT_MORE / np.array([1, 2**0.5, 2, 2**1.5])
    expected = np.average(loss.mean(0), weights=weights)
    assert float(trainer.step(state, 0)[1]["loss"]) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(loss.mean(), rel=1e-3)


def test_without_caption_no_code_is_much_rarer_than_another(tokenizer, trained):
    """Else guidance, which magnifies log p(code | caption) - log p(code), draws codes that are rare in both."""
    trainer, params = trained
    found = log_probs(trainer, params, [None] * len(ROWS))
    low, high = found.min() + np.log(CODES), found.max() + np.log(CODES)
    assert -2 < low and high < 2, f"{low:.2f} to {high:.2f} beside all alike"

    trainer, params = train(tokenizer, LABEL_SMOOTHING)
    assert log_probs(trainer, params, [None] * len(ROWS)).min() < found.min() - 1


def test_at_cond_scale_10_the_right_code_has_nearly_all_the_probability(trained):
    trainer, params = trained
    cond = log_probs(trainer, params, [row["name"] for row in ROWS])
    uncond = log_probs(trainer, params, [None] * len(ROWS))
    flat = [x.reshape(-1, CODES) for x in (cond, uncond)]
    guided = sampling.guide(*flat, jnp.full(len(flat[0]), 10.0))
    found = sampling.log_prob(guided, jnp.asarray(trainer.tokens.reshape(-1)), CODES)
    assert np.exp(found).min() > 0.99


def test_a_model_saved_in_float16_goes_on_in_float32(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    params = jax.device_get(trainer.init(None)["params"])
    native.save(tmp_path, "dalle_bart", dataclasses.asdict(trainer.config), params, np.float16)
    loaded = load_checkpoint(tmp_path, "generator")
    state = trainer.init(in_float32(loaded.params))
    for step in range(10):
        state, metrics = trainer.step(state, step)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {np.dtype("float32")}
    assert np.isfinite(metrics["loss"])
