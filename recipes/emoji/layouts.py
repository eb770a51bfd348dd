"""Which small emoji an image has, and where: one, two to four of a kind, or two different ones.

A small emoji has half of an image's side and stands in one of its quarters, on a plain colour. The first token of such
an image tells the layout and the colour, and replaces the corner of an emoji that is there. It is one of those that
`recipes.emoji.backgrounds` takes. All small emoji have one style, and are things: animals, food, objects, places.

N: emoji   B: images   g: cells a side
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recipes.emoji.data import STYLES, Emoji

LAYOUTS = (  # quarters that have an emoji, row-major
    *((quarter,) for quarter in range(4)),
    *((0, 1), (2, 3), (0, 3), (1, 2)),  # never one below the other: the first one named is at the left, or higher
    *((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)),
    (0, 1, 2, 3),
)
SMALL_STYLE = STYLES.index("3d")
SMALL_GROUPS = {"Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places"}
SHARES = {1: 0.08, 2: 0.78, 3: 0.07, 4: 0.07}  # of images with so many small emoji
PAIR_SHARE = 0.85  # of two small emoji: different ones


class Scene(NamedTuple):
    """Small emoji in an image."""

    layout: int  # index in `LAYOUTS`
    colour: int  # index in `COLOURS`
    emoji: tuple[int, ...]  # one of each quarter of the layout


def list_small(emoji: Sequence[Emoji]) -> np.ndarray:
    """List the emoji that can be small: indices, int (M,)."""
    style = STYLES[SMALL_STYLE]
    return np.flatnonzero([one["style"] == style and one["group"] in SMALL_GROUPS for one in emoji])


def sample_scene(pool: np.ndarray, colours: int, rng: np.random.Generator, first: int | None = None) -> Scene:
    """Sample a scene of emoji from a pool of indices (M,), on one of so many colours; `first` is in it if given."""
    count = int(rng.choice(list(SHARES), p=list(SHARES.values())))
    layout = int(rng.choice([i for i, quarters in enumerate(LAYOUTS) if len(quarters) == count]))
    one = int(rng.choice(pool)) if first is None else first
    emoji = [one] * count
    if count == 2 and rng.random() < PAIR_SHARE:
        emoji[1] = int(rng.choice(pool[pool != one]))
        rng.shuffle(emoji)
    return Scene(layout, int(rng.integers(colours)), tuple(emoji))


def list_quarters(scenes: Sequence[Scene]) -> np.ndarray:
    """List the emoji of all quarters of scenes: indices, int (B, 4), -1 where there is none."""
    quarters = np.full((len(scenes), 4), -1)
    for row, scene in zip(quarters, scenes, strict=True):
        row[list(LAYOUTS[scene.layout])] = scene.emoji
    return quarters


def join_quarters(quarters: np.ndarray) -> np.ndarray:
    """Join quarters, (B, 4, h, w, ...) and row-major, to images (B, 2 h, 2 w, ...)."""
    count, _, height, width, *rest = quarters.shape
    rows = quarters.reshape(count, 2, 2, height, width, *rest).swapaxes(2, 3)
    return rows.reshape(count, 2 * height, 2 * width, *rest)
