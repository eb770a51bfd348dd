"""Scenes are composed of blocks of tokens and of pixels alike, and captions say what they show."""

import numpy as np
import pytest

from recipes.emoji.captions import COUNTS, to_plural
from recipes.emoji.scenes import (
    CELL,
    GRID,
    GROUNDS,
    LARGE,
    SIZE,
    SMALL,
    Blocks,
    Part,
    Scene,
    SceneSampler,
    compose_pixels,
    compose_tokens,
    find_outside,
    place_alone,
)

GROUND_TOKENS = np.arange(7)
NAMES = (("rocket", "Travel & Places"), ("rose", "Animals & Nature"), ("ok button", "Symbols"))
EMOJI = [
    {"name": name, "group": group, "style": style, "keywords": [], "concept": name}
    for name, group in NAMES
    for style in ("flat", "noto")
]


@pytest.fixture(scope="module")
def blocks():
    """Blocks whose tokens tell emoji, size and cell; the first cell of each is outside."""
    tokens = {
        size: 100 * (1 + np.arange(len(EMOJI)))[:, None, None] + np.arange(size * size).reshape(size, size)
        for size in (LARGE, SMALL)
    }
    outside = {size: np.zeros((len(EMOJI), size, size), bool) for size in tokens}
    for mask in outside.values():
        mask[:, 0, 0] = True
    return Blocks(tokens, outside, GROUND_TOKENS)


def sample_scenes(count=400):
    sampler, rng = SceneSampler(EMOJI), np.random.default_rng(1)
    scenes = [sampler.sample(i % len(EMOJI), rng) for i in range(count)]
    return scenes, [sampler.caption(scene, rng) for scene in scenes]


def test_a_block_lies_at_its_cell_and_the_rest_is_ground(blocks):
    grid = compose_tokens(blocks, Scene((Part(2, SMALL, 3, 4),), 5)).reshape(GRID, GRID)
    assert grid.dtype == np.int32 and grid[3, 4] == 5
    inside = np.zeros((GRID, GRID), bool)
    inside[3 : 3 + SMALL, 4 : 4 + SMALL] = True
    assert (grid[~inside] == 5).all()
    np.testing.assert_array_equal(grid[inside][1:], blocks.tokens[SMALL][2].ravel()[1:])


def test_sampled_scenes_fit_and_no_parts_overlap():
    scenes, _ = sample_scenes()
    for scene in scenes:
        covered = np.zeros((GRID, GRID), int)
        for _, size, top, left in scene.parts:
            assert min(top, left) >= 0 and max(top, left) + size <= GRID
            covered[top : top + size, left : left + size] += 1
        assert covered.max() == 1
    assert {len(scene.parts) for scene in scenes} == {1, 2, 3, 4}
    assert {scene.ground for scene in scenes} == set(range(len(GROUNDS)))
    large = {scene.parts[0][2:] for scene in scenes if scene.parts[0].size == LARGE}
    assert large == {(top, left) for top in range(3) for left in range(3)}
    for scene in scenes:
        if EMOJI[scene.parts[0].emoji]["group"] == "Symbols":
            assert len(scene.parts) == 1 and scene.parts[0].size == LARGE


def test_captions_say_what_scenes_show():
    for scene, caption in zip(*sample_scenes(), strict=True):
        shown = [EMOJI[part.emoji] for part in scene.parts]
        assert len({one["style"] for one in shown}) == 1
        if len({part.emoji for part in scene.parts}) == 1 and len(shown) > 1:
            assert COUNTS[len(shown)] in caption and to_plural(shown[0]["name"]) in caption
        elif len(shown) == 2:
            first, second = (one["name"] for one in shown)
            assert caption.find(first) <= caption.rfind(second) != -1
            assert scene.parts[0].left < scene.parts[1].left
        else:
            assert shown[0]["name"] in caption
        named = [ground for ground in GROUNDS if ground in caption.split() or f"{ground} background" in caption]
        assert named in ([], [list(GROUNDS)[scene.ground]])


def test_a_scene_is_a_function_of_the_seed():
    assert sample_scenes(50) == sample_scenes(50)


def test_other_emoji_stand_at_the_same_places():
    scene = Scene((Part(0, SMALL, 1, 0), Part(1, SMALL, 4, 5)), 3)
    replaced = SceneSampler(EMOJI).replace_emoji(scene, np.random.default_rng(0))
    assert [part[1:] for part in replaced.parts] == [part[1:] for part in scene.parts]
    assert replaced.ground == 3 and replaced != scene


def test_outside_is_what_the_border_reaches():
    image = np.full((1, 16, 16, 3), 255, np.uint8)
    image[0, 4:12, 4:12] = 0
    image[0, 6:10, 6:10] = 255  # a white hole is a part of the emoji
    expected = np.ones((16, 16), bool)
    expected[4:12, 4:12] = False
    np.testing.assert_array_equal(find_outside(image)[0], expected)


def test_pixels_lie_where_the_tokens_do():
    emoji = np.full((1, LARGE * CELL, LARGE * CELL, 3), 255, np.uint8)
    emoji[0, 16:48, 16:48] = (200, 0, 0)
    scene = compose_pixels({LARGE: emoji}, {LARGE: find_outside(emoji)}, Scene((Part(0, LARGE, 0, 2),), 1))
    assert scene.shape == (SIZE, SIZE, 3) and scene.dtype == np.uint8
    blue = GROUNDS["blue"]
    assert tuple(scene[0, 0]) == tuple(scene[-1, -1]) == tuple(scene[8, 24]) == blue
    assert tuple(scene[20, 40]) == (200, 0, 0)
    alone = place_alone(emoji)
    assert alone.shape == (1, SIZE, SIZE, 3) and tuple(alone[0, 30, 30]) == (200, 0, 0) and alone[0, 0, 0, 0] == 255


@pytest.mark.parametrize(
    ("name", "plural"),
    [("apple", "apples"), ("slice of pizza", "slices of pizza"), ("cherry", "cherries"), ("fox", "foxes"),
     ("monkey", "monkeys"), ("torch", "torches")],
)  # fmt: skip
def test_plurals(name, plural):
    assert to_plural(name) == plural
