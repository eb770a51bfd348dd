"""DalleBart's batches, and what training makes of its unconditional logits."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.sampling import logits as sampling
from dm_generations.weights import native
from recipes.emoji.captions import train_tokenizer
from recipes.emoji.common import to_float32
from recipes.emoji.dalle_bart import FIRST_TOKEN_WEIGHT, LABEL_SMOOTHING, Trainer, make_config

pytestmark = pytest.mark.slow

CODEBOOK_SIZE, LENGTH, STEPS, SMOOTHING = 64, 4, 150, 1.0
EMOJI = [
    {
        "key": name,
        "concept": name,
        "style": "flat",
        "tone": "",
        "held_out": False,
        "name": name,
        "group": group,
        "keywords": [],
    }
    for name, group in (
        *(("rocket", "Travel & Places"), ("castle", "Travel & Places"), ("rose", "Animals & Nature")),
        *(("person", "People & Body"), ("ok button", "Symbols"), ("chequered flag", "Flags")),
    )
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(EMOJI, 400, "<s>", "</s>", special_last=False).save(str(folder / "tokenizer.json"))
    return PromptTokenizer(folder)


def new_trainer(tokenizer, batch_size=16, smoothing=SMOOTHING, bfloat16=True):
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = dataclasses.replace(make_config(CODEBOOK_SIZE, LENGTH, 400), **small)
    tokens = np.random.default_rng(0).permutation(CODEBOOK_SIZE)[: len(EMOJI) * LENGTH].reshape(len(EMOJI), LENGTH)
    args = argparse.Namespace(
        seed=0,
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=1e-2,
        caption_dropout=0.15,
        unconditional_smoothing=smoothing,
        bfloat16=bfloat16,
    )
    return Trainer(DalleBart(config), tokens, EMOJI, tokenizer, args)


def train(tokenizer, smoothing):
    """Train for STEPS steps. Returns the trainer and the parameters."""
    trainer = new_trainer(tokenizer, smoothing=smoothing)
    state = trainer.init(None)
    for step in range(STEPS):
        state, _ = trainer.step(state, step)
    return trainer, state["params"]


@pytest.fixture(scope="module")
def trained(tokenizer):
    return train(tokenizer, SMOOTHING)


def log_probs(trainer, params, texts):
    """Log probabilities (B, L, codebook) of each text, given the tokens of its row of EMOJI."""
    ids, mask = trainer.tokenizer.encode(texts, trainer.config.max_text_length)
    return jax.nn.log_softmax(trainer.logits(params, ids, mask, trainer.tokens)[..., :CODEBOOK_SIZE])


def test_only_rows_without_caption_are_smoothed_strongly(tokenizer):
    ids, mask, inputs, targets, smoothing = new_trainer(tokenizer, batch_size=256).make_batch(8)
    is_dropped = mask.sum(1) == 2  # the two special tokens
    assert 0.05 < is_dropped.mean() < 0.3
    np.testing.assert_array_equal(smoothing, np.where(is_dropped, SMOOTHING, LABEL_SMOOTHING).astype(np.float32))
    assert ids.shape == mask.shape == (256, 32) and inputs.shape == targets.shape == (256, LENGTH)


@pytest.mark.parametrize("batch_size", [4, 16])  # less and more than an epoch
def test_an_epoch_has_every_image_once(batch_size, tokenizer):
    trainer = new_trainer(tokenizer, batch_size)
    targets = np.concatenate([trainer.make_batch(step)[3] for step in range(3 * len(EMOJI))])
    is_of = (targets[:, None] == trainer.tokens).all(-1)  # (row, image)
    assert (is_of.sum(1) == 1).all()
    epochs = is_of.reshape(-1, len(EMOJI), len(EMOJI))
    assert (epochs.sum(1) == 1).all()
    assert len({tuple(epoch.argmax(1)) for epoch in epochs}) > 2


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    first, repeated, next_step = (new_trainer(tokenizer).make_batch(step) for step in (3, 3, 4))
    for one, other in zip(first, repeated, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first[3] != next_step[3]).any()


def test_bfloat16_changes_the_loss_a_little(tokenizer):
    losses = []
    for bfloat16 in (True, False):
        trainer = new_trainer(tokenizer, bfloat16=bfloat16)
        losses.append(float(trainer.step(trainer.init(None), 0)[1]["loss"]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_the_first_tokens_weigh_more(tokenizer):
    trainer = new_trainer(tokenizer, bfloat16=False)
    params = trainer.init(None)["params"]
    params["lm_head"]["kernel"] = 10 * params["lm_head"]["kernel"]  # at the start all tokens have nearly equal logits
    state = trainer.init(params)
    ids, mask, inputs, targets, smoothing = trainer.make_batch(0)
    log_p = np.asarray(jax.nn.log_softmax(trainer.logits(state["params"], ids, mask, inputs)))
    chosen = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing[:, None]) * chosen - smoothing[:, None] * log_p.mean(-1)  # (B, 4): two rows of two tokens
    weights = 1 + FIRST_TOKEN_WEIGHT / np.array([1, 2**0.5, 2, 2**1.5])
    expected = np.average(loss.mean(0), weights=weights)
    assert float(trainer.step(state, 0)[1]["loss"]) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(loss.mean(), rel=1e-3)


def test_without_caption_no_token_is_much_rarer_than_another(tokenizer, trained):
    """Otherwise guidance, which magnifies log p(token | caption) - log p(token), draws tokens that are rare in both."""
    trainer, params = trained
    found = log_probs(trainer, params, [None] * len(EMOJI))
    low, high = found.min() + np.log(CODEBOOK_SIZE), found.max() + np.log(CODEBOOK_SIZE)
    assert low > -2 and high < 2, f"{low:.2f} to {high:.2f} from equal probabilities"

    trainer, params = train(tokenizer, LABEL_SMOOTHING)
    assert log_probs(trainer, params, [None] * len(EMOJI)).min() < found.min() - 1


def test_at_cond_scale_10_the_right_token_has_nearly_all_the_probability(trained):
    trainer, params = trained
    cond = log_probs(trainer, params, [row["name"] for row in EMOJI])
    uncond = log_probs(trainer, params, [None] * len(EMOJI))
    flat = [x.reshape(-1, CODEBOOK_SIZE) for x in (cond, uncond)]
    guided = sampling.guide(*flat, jnp.full(len(flat[0]), 10.0))
    found = sampling.log_prob(guided, jnp.asarray(trainer.tokens.reshape(-1)), CODEBOOK_SIZE)
    assert np.exp(found).min() > 0.99


def test_a_model_saved_in_float16_is_trained_to_float32(tokenizer, tmp_path):
    trainer = new_trainer(tokenizer)
    params = jax.device_get(trainer.init(None)["params"])
    native.save(tmp_path, "dalle_bart", dataclasses.asdict(trainer.config), params, np.float16)
    loaded = load_checkpoint(tmp_path, "generator")
    state = trainer.init(to_float32(loaded.params))
    for step in range(10):
        state, metrics = trainer.step(state, step)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {np.dtype("float32")}
    assert np.isfinite(metrics["loss"])
