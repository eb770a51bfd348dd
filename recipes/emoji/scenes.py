"""Compose scenes of emoji from blocks of tokens: moved, small, counted, in pairs, on coloured grounds.

A scene is 10x10 tokens, 80 px a side. An emoji is a block of its tokens: 8x8, as the codec encodes it alone, or 5x5, of
its image at 40 px. A block is put wherever it fits, and the plain cells around an emoji take the token of the ground.
So scenes are made of tokens, by seed and step: none is rendered, encoded or stored. Seven tokens that no emoji uses are
the grounds; `recipes.emoji.scene_decoder` teaches the codec to draw them, and emoji on them.

N: emoji   B: scenes   L: tokens of a scene, row-major   S: pixels a side
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from recipes.emoji.captions import caption_count, caption_pair, mention_ground, sample_caption
from recipes.emoji.data import Emoji
from recipes.emoji.vqgan import encode_images

GRID = 10  # tokens a side of a scene
CELL = 8  # pixels a side of a token
SIZE = GRID * CELL
LARGE, SMALL = 8, 5  # tokens a side of a block
GROUNDS = {
    "white": (255, 255, 255),
    "blue": (150, 205, 255),
    "green": (165, 225, 155),
    "yellow": (255, 230, 125),
    "pink": (255, 190, 215),
    "purple": (205, 180, 255),
    "black": (45, 45, 50),
}
COUNTS_SHARE, PAIRS_SHARE, SMALL_SHARE = 0.08, 0.14, 0.08  # of scenes; the others have one large emoji
COLOURED_SHARE = 0.45  # of scenes, on a ground that is not white
NOT_COMPOSED = {"People & Body", "Symbols", "Flags"}  # groups that are not counted and not in pairs
PLAIN = 250  # levels: an outside pixel has at least this in all channels


class Blocks(NamedTuple):
    """The tokens of all emoji, at both sizes, and which of their cells are outside of the emoji."""

    tokens: dict[int, np.ndarray]  # by size: int32 (N, size, size)
    outside: dict[int, np.ndarray]  # by size: bool (N, size, size)
    grounds: np.ndarray  # (7,), token of each ground
    grid: int = GRID  # tokens a side of a scene

    def choose(self, chosen: np.ndarray) -> "Blocks":
        """Choose some of the emoji, by a mask (N,)."""
        tokens, outside = ({k: rows[chosen] for k, rows in part.items()} for part in (self.tokens, self.outside))
        return self._replace(tokens=tokens, outside=outside)


class Part(NamedTuple):
    """A block in a scene."""

    emoji: int  # index
    size: int  # tokens a side
    top: int  # cell
    left: int


class Scene(NamedTuple):
    """What a scene shows."""

    parts: tuple[Part, ...]
    ground: int = 0  # index in GROUNDS


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Scale images, uint8 (N, 64, 64, 3), to the size of a small block, uint8 (N, 40, 40, 3)."""
    side = SMALL * CELL
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.LANCZOS)) for one in pixels])


def find_outside(pixels: np.ndarray) -> np.ndarray:
    """Find the plain pixels of images, uint8 (N, S, S, 3), that are connected with the border: bool (N, S, S)."""
    plain: np.ndarray = np.all(pixels >= PLAIN, axis=-1)
    outside = plain.copy()
    outside[:, 1:-1, 1:-1] = False
    while True:
        grown: np.ndarray = outside.copy()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= plain
        if (grown == outside).all():
            return outside
        outside = grown


def encode_blocks(config: VQGANConfig, params: Any, pixels: np.ndarray) -> Blocks:
    """Encode emoji, uint8 (N, 64, 64, 3), to blocks of both sizes."""
    scene_codec = VQGAN(dataclasses.replace(config, resolution=SIZE))
    canvas = np.full((len(pixels), SIZE, SIZE, 3), 255, np.uint8)
    start, side = 2 * CELL, SMALL * CELL
    canvas[:, start : start + side, start : start + side] = small = shrink(pixels)
    small_tokens = encode_images(scene_codec, params, canvas).reshape(-1, GRID, GRID)
    alone = VQGAN(dataclasses.replace(config, resolution=LARGE * CELL))
    tokens = {
        LARGE: encode_images(alone, params, pixels).reshape(-1, LARGE, LARGE),
        SMALL: small_tokens[:, 2 : 2 + SMALL, 2 : 2 + SMALL],
    }
    outside = {
        size: np.all(find_outside(images).reshape(-1, size, CELL, size, CELL), axis=(2, 4))
        for size, images in ((LARGE, pixels), (SMALL, small))
    }
    used = sum(np.bincount(tokens[size][~outside[size]], minlength=config.codebook_size) for size in tokens)
    return Blocks(tokens, outside, np.sort(np.argsort(used, kind="stable")[: len(GROUNDS)]))


def encode_alone(config: VQGANConfig, params: Any, pixels: np.ndarray) -> Blocks:
    """Encode emoji, uint8 (N, S, S, 3) of any size, to blocks that fill an image: nothing is outside of them."""
    size = config.grid
    tokens = encode_images(VQGAN(config), params, pixels).reshape(-1, size, size)
    return Blocks({size: tokens}, {size: np.zeros(tokens.shape, bool)}, np.zeros(1, int), size)


def compose_tokens(blocks: Blocks, scene: Scene) -> np.ndarray:
    """Compose the tokens of a scene, int32 (L,)."""
    ground = blocks.grounds[scene.ground]
    grid = np.full((blocks.grid, blocks.grid), ground, np.int32)
    for index, size, top, left in scene.parts:
        block = np.where(blocks.outside[size][index], ground, blocks.tokens[size][index])
        grid[top : top + size, left : left + size] = block
    return grid.ravel()


def compose_pixels(images: dict[int, np.ndarray], outside: dict[int, np.ndarray], scene: Scene) -> np.ndarray:
    """Compose the pixels of a scene, uint8 (80, 80, 3), from the images by block size and what is outside in them."""
    colour = np.array(list(GROUNDS.values())[scene.ground])
    canvas = np.broadcast_to(colour, (SIZE, SIZE, 3)).astype(np.uint8)
    for index, size, top, left in scene.parts:
        image, mask = images[size][index], outside[size][index]
        edge = np.pad(mask, 1)  # the pixels beside the outside mix with it
        near = mask | edge[2:, 1:-1] | edge[:-2, 1:-1] | edge[1:-1, 2:] | edge[1:-1, :-2]
        mixed = np.where(near[..., None], image * (colour / 255), image)
        y, x, side = top * CELL, left * CELL, size * CELL
        canvas[y : y + side, x : x + side] = mixed
    return canvas


class SceneSampler:
    """Samples scenes of emoji and their captions."""

    def __init__(self, emoji: Sequence[Emoji], size_alone: int | None = None) -> None:
        """Group the emoji that are counted and paired by style.

        Args:
            emoji: What is known of each emoji.
            size_alone: Tokens a side of an emoji that fills its image, as `encode_alone` encodes it; None composes.
        """
        self.emoji, self.size_alone = emoji, size_alone
        self.composed: dict[str, list[int]] = {}
        for i, one in enumerate(emoji):
            if one["group"] not in NOT_COMPOSED:
                self.composed.setdefault(one["style"], []).append(i)

    def sample(self, index: int, rng: np.random.Generator) -> Scene:
        """Sample a scene with the emoji of this index."""
        if self.size_alone is not None:
            return Scene((Part(index, self.size_alone, 0, 0),))
        one = self.emoji[index]
        kind = rng.random() if one["group"] not in NOT_COMPOSED else 1.0
        if kind < COUNTS_SHARE:
            parts = self._place([index] * int(rng.integers(2, 5)), rng)
        elif kind < COUNTS_SHARE + PAIRS_SHARE:
            parts = self._place([index, int(rng.choice(self.composed[one["style"]]))], rng)
        else:
            size = SMALL if kind < COUNTS_SHARE + PAIRS_SHARE + SMALL_SHARE else LARGE
            top, left = (int(place) for place in rng.integers(GRID - size + 1, size=2))
            parts = (Part(index, size, top, left),)
        ground = int(rng.integers(1, len(GROUNDS))) if rng.random() < COLOURED_SHARE else 0
        return Scene(parts, ground)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """Sample a caption of a scene."""
        one, *others = (self.emoji[part.emoji] for part in scene.parts)
        if self.size_alone is not None:
            return sample_caption(one, rng)
        if not others:
            text = sample_caption(one, rng, is_small=scene.parts[0].size == SMALL)
        elif all(part.emoji == scene.parts[0].emoji for part in scene.parts):
            text = caption_count(one, len(scene.parts), rng)
        else:
            text = caption_pair(one, others[0], rng)
        return mention_ground(text, list(GROUNDS)[scene.ground], rng)

    def _place(self, indices: list[int], rng: np.random.Generator) -> tuple[Part, ...]:
        """Place small blocks: two side by side at any heights, more in the quarters of the scene."""
        if len(indices) == 2:
            places = [(int(rng.integers(GRID - SMALL + 1)), left) for left in (0, SMALL)]
        else:
            quarters = [(top, left) for top in (0, SMALL) for left in (0, SMALL)]
            places = [quarters[i] for i in sorted(rng.choice(4, len(indices), replace=False))]
        return tuple(Part(index, SMALL, *place) for index, place in zip(indices, places, strict=True))

    def replace_emoji(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Put other emoji at the same places."""
        return scene._replace(
            parts=tuple(part._replace(emoji=int(rng.integers(len(self.emoji)))) for part in scene.parts)
        )


def place_alone(pixels: np.ndarray) -> np.ndarray:
    """Put images, uint8 (N, 64, 64, 3), in the middle of white scenes, uint8 (N, 80, 80, 3)."""
    scenes = np.full((len(pixels), SIZE, SIZE, 3), 255, np.uint8)
    scenes[:, CELL:-CELL, CELL:-CELL] = pixels
    return scenes
