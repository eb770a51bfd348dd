"""Emoji stand on backgrounds, of tokens and of pixels alike, and captions say which."""

import dataclasses

import numpy as np
import pytest

from recipes.emoji.backgrounds import (
    BACKGROUNDS,
    COLOURS,
    VIEWS,
    Tokens,
    draw_backgrounds,
    find_backgrounds,
    find_outside,
    place_backgrounds,
)
from recipes.emoji.captions import MENTIONED_SHARE, mention_background
from recipes.emoji.data import STYLES

CELLS, COUNT = 8, len(STYLES)
BACKGROUND_TOKENS = np.arange(len(STYLES) * len(BACKGROUNDS)).reshape(len(STYLES), -1)
SUNSET = next(
    i for i, background in enumerate(BACKGROUNDS) if background.name == "at sunset" and background.horizon == 5
)


@pytest.fixture(scope="module")
def tokens():
    """Tokens that tell emoji and cell; the first column of each is outside."""
    emoji = 1000 * (1 + np.arange(COUNT))[:, None, None] + np.arange(CELLS**2).reshape(CELLS, CELLS)
    outside = np.zeros(emoji.shape, bool)
    outside[:, :, 0] = True
    return Tokens(emoji, outside, np.arange(COUNT), BACKGROUND_TOKENS)


@pytest.mark.parametrize("index", range(COUNT))
def test_the_outside_has_the_token_of_the_background_and_the_style(index, tokens):
    (row,) = tokens.compose(np.array([index]), np.array([3]))
    grid = row.reshape(CELLS, CELLS)
    assert row.dtype == np.int32 and (grid[:, 0] == BACKGROUND_TOKENS[index, 3]).all()
    np.testing.assert_array_equal(grid[:, 1:], tokens.emoji[index][:, 1:])


def test_below_the_horizon_is_the_plain_background_of_the_lower_colour(tokens):
    (row,) = tokens.compose(np.array([1]), np.array([SUNSET]))
    lower = BACKGROUND_TOKENS[1, list(COLOURS).index("yellow")]
    assert row.reshape(CELLS, CELLS)[:, 0].tolist() == [BACKGROUND_TOKENS[1, SUNSET]] * 5 + [lower] * 3


def test_a_codec_without_backgrounds_has_emoji_as_they_are(tokens):
    alone = dataclasses.replace(tokens, backgrounds=None)
    np.testing.assert_array_equal(alone.compose(np.array([2]), np.array([3]))[0], tokens.emoji[2].ravel())


def test_tokens_of_some_emoji(tokens):
    chosen = tokens.choose(np.array([False, True, True]))
    np.testing.assert_array_equal(chosen.emoji, tokens.emoji[1:])
    assert chosen.outside.shape == chosen.emoji.shape and chosen.styles.tolist() == [1, 2]
    assert chosen.backgrounds is BACKGROUND_TOKENS


def test_each_view_has_several_horizons():
    assert {background.name for background in BACKGROUNDS} == {*COLOURS, *VIEWS}
    for view, (upper, lower) in VIEWS.items():
        variants = [background for background in BACKGROUNDS if background.name == view]
        assert len({background.horizon for background in variants}) == len(variants) > 1
        assert all((background.upper, background.lower) == (upper, lower) for background in variants)


def test_the_least_used_rows_of_a_codebook_are_backgrounds_and_found_again():
    rng = np.random.default_rng(0)
    codebook, used = rng.normal(size=(300, 8)).astype(np.float32), rng.permutation(300)
    placed = place_backgrounds(codebook, used)
    tokens = find_backgrounds(placed.astype(np.float16))
    assert tokens is not None and tokens.shape == BACKGROUND_TOKENS.shape
    assert set(used[tokens].ravel()) == set(range(tokens.size))
    others = np.setdiff1d(np.arange(300), tokens)
    np.testing.assert_array_equal(placed[others], codebook[others])
    assert (np.linalg.norm(placed[tokens], axis=-1) > np.linalg.norm(codebook, axis=1).max()).all()
    colours = [placed[tokens[:, i]] for i in range(len(COLOURS))]
    assert len(np.unique(np.concatenate(colours), axis=0)) == len(COLOURS)  # one look of each, in all styles
    pink = list(COLOURS).index("pink")
    np.testing.assert_array_equal(placed[tokens[:, SUNSET]], placed[tokens[:, pink]])
    assert find_backgrounds(codebook) is None


def test_outside_is_what_the_border_reaches():
    image = np.full((1, 16, 16, 3), 255, np.uint8)
    image[0, 4:12, 4:12] = 0
    image[0, 6:10, 6:10] = 255  # a white hole is a part of the emoji
    expected = np.ones((16, 16), bool)
    expected[4:12, 4:12] = False
    np.testing.assert_array_equal(find_outside(image)[0], expected)


def test_pixels_have_the_colours_of_the_background():
    emoji = np.full((2, 64, 64, 3), 255, np.uint8)
    emoji[:, 16:48, 16:48] = (200, 0, 0)
    plain, sunset = draw_backgrounds(emoji, np.array([list(COLOURS).index("blue"), SUNSET]))
    assert plain.dtype == np.uint8 and plain.shape == emoji[0].shape
    assert tuple(plain[0, 0]) == tuple(plain[-1, -1]) == COLOURS["blue"] and tuple(plain[32, 32]) == (200, 0, 0)
    assert tuple(sunset[39, 0]) == COLOURS["pink"] and tuple(sunset[40, 0]) == COLOURS["yellow"]


@pytest.mark.parametrize("background", [*COLOURS, *VIEWS])
def test_some_captions_name_the_background(background):
    rng = np.random.default_rng(0)
    captions = [mention_background("a rocket on a white background", background, rng) for _ in range(400)]
    named = [caption for caption, is_named in captions if is_named]
    assert {caption for caption, is_named in captions if not is_named} == {"a rocket"}
    assert len(named) / len(captions) == pytest.approx(MENTIONED_SHARE, abs=0.08)
    assert all("a rocket" in caption and background in caption for caption in named)
    assert all("white" not in caption for caption in named if background != "white")
