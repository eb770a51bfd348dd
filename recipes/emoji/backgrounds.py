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
from PIL import Image

from dm_generations.models.vqgan.network import VQGAN, VQGANConfig
from recipes.emoji.data import STYLES, Emoji
from recipes.emoji.layouts import LAYOUTS, SMALL_STYLE, Scene, join_quarters, list_quarters
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
BACKGROUND_DISTANCE = 1.5  # length of a colour's row in the codebook, as a multiple of the longest that emoji use
LAYOUT_DISTANCE = 2.0  # the same, of a layout's row
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
        small: The emoji at half the size, int32 (N, g / 2, g / 2).
        small_outside: Which of these cells are outside, bool (N, g / 2, g / 2).
        styles: Index in `STYLES` of each emoji, int (N,).
        backgrounds: int (styles, G); None for a codec without backgrounds, whose emoji stay as they are.
        layouts: int (colours, layouts), in the order of `COLOURS` and `LAYOUTS`; None for a codec without them.
    """

    emoji: np.ndarray
    outside: np.ndarray
    small: np.ndarray
    small_outside: np.ndarray
    styles: np.ndarray
    backgrounds: np.ndarray | None
    layouts: np.ndarray | None

    def choose(self, chosen: np.ndarray) -> "Tokens":
        """Choose some of the emoji, by a mask (N,)."""
        names = "emoji", "outside", "small", "small_outside", "styles"
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in names})

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

    def compose_scenes(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Put small emoji into the quarters of images: tokens, int32 (B, g * g)."""
        assert self.backgrounds is not None
        assert self.layouts is not None
        layouts, colours = (np.array([getattr(each, name) for each in scenes], int) for name in ("layout", "colour"))
        quarters = list_quarters(scenes)[:, :, None, None]
        at = quarters[..., 0, 0]
        plain = self.backgrounds[SMALL_STYLE, colours][:, None, None, None]
        grid = join_quarters(np.where((quarters < 0) | self.small_outside[at], plain, self.small[at]))
        grid[:, 0, 0] = self.layouts[colours, layouts]
        return grid.reshape(len(grid), -1).astype(np.int32)


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Scale images, uint8 (N, S, S, 3), to half the size."""
    size = pixels.shape[1] // 2, pixels.shape[2] // 2
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.LANCZOS)) for one in pixels])


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
    """Make the least used rows of a codebook (V, D) the backgrounds and layouts, where no output of an encoder is near.

    Args:
        codebook: Rows, float32 (V, D).
        used: How often emoji use each row (V,).
    """
    order = np.argsort(used, kind="stable")
    backgrounds = np.sort(order[: len(STYLES) * len(BACKGROUNDS)])
    layouts = np.sort(order[len(backgrounds) :][: len(COLOURS) * len(LAYOUTS)])
    rows = np.random.default_rng(0).normal(size=(len(COLOURS), codebook.shape[1]))
    rows *= np.linalg.norm(codebook[used > 0], axis=1).max() / np.linalg.norm(rows, axis=1, keepdims=True)
    placed = codebook.copy()
    upper = [list(COLOURS).index(background.upper) for background in BACKGROUNDS]
    placed[backgrounds] = BACKGROUND_DISTANCE * rows[upper * len(STYLES)]
    placed[layouts] = LAYOUT_DISTANCE * np.repeat(rows, len(LAYOUTS), axis=0)
    return placed


def find_backgrounds(codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Find the tokens of backgrounds and layouts in a codebook (V, D): its longest rows, of a few values.

    Returns:
        int (styles, G) and (colours, layouts); None for a codebook without them.
    """
    order = np.argsort(-np.linalg.norm(codebook.astype(np.float32), axis=1), kind="stable")
    layouts, order = np.split(order, [len(COLOURS) * len(LAYOUTS)])
    backgrounds = order[: len(STYLES) * len(BACKGROUNDS)]
    for tokens in (layouts, backgrounds):
        if len(np.unique(codebook[tokens], axis=0)) != len(COLOURS):
            return None
    return np.sort(backgrounds).reshape(len(STYLES), -1), np.sort(layouts).reshape(len(COLOURS), -1)


def encode_emoji(config: VQGANConfig, params: Any, pixels: np.ndarray, emoji: Sequence[Emoji]) -> Tokens:
    """Encode emoji, uint8 (N, S, S, 3), at both sizes."""
    cells, model = config.grid, VQGAN(config)
    side, half = config.resolution // cells, cells // 2
    tokens = encode_images(model, params, pixels).reshape(-1, cells, cells)
    small, start = shrink(pixels), config.resolution // 4
    canvas = np.full_like(pixels, 255)
    canvas[:, start : start + small.shape[1], start : start + small.shape[2]] = small
    of_canvas = encode_images(model, params, canvas).reshape(-1, cells, cells)
    small_tokens = of_canvas[:, half // 2 : half // 2 + half, half // 2 : half // 2 + half]
    outside, small_outside = (
        np.all(find_outside(images).reshape(-1, count, side, count, side), axis=(2, 4))
        for images, count in ((pixels, cells), (small, half))
    )
    styles = np.array([STYLES.index(one["style"]) for one in emoji])
    backgrounds, layouts = find_backgrounds(np.asarray(get_codebook(params))) or (None, None)
    return Tokens(tokens, outside, small_tokens, small_outside, styles, backgrounds, layouts)


def draw_scenes(pixels: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
    """Draw scenes of emoji, uint8 (N, S, S, 3): uint8 (B, S, S, 3)."""
    quarters = list_quarters(scenes)
    known, at = np.unique(np.maximum(quarters, 0), return_inverse=True)
    small = shrink(pixels[known])[at.reshape(quarters.shape)]
    small = np.where((quarters < 0)[..., None, None, None], np.uint8(255), small)
    colours = np.repeat([scene.colour for scene in scenes], 4)
    drawn = draw_backgrounds(small.reshape(-1, *small.shape[2:]), colours)
    return join_quarters(drawn.reshape(small.shape))


def draw_backgrounds(pixels: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """Put images, uint8 (N, S, S, 3), on variants of backgrounds (N,)."""
    colours = np.array([[COLOURS[each.upper], COLOURS[each.lower]] for each in BACKGROUNDS])[backgrounds]
    is_upper = find_upper(backgrounds, pixels.shape[1])[..., None]
    canvas = np.where(is_upper, colours[:, None, 0], colours[:, None, 1])[:, :, None]
    mask = find_outside(pixels)
    edge = np.pad(mask, ((0, 0), (1, 1), (1, 1)))  # the pixels beside the outside mix with it
    near = mask | edge[:, 2:, 1:-1] | edge[:, :-2, 1:-1] | edge[:, 1:-1, 2:] | edge[:, 1:-1, :-2]
    return np.where(near[..., None], pixels * (canvas / 255), pixels).astype(np.uint8)
