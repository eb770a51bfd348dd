"""DalleBart's batches and its loss, and what it learns."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from dm_generations.models.dalle_mini.network import DalleBart
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer
from dm_generations.weights import native
from recipes.emoji.captions import train_tokenizer
from recipes.emoji.common import to_float32
from recipes.emoji.dalle_bart import (
    FIRST_TOKEN_WEIGHT,
    LABEL_SMOOTHING,
    Trainer,
    enlarge_grid,
    make_config,
    weigh_tokens,
)
from recipes.emoji.scenes import GRID, LARGE, SMALL, Blocks, Part, Scene, SceneSampler, compose_tokens

pytestmark = pytest.mark.slow

CODEBOOK_SIZE, STEPS, SMOOTHING = 64, 300, 0.3
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


def new_trainer(tokenizer, batch_size=16, bfloat16=True, is_composed=True, alone_grid=LARGE):
    grid = GRID if is_composed else alone_grid
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = dataclasses.replace(make_config(CODEBOOK_SIZE, grid**2, 400), **small)
    # An emoji has one token of its own in all cells; tokens up to 6 are grounds.
    tokens = {
        size: np.broadcast_to(10 + np.arange(len(EMOJI))[:, None, None], (len(EMOJI), size, size))
        for size in ((LARGE, SMALL) if is_composed else (grid,))
    }
    blocks = Blocks(tokens, {size: np.zeros(each.shape, bool) for size, each in tokens.items()}, np.arange(7), grid)
    args = argparse.Namespace(
        seed=0,
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=1e-2,
        caption_dropout=0.15,
        unconditional_smoothing=SMOOTHING,
        bfloat16=bfloat16,
    )
    return Trainer(DalleBart(config), blocks, SceneSampler(EMOJI, None if is_composed else grid), tokenizer, args)


def test_only_rows_without_caption_are_smoothed_and_learn_other_emoji(tokenizer):
    ids, mask, inputs, targets, weights, smoothing = new_trainer(tokenizer, batch_size=256).make_batch(8)
    is_dropped = mask.sum(1) == 2  # the two special tokens
    assert 0.05 < is_dropped.mean() < 0.3
    np.testing.assert_array_equal(smoothing, np.where(is_dropped, SMOOTHING, LABEL_SMOOTHING).astype(np.float32))
    assert ids.shape == mask.shape == (256, 32)
    assert inputs.shape == targets.shape == weights.shape == (256, GRID**2)
    is_emoji = targets >= 10
    same = (inputs == targets).mean(1, where=is_emoji)
    assert same[~is_dropped].mean() > 0.7 and same[is_dropped].mean() < 0.4
    assert (inputs == targets).mean(where=~is_emoji) > 0.7  # the places are the same


@pytest.mark.parametrize("batch_size", [4, 16])  # less and more than an epoch
def test_an_epoch_has_every_image_once(batch_size, tokenizer):
    trainer = new_trainer(tokenizer, batch_size)
    chosen = np.concatenate([trainer.choose_images(step) for step in range(3 * len(EMOJI))]).reshape(-1, len(EMOJI))
    assert (np.sort(chosen, axis=1) == np.arange(len(EMOJI))).all()
    assert len({tuple(epoch) for epoch in chosen}) > 2


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


@pytest.mark.parametrize("grid", [LARGE, 16])
def test_emoji_alone_fill_the_image(grid, tokenizer):
    _, mask, inputs, targets, weights, _ = new_trainer(tokenizer, is_composed=False, alone_grid=grid).make_batch(8)
    assert inputs.shape == targets.shape == weights.shape == (16, grid**2)
    named = targets[mask.sum(1) > 2]
    assert (named >= 10).all() and (named == named[:, :1]).all()  # the tokens of one emoji, and no ground


def test_the_loss_weighs_tokens_by_their_place(tokenizer):
    trainer = new_trainer(tokenizer, bfloat16=False)
    params = trainer.init(None)["params"]
    params["lm_head"]["kernel"] = 10 * params["lm_head"]["kernel"]  # at the start all tokens have nearly equal logits
    state = trainer.init(params)
    ids, mask, inputs, targets, weights, smoothing = trainer.make_batch(0)
    log_p = np.asarray(jax.nn.log_softmax(trainer.logits(state["params"], ids, mask, inputs)))
    chosen = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing[:, None]) * chosen - smoothing[:, None] * log_p.mean(-1)
    assert float(trainer.step(state, 0)[1]["loss"]) == pytest.approx((loss * weights).mean(), rel=1e-4)


def test_the_first_tokens_of_a_block_weigh_most():
    (weights,) = weigh_tokens([Scene((Part(0, LARGE, 1, 2),))], GRID).reshape(-1, GRID, GRID)
    assert weights.mean() == pytest.approx(1)
    ratios = weights / weights[0, 0]
    assert ratios[1, 2] == pytest.approx(1 + FIRST_TOKEN_WEIGHT)
    assert ratios[2, 2] == pytest.approx(1 + FIRST_TOKEN_WEIGHT / 2)  # halved with each row of eight
    assert (ratios[9] == 1).all() and (ratios[:, :2] == 1).all()


def test_a_model_of_a_smaller_grid_starts_in_the_middle():
    config = make_config(CODEBOOK_SIZE, 64, 400)
    old = np.arange(64, dtype=np.float32)[:, None] * np.ones(config.d_model, np.float32)
    enlarged, params = enlarge_grid(config, {"model": {"decoder": {"embed_positions": {"embedding": old}}}}, GRID)
    rows = params["model"]["decoder"]["embed_positions"]["embedding"][:, 0].reshape(GRID, GRID)
    assert enlarged.image_length == GRID**2
    np.testing.assert_array_equal(rows[1:9, 1:9], np.arange(64).reshape(8, 8))
    assert (rows[0, 0], rows[0, 1], rows[9, 9]) == (0, 0, 63)


def test_captions_tell_the_emoji(tokenizer):
    trainer = new_trainer(tokenizer)
    state = trainer.init(None)
    for step in range(STEPS):
        state, _ = trainer.step(state, step)
    scenes = [Scene((Part(i, LARGE, 1, 1),)) for i in range(len(EMOJI))]
    tokens = np.stack([compose_tokens(trainer.blocks, scene) for scene in scenes])
    first = GRID + 1  # the first token of an emoji; the others repeat it

    def log_p(texts):
        ids, mask = trainer.encode_text(texts, trainer.config.max_text_length)
        logits = trainer.logits(state["params"], ids, mask, tokens)
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(EMOJI)), first, tokens[:, first]]

    named = log_p([row["name"] for row in EMOJI])
    assert named.mean() > log_p([""] * len(EMOJI)).mean() + 1


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
