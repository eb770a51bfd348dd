"""Text on galleries: a strip above the grid with prompt and settings, and one below each image with its score.

H, W: pixels of one image   C: pixels of the caption's strip   S: pixels of a row of scores
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dm_generations.errors import UserError

_BACKGROUND, _TEXT, _FAINT = (0, 0, 0), (255, 255, 255), (160, 160, 160)
_PROMPT_LINES = 3  # a prompt may have 10,000 characters
_LINE_CHARACTERS = 400  # more do not fit into a line of any gallery in a size that can be read

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Strips:
    """The text on galleries.

    Attributes:
        captions: A strip above the grid with prompt and settings.
        score_labels: A strip below each row of images with their scores.
        font: A TrueType or OpenType file; None is Pillow's, which has a to z: accents are left out.
    """

    captions: bool = False
    score_labels: bool = False
    font: str | None = None

    def __bool__(self) -> bool:
        """Whether there is any text to add."""
        return self.captions or self.score_labels

    def check(self) -> None:
        """Raise UserError if text cannot be rendered: the font is missing or not readable."""
        if self:
            load_font(self.font, 12)

    def size(self, cols: int, rows: int, image_size: int) -> tuple[int, int]:
        """Return width and height in pixels of a gallery with its strips."""
        height = rows * (image_size + self._label_height(image_size)) + self._caption_height(cols * image_size)
        return cols * image_size, height

    def add(
        self, pixels: np.ndarray, cols: int, rows: int, caption: tuple[str, str], labels: Sequence[str]
    ) -> np.ndarray:
        """Return a gallery with its strips.

        Args:
            pixels: (rows * H, cols * W, 3) uint8.
            cols: Images in a row.
            rows: Rows of images.
            caption: The prompt, wrapped and cut where it is long, and a line of its settings.
            labels: One for each cell from the first on.

        Returns:
            (C + rows * (H + S), cols * W, 3) uint8.
        """
        height, width = pixels.shape[0] // rows, pixels.shape[1] // cols
        caption_height, label_height = self._caption_height(pixels.shape[1]), self._label_height(height)
        sheet = np.zeros((caption_height + rows * (height + label_height), pixels.shape[1], 3), np.uint8)
        cells = sheet[caption_height:].reshape(rows, height + label_height, -1, 3)
        cells[:, :height] = pixels.reshape(rows, height, -1, 3)
        image = Image.fromarray(sheet)
        draw = ImageDraw.Draw(image)
        if self.captions:
            _render_caption(draw, caption, pixels.shape[1], self.font)
        if self.score_labels:
            font = load_font(self.font, _label_size(height))
            for cell, label in enumerate(labels):
                row, col = divmod(cell, cols)
                middle = (row + 1) * (height + label_height) - label_height / 2 + caption_height
                draw.text((col * width + width / 2, middle), label, _TEXT, font, anchor="mm")
        return np.asarray(image)

    def _caption_height(self, width: int) -> int:
        return (_PROMPT_LINES + 1) * _line_height(width) + _line_height(width) // 2 if self.captions else 0

    def _label_height(self, image_size: int) -> int:
        return _label_size(image_size) * 3 // 2 if self.score_labels else 0


def _render_caption(draw: ImageDraw.ImageDraw, caption: tuple[str, str], width: int, font_file: str | None) -> None:
    line_height = _line_height(width)
    font, margin = load_font(font_file, line_height * 3 // 4), line_height // 2
    prompt, settings = (renderable(text, font_file) for text in caption)
    lines = [(line, _TEXT) for line in wrap_text(draw, prompt, font, width - 2 * margin, _PROMPT_LINES)]
    lines += [(line, _FAINT) for line in wrap_text(draw, settings, font, width - 2 * margin, 1)]
    for number, (line, colour) in enumerate(lines):
        draw.text((margin, margin // 2 + (number + 0.5) * line_height), line, colour, font, anchor="lm")


def wrap_text(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int, line_count: int = sys.maxsize) -> list[str]:
    """Return `text` in at most `line_count` lines of `width` pixels; a long one ends with "..."."""
    lines: list[str] = []
    while text and len(lines) < line_count:
        is_last = len(lines) == line_count - 1
        count = _count_characters(draw, text, font, width)
        if count < len(text) and not is_last:
            count = text.rfind(" ", 1, count + 1) if " " in text[1 : count + 1] else count
        elif count < len(text):
            ellipsis = draw.textlength("...", font)
            count = _count_characters(draw, text, font, width - ellipsis)
        line, text = text[:count], text[count:].lstrip()
        lines.append(line.rstrip() + ("..." if text and is_last else ""))
    return lines


def _count_characters(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> int:
    """Return how many characters from the start fit into `width` pixels, and 1 at least."""
    enough, too_many = 1, min(len(text), _LINE_CHARACTERS) + 1
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if draw.textlength(text[:middle], font) <= width:
            enough = middle
        else:
            too_many = middle
    return enough


def without_accents(text: str) -> str:
    """Return `text` with "e" for "é": the font of Pillow has no letters with accents, and shows boxes instead."""
    letters = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in letters if not unicodedata.combining(letter)))


def renderable(text: str, font_file: str | None) -> str:
    """Return `text` without what the font lacks, line breaks, and characters that cannot be printed."""
    text = text if font_file else without_accents(text)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))


def _line_height(width: int) -> int:
    """Return pixels; for galleries of 2,048 pixels, 32."""
    return max(10, min(48, width // 64))


def _label_size(image_size: int) -> int:
    return max(8, image_size // 14)


@lru_cache(maxsize=8)
def load_font(file: str | None, size: int) -> Font:
    """Return a font of `size` pixels; see `Strips.font`.

    Raises:
        UserError: It is missing or not readable.
    """
    try:
        return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    except ImportError as error:
        raise UserError(
            "this Pillow was built without FreeType, which captions need; install Pillow from PyPI"
        ) from error
    except OSError as error:
        raise UserError(f"--caption-font: {file!r} is not a readable font ({error})") from error
