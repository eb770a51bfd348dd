"""Put emoji on backgrounds: plain colours, or two of them with a horizon between.

The plain cells around an emoji take a token of the background in place of the codec's tokens of white. So an emoji on
any background is made of tokens, by seed and step: none is rendered, encoded or stored.

Each style of emoji has its own token of each variant of a background, and these are drawn alike, by their upper colour.
An image whose first cell is plain begins with this token, which thus says what the background and the style are to be.
A model that knows the frequencies of first tokens without a caption too keeps them under guidance.
`recipes.emoji.background_decoder` takes the tokens that emoji use least for it, and teaches the codec to draw them.

N: emoji   S: pixels a side   G: variants of the backgrounds   g: cells a side
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
BACKGROUND_DISTANCE = 1.5  # length of a colour's row in the codebook, as a multiple of the longest other one
PLAIN = 250  # levels: an outside pixel has at least this in all channels


class Background(NamedTuple):
    """A variant of a background."""

    name: str  # a colour, or a view
    upper: str  # colours
    lower: str
    horizon: int = 8  # eighths of the height that have the upper colour


BACKGROUNDS = (
    *(Background(colour, colour, colour) for colour in COLOURS),
    *(Background(view, *colours, horizon) for view, colours in VIEWS.items() for horizon in HORIZONS),
)


def find_upper(backgrounds: np.ndarray, rows: int) -> np.ndarray:
    """Find the rows above the horizon of each variant (B,) in an image of so many: bool (B, rows)."""
    horizons = np.array([each.horizon for each in BACKGROUNDS])[backgrounds] * rows // 8
    is_upper: np.ndarray = np.arange(rows) < horizons[:, None]
    return is_upper


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of emoji and of backgrounds.

    Attributes:
        emoji: int32 (N, g, g).
        outside: Which cells are outside of the emoji, bool (N, g, g).
        styles: Index in `STYLES` of each emoji, int (N,).
        backgrounds: int (styles, G); None for a codec without backgrounds, whose emoji stay as they are.
    """

    emoji: np.ndarray
    outside: np.ndarray
    styles: np.ndarray
    backgrounds: np.ndarray | None

    def choose(self, chosen: np.ndarray) -> "Tokens":
        """Choose some of the emoji, by a mask (N,)."""
        emoji, outside, styles = (each[chosen] for each in (self.emoji, self.outside, self.styles))
        return Tokens(emoji, outside, styles, self.backgrounds)

    def compose(self, indices: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
        """Put emoji on variants of backgrounds.

        Args:
            indices: Of the emoji (B,).
            backgrounds: Indices in `BACKGROUNDS` (B,).

        Returns:
            Tokens, int32 (B, g * g).
        """
        tokens = self.emoji[indices]
        if self.backgrounds is not None:
            plain = np.array([list(COLOURS).index(each.lower) for each in BACKGROUNDS])
            upper, lower = (
                self.backgrounds[self.styles[indices], each][:, None] for each in (backgrounds, plain[backgrounds])
            )
            rows = np.where(find_upper(backgrounds, tokens.shape[1]), upper, lower)
            tokens = np.where(self.outside[indices], rows[..., None], tokens)
        return tokens.reshape(len(tokens), -1).astype(np.int32)


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


def place_backgrounds(codebook: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Make the least used rows of a codebook (V, D) the backgrounds, where no output of an encoder is near.

    Args:
        codebook: Rows, float32 (V, D).
        used: How often emoji use each row (V,).
    """
    tokens = np.sort(np.argsort(used, kind="stable")[: len(STYLES) * len(BACKGROUNDS)])
    rows = np.random.default_rng(0).normal(size=(len(COLOURS), codebook.shape[1]))
    rows *= BACKGROUND_DISTANCE * np.linalg.norm(codebook, axis=1).max() / np.linalg.norm(rows, axis=1, keepdims=True)
    placed = codebook.copy()
    upper = [list(COLOURS).index(background.upper) for background in BACKGROUNDS]
    placed[tokens] = rows[upper * len(STYLES)]
    return placed


def find_backgrounds(codebook: np.ndarray) -> np.ndarray | None:
    """Find the tokens of the backgrounds, int (styles, G), in a codebook (V, D): its longest rows, of a few values."""
    count = len(STYLES) * len(BACKGROUNDS)
    tokens = np.sort(np.argsort(-np.linalg.norm(codebook.astype(np.float32), axis=1), kind="stable")[:count])
    colours = len(np.unique(codebook[tokens], axis=0))
    return tokens.reshape(len(STYLES), -1) if len(tokens) == count and colours == len(COLOURS) else None


def encode_emoji(config: VQGANConfig, params: Any, pixels: np.ndarray, emoji: Sequence[Emoji]) -> Tokens:
    """Encode emoji, uint8 (N, S, S, 3)."""
    cells = config.grid
    tokens = encode_images(VQGAN(config), params, pixels).reshape(-1, cells, cells)
    side = config.resolution // cells
    outside = np.all(find_outside(pixels).reshape(-1, cells, side, cells, side), axis=(2, 4))
    styles = np.array([STYLES.index(one["style"]) for one in emoji])
    return Tokens(tokens, outside, styles, find_backgrounds(np.asarray(get_codebook(params))))


def draw_backgrounds(pixels: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """Put images, uint8 (N, S, S, 3), on variants of backgrounds (N,)."""
    colours = np.array([[COLOURS[each.upper], COLOURS[each.lower]] for each in BACKGROUNDS])[backgrounds]
    is_upper = find_upper(backgrounds, pixels.shape[1])[..., None]
    canvas = np.where(is_upper, colours[:, None, 0], colours[:, None, 1])[:, :, None]
    mask = find_outside(pixels)
    edge = np.pad(mask, ((0, 0), (1, 1), (1, 1)))  # the pixels beside the outside mix with it
    near = mask | edge[:, 2:, 1:-1] | edge[:, :-2, 1:-1] | edge[:, 1:-1, 2:] | edge[:, 1:-1, :-2]
    return np.where(near[..., None], pixels * (canvas / 255), pixels).astype(np.uint8)
