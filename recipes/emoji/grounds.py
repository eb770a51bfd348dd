"""Put emoji on grounds: plain colours, or two of them with a horizon between.

The plain cells around an emoji take a token of the ground in place of the codec's tokens of white. So an emoji on any
ground is made of tokens, by seed and step: none is rendered, encoded or stored.

Each style of emoji has its own token of each variant of a ground, and these are drawn alike, by their upper colour. An
image whose first cell is plain begins with this token, which thus says what the ground and the style are to be. A model
that knows the frequencies of first tokens also without a caption keeps them under guidance, however strong.
`recipes.emoji.ground_decoder` takes the tokens that emoji use least for it, and teaches the codec to draw them.

N: emoji   S: pixels a side   G: variants of the grounds   g: cells a side
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from recipes.emoji.data import STYLES, Emoji
from recipes.emoji.vqgan import encode_images, get_codebook

COLOURS = {
    "white": (255, 255, 255),
    "blue": (150, 205, 255),
    "green": (165, 225, 155),
    "yellow": (255, 230, 125),
    "pink": (255, 190, 215),
    "purple": (205, 180, 255),
    "black": (45, 45, 50),
}
VIEWS = {  # colours above and below the horizon
    "on grass": ("blue", "green"),
    "on the beach": ("blue", "yellow"),
    "on water": ("white", "blue"),
    "in the snow": ("blue", "white"),
    "at sunset": ("pink", "yellow"),
    "at night": ("black", "purple"),
}
HORIZONS = (4, 5, 6)  # eighths of the height that are above
GROUND_DISTANCE = 1.5  # length of a colour's row in the codebook, as a multiple of the longest other one
PLAIN = 250  # levels: an outside pixel has at least this in all channels


class Ground(NamedTuple):
    """A variant of a ground."""

    name: str  # a colour, or a view
    upper: str  # colours
    lower: str
    horizon: int = 8  # eighths of the height that have the upper colour


GROUNDS = (
    *(Ground(colour, colour, colour) for colour in COLOURS),
    *(Ground(view, *colours, horizon) for view, colours in VIEWS.items() for horizon in HORIZONS),
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of emoji, which of their cells are outside of them, and the tokens of the grounds.

    Attributes:
        emoji: int32 (N, g, g).
        outside: bool (N, g, g).
        grounds: int (styles, G); None for a codec without grounds, whose emoji are not put on any.
    """

    emoji: np.ndarray
    outside: np.ndarray
    grounds: np.ndarray | None

    def choose(self, chosen: np.ndarray) -> "Tokens":
        """Choose some of the emoji, by a mask (N,)."""
        return dataclasses.replace(self, emoji=self.emoji[chosen], outside=self.outside[chosen])

    def compose(self, indices: Sequence[int] | np.ndarray, grounds: np.ndarray, emoji: Sequence[Emoji]) -> np.ndarray:
        """Put emoji on variants of grounds.

        Args:
            indices: Of the emoji (B,).
            grounds: Indices in `GROUNDS` (B,).
            emoji: What is known of all N.

        Returns:
            Tokens, int32 (B, g * g).
        """
        tokens = self.emoji[indices]
        if self.grounds is not None:
            styles = [STYLES.index(emoji[i]["style"]) for i in indices]
            lower = self.grounds[styles][np.arange(len(tokens)), find_lower(grounds)]
            upper = self.grounds[styles, grounds]
            horizons = np.array([ground.horizon for ground in GROUNDS])[grounds] * tokens.shape[1] // 8
            is_upper = np.arange(tokens.shape[1]) < horizons[:, None]
            ground = np.where(is_upper, upper[:, None], lower[:, None])[..., None]
            tokens = np.where(self.outside[indices], ground, tokens)
        return tokens.reshape(len(tokens), -1).astype(np.int32)


def find_lower(grounds: np.ndarray) -> np.ndarray:
    """Find the plain ground of the lower colour of each variant (B,)."""
    names = list(COLOURS)
    return np.array([names.index(ground.lower) for ground in GROUNDS])[grounds]


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


def place_grounds(codebook: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Make the least used rows of a codebook (V, D) the grounds, where no output of an encoder is near.

    Args:
        codebook: Rows, float32 (V, D).
        used: How often emoji use each row (V,).
    """
    tokens = np.sort(np.argsort(used, kind="stable")[: len(STYLES) * len(GROUNDS)])
    rows = np.random.default_rng(0).normal(size=(len(COLOURS), codebook.shape[1]))
    rows *= GROUND_DISTANCE * np.linalg.norm(codebook, axis=1).max() / np.linalg.norm(rows, axis=1, keepdims=True)
    placed = codebook.copy()
    upper = [list(COLOURS).index(ground.upper) for ground in GROUNDS]
    placed[tokens] = rows[upper * len(STYLES)]
    return placed


def find_grounds(codebook: np.ndarray) -> np.ndarray | None:
    """Find the tokens of the grounds, int (styles, G), in a codebook (V, D): its longest rows, of a few values."""
    count = len(STYLES) * len(GROUNDS)
    tokens = np.sort(np.argsort(-np.linalg.norm(codebook.astype(np.float32), axis=1), kind="stable")[:count])
    colours = len(np.unique(codebook[tokens], axis=0))
    return tokens.reshape(len(STYLES), -1) if len(tokens) == count and colours == len(COLOURS) else None


def encode_emoji(config: VQGANConfig, params: Any, pixels: np.ndarray) -> Tokens:
    """Encode emoji, uint8 (N, S, S, 3)."""
    cells = config.grid
    tokens = encode_images(VQGAN(config), params, pixels).reshape(-1, cells, cells)
    side = config.resolution // cells
    outside = np.all(find_outside(pixels).reshape(-1, cells, side, cells, side), axis=(2, 4))
    return Tokens(tokens, outside, find_grounds(np.asarray(get_codebook(params))))


def draw_grounds(pixels: np.ndarray, grounds: np.ndarray) -> np.ndarray:
    """Put images, uint8 (N, S, S, 3), on variants of grounds (N,)."""
    colours = np.array([[COLOURS[ground.upper], COLOURS[ground.lower]] for ground in GROUNDS])[grounds]
    size = pixels.shape[1]
    horizons = np.array([ground.horizon for ground in GROUNDS])[grounds] * size // 8
    is_upper = np.arange(size) < horizons[:, None]
    canvas = np.where(is_upper[..., None], colours[:, None, 0], colours[:, None, 1])[:, :, None]
    mask = find_outside(pixels)
    edge = np.pad(mask, ((0, 0), (1, 1), (1, 1)))  # the pixels beside the outside mix with it
    near = mask | edge[:, 2:, 1:-1] | edge[:, :-2, 1:-1] | edge[:, 1:-1, 2:] | edge[:, 1:-1, :-2]
    return np.where(near[..., None], pixels * (canvas / 255), pixels).astype(np.uint8)
