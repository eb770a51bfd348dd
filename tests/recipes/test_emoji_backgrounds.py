"""Emoji stand on backgrounds and in layouts, of tokens and of pixels alike, and captions say which."""

import dataclasses

import numpy as np
import pytest

from recipes.emoji.backgrounds import (
    BACKGROUNDS,
    COLOURS,
    VIEWS,
    Tokens,
    draw_backgrounds,
    draw_scenes,
    find_backgrounds,
    find_outside,
    place_backgrounds,
)
from recipes.emoji.captions import MENTIONED_SHARE, caption_scene, mention_background, pluralise
from recipes.emoji.data import STYLES
from recipes.emoji.layouts import LAYOUTS, PAIR_SHARE, SHARES, SMALL_STYLE, Scene, list_small, sample_scene

CELLS, COUNT = 8, len(STYLES)
BACKGROUND_TOKENS = np.arange(len(STYLES) * len(BACKGROUNDS)).reshape(len(STYLES), -1)
LAYOUT_TOKENS = 100 + np.arange(len(COLOURS) * len(LAYOUTS)).reshape(len(COLOURS), -1)
SUNSET = next(
    i for i, background in enumerate(BACKGROUNDS) if background.name == "at sunset" and background.horizon == 5
)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def tokens():
    """Tokens that tell emoji and cell; the first column of each is outside."""
    emoji = 1000 * (1 + np.arange(COUNT))[:, None, None] + np.arange(CELLS**2).reshape(CELLS, CELLS)
    outside = np.zeros(emoji.shape, bool)
    outside[:, :, 0] = True
    half = CELLS // 2
    return Tokens(
        emoji=emoji,
        outside=outside,
        small=500 + emoji[:, :half, :half],
        small_outside=outside[:, :half, :half],
        styles=np.arange(COUNT),
        backgrounds=BACKGROUND_TOKENS,
        layouts=LAYOUT_TOKENS,
    )


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
    np.testing.assert_array_equal(chosen.small, tokens.small[1:])
    assert chosen.outside.shape == chosen.emoji.shape and chosen.styles.tolist() == [1, 2]
    assert chosen.backgrounds is BACKGROUND_TOKENS


def test_each_view_has_several_horizons():
    assert {background.name for background in BACKGROUNDS} == {*COLOURS, *VIEWS}
    for view, (upper, lower) in VIEWS.items():
        variants = [background for background in BACKGROUNDS if background.name == view]
        assert len({background.horizon for background in variants}) == len(variants) > 1
        assert all((background.upper, background.lower) == (upper, lower) for background in variants)


def test_small_emoji_are_in_the_quarters_of_the_layout(tokens):
    pair, three = tokens.compose_scenes(
        [Scene(LAYOUTS.index((1, 2)), 3, (2, 0)), Scene(LAYOUTS.index((0, 1, 3)), 0, (1, 1, 1))]
    )
    plain = BACKGROUND_TOKENS[SMALL_STYLE, 3]
    grid = pair.reshape(CELLS, CELLS)
    assert pair.dtype == np.int32 and grid[0, 0] == LAYOUT_TOKENS[3, LAYOUTS.index((1, 2))]
    np.testing.assert_array_equal(grid[:4, 5:], tokens.small[2][:, 1:])
    np.testing.assert_array_equal(grid[4:, 1:4], tokens.small[0][:, 1:])
    assert (grid[1:4, :4] == plain).all() and (grid[4:, 4:] == plain).all() and (grid[:, [0, 4]][1:] == plain).all()
    grid = three.reshape(CELLS, CELLS)
    for top, left in ((0, 0), (0, 4), (4, 4)):
        np.testing.assert_array_equal(grid[top : top + 4, left + 1 : left + 4], tokens.small[1][:, 1:])
    assert (grid[4:, :4] == BACKGROUND_TOKENS[SMALL_STYLE, 0]).all()


def test_the_least_used_rows_of_a_codebook_are_backgrounds_and_layouts_and_found_again():
    rng = np.random.default_rng(0)
    codebook, used = rng.normal(size=(300, 8)).astype(np.float32), rng.permutation(300)
    placed = place_backgrounds(codebook, used)
    found = find_backgrounds(placed.astype(np.float16))
    assert found is not None
    backgrounds, layouts = found
    assert (backgrounds.shape, layouts.shape) == (BACKGROUND_TOKENS.shape, LAYOUT_TOKENS.shape)
    assert set(used[backgrounds].ravel()) == set(range(backgrounds.size))
    taken = np.concatenate([backgrounds.ravel(), layouts.ravel()])
    assert set(used[taken]) == set(range(taken.size))
    others = np.setdiff1d(np.arange(300), taken)
    np.testing.assert_array_equal(placed[others], codebook[others])
    assert (np.linalg.norm(placed[taken], axis=-1) > np.linalg.norm(codebook, axis=1).max()).all()
    colours = [placed[backgrounds[:, i]] for i in range(len(COLOURS))]
    assert len(np.unique(np.concatenate(colours), axis=0)) == len(COLOURS)  # one look of each, in all styles
    pink = list(COLOURS).index("pink")
    np.testing.assert_array_equal(placed[backgrounds[:, SUNSET]], placed[backgrounds[:, pink]])
    directions = [unit(placed[each]) for each in (layouts[pink], backgrounds[:, pink])]
    np.testing.assert_allclose(directions[0], np.broadcast_to(directions[1][:1], directions[0].shape), atol=1e-6)
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


def test_pixels_of_a_scene_are_small_emoji_on_its_colour():
    emoji = np.full((2, 64, 64, 3), 255, np.uint8)
    emoji[0, 16:48, 16:48], emoji[1, 16:48, 16:48] = (200, 0, 0), (0, 0, 200)
    (image,) = draw_scenes(emoji, [Scene(LAYOUTS.index((1, 2)), list(COLOURS).index("blue"), (0, 1))])
    assert image.dtype == np.uint8 and image.shape == emoji[0].shape
    assert tuple(image[16, 48]) == (200, 0, 0) and tuple(image[48, 16]) == (0, 0, 200)
    assert {tuple(image[y, x]) for y, x in ((16, 16), (48, 48), (2, 34), (34, 2))} == {COLOURS["blue"]}


def test_scenes_are_of_all_kinds_and_have_the_emoji_asked_for():
    rng = np.random.default_rng(0)
    pool = np.array([2, 5, 7])
    scenes = [sample_scene(pool, len(COLOURS), rng, first=5) for _ in range(400)]
    assert {scene.layout for scene in scenes} == set(range(len(LAYOUTS)))
    assert {scene.colour for scene in scenes} == set(range(len(COLOURS)))
    assert all(5 in scene.emoji and len(scene.emoji) == len(LAYOUTS[scene.layout]) for scene in scenes)
    pairs = [scene for scene in scenes if len(set(scene.emoji)) > 1]
    assert {scene.emoji for scene in pairs} == {(5, 2), (2, 5), (5, 7), (7, 5)}
    assert len(pairs) / len(scenes) == pytest.approx(PAIR_SHARE * SHARES[2], abs=0.08)


def test_only_things_of_one_style_are_small():
    emoji = [
        {"style": style, "group": group}
        for style, group in (("3d", "Objects"), ("flat", "Objects"), ("3d", "Flags"), ("3d", "Food & Drink"))
    ]
    assert list_small(emoji).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("name", "plural"),
    [("apple", "apples"), ("strawberry", "strawberries"), ("fox", "foxes"), ("key", "keys"), ("glass", "glasses")],
)
def test_captions_of_small_emoji_tell_their_number(name, plural):
    rng = np.random.default_rng(0)
    one, other = ({"key": word, "name": word, "keywords": []} for word in (name, "cat"))
    assert pluralise(name) == plural
    for count, words in {1: "small tiny little", 2: "two 2 pair", 3: "three 3", 4: "four 4"}.items():
        captions = {caption_scene([one] * count, rng) for _ in range(200)}
        assert all(set(caption.split()) & set(words.split()) for caption in captions)
        assert any(caption.endswith(f" {plural if count > 1 else name}") for caption in captions)
    pairs = {caption_scene([one, other], rng) for _ in range(200)}
    assert all(caption.index(name) < caption.index("cat") for caption in pairs)
    assert f"a {name} next to a cat" in pairs


@pytest.mark.parametrize("background", [*COLOURS, *VIEWS])
def test_some_captions_name_the_background(background):
    rng = np.random.default_rng(0)
    captions = [mention_background("a rocket on a white background", background, rng) for _ in range(400)]
    named = [caption for caption, is_named in captions if is_named]
    assert {caption for caption, is_named in captions if not is_named} == {"a rocket"}
    assert len(named) / len(captions) == pytest.approx(MENTIONED_SHARE, abs=0.08)
    assert all("a rocket" in caption and background in caption for caption in named)
    assert all("white" not in caption for caption in named if background != "white")
