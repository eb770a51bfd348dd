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
from recipes.emoji.backgrounds import BACKGROUNDS, COLOURS, HORIZONS, Tokens
from recipes.emoji.captions import train_tokenizer
from recipes.emoji.common import to_float32
from recipes.emoji.dalle_bart import (
    FIRST_TOKEN_WEIGHT,
    LABEL_SMOOTHING,
    Trainer,
    make_config,
    weigh_tokens,
)
from recipes.emoji.data import STYLES
from recipes.emoji.layouts import LAYOUTS

pytestmark = pytest.mark.slow

CODEBOOK_SIZE, STEPS, SMOOTHING, GRID = 192, 300, 0.3, 8
BACKGROUND_TOKENS = np.arange(len(STYLES) * len(BACKGROUNDS)).reshape(len(STYLES), -1)
LAYOUT_TOKENS = 90 + np.arange(len(COLOURS) * len(LAYOUTS)).reshape(len(COLOURS), -1)
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


def new_trainer(tokenizer, batch_size=16, bfloat16=True, has_backgrounds=True, has_layouts=False, grid=GRID):
    smaller = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = dataclasses.replace(make_config(CODEBOOK_SIZE, grid**2, 400), **smaller)
    # An emoji has one token of its own in all cells but the first column; tokens before are backgrounds.
    emoji = np.broadcast_to(BACKGROUND_TOKENS.size + np.arange(len(EMOJI))[:, None, None], (len(EMOJI), grid, grid))
    outside = np.zeros(emoji.shape, bool)
    outside[:, :, 0] = True
    emoji_list = [one | {"style": "3d"} for one in EMOJI] if has_layouts else EMOJI
    styles = np.array([STYLES.index(one["style"]) for one in emoji_list])
    half = grid // 2
    tokens = Tokens(
        emoji=emoji,
        outside=outside,
        small=emoji[:, :half, :half],
        small_outside=outside[:, :half, :half],
        styles=styles,
        backgrounds=BACKGROUND_TOKENS if has_backgrounds else None,
        layouts=LAYOUT_TOKENS if has_layouts else None,
    )
    args = argparse.Namespace(
        seed=0,
        steps=STEPS,
        batch_size=batch_size,
        learning_rate=1e-2,
        caption_dropout=0.15,
        unconditional_smoothing=SMOOTHING,
        bfloat16=bfloat16,
    )
    return Trainer(DalleBart(config), tokens, emoji_list, tokenizer, args)


def test_only_rows_without_caption_are_smoothed_and_not_their_first_token(tokenizer):
    ids, mask, inputs, targets, first, smoothing = new_trainer(tokenizer, batch_size=256).make_batch(8)
    is_dropped = mask.sum(1) == 2  # the two special tokens
    assert 0.05 < is_dropped.mean() < 0.3
    assert ids.shape == mask.shape == (256, 32) and inputs.shape == targets.shape == (256, GRID**2)
    np.testing.assert_array_equal(smoothing, np.where(is_dropped, SMOOTHING, LABEL_SMOOTHING).astype(np.float32))
    assert first.shape == (256, CODEBOOK_SIZE + 1)
    np.testing.assert_allclose(first.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(first.min(1), LABEL_SMOOTHING / first.shape[1], rtol=1e-3)


def test_the_first_token_is_read_right_and_may_be_all_that_the_caption_leaves_open(tokenizer):
    _, mask, inputs, targets, first, _ = new_trainer(tokenizer, batch_size=256).make_batch(0)
    np.testing.assert_array_equal(inputs[:, 0], targets[:, 0])
    assert 0.7 < (inputs == targets).mean() < 1
    style, background = np.divmod(targets[:, 0], len(BACKGROUNDS))
    assert (style == STYLES.index("flat")).all() and len(set(background)) > 20
    possible = first > 2 * first.min(1, keepdims=True)
    assert possible[np.arange(256), targets[:, 0]].all()
    counts = possible.sum(1)
    assert set(counts) == {1, len(HORIZONS), len(BACKGROUNDS)}  # a colour, a view, or nothing is named
    assert (counts[mask.sum(1) == 2] == len(BACKGROUNDS)).all()


def test_first_tokens_of_a_caption(tokenizer):
    trainer = new_trainer(tokenizer)
    concept, style = EMOJI[0]["concept"], STYLES.index(EMOJI[0]["style"])
    others = [i for i in range(len(STYLES)) if i != style][:1]
    trainer.styles_of_concept[concept] = [style, *others]
    white = [i for i, background in enumerate(BACKGROUNDS) if background.name == "white"]
    both = BACKGROUND_TOKENS[[style, *others]]
    for text, named, expected in (
        ("rocket", None, both),
        (f"rocket, {STYLES[style]}", None, BACKGROUND_TOKENS[style]),
        ("rocket on white", white[0], both[:, white]),
    ):
        assert sorted(trainer.list_first_tokens(0, text, named)) == sorted(expected.ravel())
    trainer.tokens.outside[0, 0, 0] = False  # an emoji that fills the corner begins with its own token
    assert trainer.list_first_tokens(0, "rocket", None).tolist() == [trainer.tokens.emoji[0, 0, 0]]


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


@pytest.mark.parametrize("grid", [GRID, 16])
def test_a_codec_without_backgrounds_has_emoji_as_they_are(grid, tokenizer):
    _, _, inputs, targets, first, _ = new_trainer(tokenizer, has_backgrounds=False, grid=grid).make_batch(8)
    assert inputs.shape == targets.shape == (16, grid**2)
    np.testing.assert_array_equal(first.argmax(1), targets[:, 0])
    assert (targets >= BACKGROUND_TOKENS.size).all() and (targets == targets[:, :1]).all()


def test_some_images_are_scenes_and_their_first_tokens_are_level(tokenizer, monkeypatch):
    trainer = new_trainer(tokenizer, batch_size=64, has_layouts=True)
    encode, texts = trainer.encode_text, []
    monkeypatch.setattr(trainer, "encode_text", lambda given, length: texts.extend(given) or encode(given, length))
    counts = {"small": 1, "two": 2, "three": 3, "four": 4}
    seen = set()
    for step in range(8):
        texts.clear()
        _, _, _, targets, first, _ = trainer.make_batch(step)
        is_scene = np.isin(targets[:, 0], LAYOUT_TOKENS)
        assert 0.15 < is_scene.mean() < 0.55
        for row in np.flatnonzero(is_scene):
            likely = np.flatnonzero(first[row] > first[row].min() * 2)
            colour, layout = (int(i[0]) for i in np.nonzero(targets[row, 0] == LAYOUT_TOKENS))
            count = len(LAYOUTS[layout])
            is_named = list(COLOURS)[colour] in texts[row].split()
            open_colours = [colour] if is_named else range(len(COLOURS))
            alike = [i for i, quarters in enumerate(LAYOUTS) if len(quarters) == count]
            np.testing.assert_array_equal(likely, np.sort(LAYOUT_TOKENS[np.ix_(open_colours, alike)].ravel()))
            assert np.ptp(first[row, likely]) < 1e-6
            for word in set(texts[row].split()) & set(counts):
                assert counts[word] == count
                seen.add(word)
    assert seen == set(counts)


def test_the_loss_weighs_tokens_by_their_place(tokenizer):
    trainer = new_trainer(tokenizer, bfloat16=False)
    params = trainer.init(None)["params"]
    params["lm_head"]["kernel"] = 10 * params["lm_head"]["kernel"]  # at the start all tokens have nearly equal logits
    state = trainer.init(params)
    ids, mask, inputs, targets, first, smoothing = trainer.make_batch(0)
    log_p = np.asarray(jax.nn.log_softmax(trainer.logits(state["params"], ids, mask, inputs)))
    chosen = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing[:, None]) * chosen - smoothing[:, None] * log_p.mean(-1)
    loss[:, 0] = -(first * log_p[:, 0]).sum(-1)
    assert float(trainer.step(state, 0)[1]["loss"]) == pytest.approx((loss * weigh_tokens(GRID)).mean(), rel=1e-4)


def test_the_first_tokens_weigh_most():
    weights = weigh_tokens(GRID)
    assert weights.mean() == pytest.approx(1)
    assert weights[0] / weights[-1] == pytest.approx(1 + FIRST_TOKEN_WEIGHT, rel=0.05)
    assert (np.diff(weights) < 0).all()
    extra = weights / weights[-1] - 1
    assert extra[GRID] / extra[0] == pytest.approx(0.5, abs=0.01)  # halved with each row


def test_captions_tell_the_emoji(tokenizer):
    trainer = new_trainer(tokenizer)
    state = trainer.init(None)
    for step in range(STEPS):
        state, _ = trainer.step(state, step)
    tokens = trainer.tokens.compose(np.arange(len(EMOJI)), np.zeros(len(EMOJI), int))
    first = 1  # the first token of an emoji; the others repeat it

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
