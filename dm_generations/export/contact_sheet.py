"""A contact sheet: a grid of images with labels for a paper or a post, in pages of at most MAX_SIDE pixels a side."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, overload

from PIL import Image, ImageDraw

from dm_generations.archive.grid import CELLS, SAME_SEED, Grid, Place, Value
from dm_generations.errors import UserError
from dm_generations.export.captions import Font, load_font, renderable, wrap_text

MAX_SIDE: Final = 8192  # pixels
MAX_PAGES: Final = 1000
_MAX_CHARACTERS: Final = 20_000  # of a label
_MIN_HEADER_WIDTH: Final = 320
_SCORE = "{:.2f}"

Colour = tuple[int, int, int]
Decode = Callable[[Sequence[int]], Sequence[Image.Image]]  # ids to images, in this order


@dataclass(frozen=True)
class Theme:
    """Colours of a contact sheet."""

    background: Colour
    text: Colour
    faint: Colour
    empty: Colour


THEMES: Final[Mapping[str, Theme]] = {
    "light": Theme((255, 255, 255), (20, 20, 20), (105, 105, 105), (236, 236, 236)),
    "dark": Theme((18, 18, 18), (236, 236, 236), (155, 155, 155), (40, 40, 40)),
}


@dataclass(frozen=True)
class Style:
    """How a contact sheet looks.

    Attributes:
        theme: A key of THEMES.
        scores: Whether scores stand below the images.
        font: A TrueType or OpenType file; None is Pillow's, which has a to z: accents are left out.
    """

    theme: str = "light"
    scores: bool = False
    font: str | None = None


@dataclass(frozen=True)
class _Text:
    """Lines of one size."""

    lines: Sequence[str]
    font: Font
    size: int

    @property
    def height(self) -> int:
        return len(self.lines) * _line_height(self.size)


@dataclass(frozen=True)
class _Page:
    """What is on one page: its header, rows and columns."""

    header: Sequence[tuple[_Text, Colour]]
    page: Place  # () where there is no axis of pages
    rows: Sequence[Value]
    cols: Sequence[Value]


@dataclass
class _Cells:
    """Sizes in pixels, which all pages share."""

    image_size: int
    images_a_side: int
    has_scores: bool
    text_size: int = field(init=False)
    score_size: int = field(init=False)
    width: int = field(init=False)
    height: int = field(init=False)
    inner_gap: int = 2

    def __post_init__(self) -> None:
        self.score_size = max(9, self.image_size // 14) if self.has_scores else 0
        self.width = self.images_a_side * (self.image_size + self.inner_gap) - self.inner_gap
        self.height = self.images_a_side * (self.image_height + self.inner_gap) - self.inner_gap
        self.text_size = max(12, min(28, self.width // 14))

    @property
    def image_height(self) -> int:
        """Of an image with its score."""
        return self.image_size + self.score_size * 3 // 2

    @property
    def gap(self) -> int:
        """Between cells, so that those of several images can be told apart."""
        return self.text_size // (1 if self.images_a_side > 1 else 2)


class ContactSheet(Sequence[Image.Image]):
    """The pages of a contact sheet, images of Pillow, each of which is rendered when it is asked for."""

    def __init__(self, grid: Grid, style: Style, decode: Decode):
        """Lay out the pages.

        Args:
            grid: What to show.
            style: How.
            decode: Called with the ids of a page's images; and once before, with one image of each codec.

        Raises:
            UserError: A label or an image is too large for a page, there are too many pages, or the style is wrong.
        """
        if style.theme not in THEMES:
            raise UserError(f"there is no theme {style.theme!r:.60}; there are {', '.join(THEMES)}")
        self._grid, self._style, self._decode = grid, style, decode
        self._theme = THEMES[style.theme]
        image_size = max(max(image.size) for image in decode(list(grid.id_by_codec.values())))
        self._cells = _Cells(image_size, math.isqrt(CELLS[grid.cell]), style.scores)
        self._measure = ImageDraw.Draw(Image.new("L", (1, 1)))
        self._lay_out_labels()
        self._pages = list(self._lay_out())
        if len(self._pages) > MAX_PAGES:
            raise UserError(
                f"the contact sheet has {len(self._pages):,} pages of {MAX_SIDE:,} pixels, more than {MAX_PAGES:,}; "
                "select fewer images"
            )

    def __len__(self) -> int:
        return len(self._pages)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        """Render a page, or those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self._render(self._pages[index], range(len(self))[index] + 1)

    # Layout

    def _lay_out_labels(self) -> None:
        rows, cols, *_ = self._grid.axes
        labels = list(self._grid.fixed.items())
        labels += [(axis.name, label) for axis in self._grid.axes for label in axis.labels.values()]
        for name, label in labels:
            if len(label) > _MAX_CHARACTERS:
                raise UserError(f"a {name} has {len(label):,} characters, more than {_MAX_CHARACTERS:,}; leave it out")
        size = self._cells.text_size
        self._margin = size
        longest = max(self._text_width(word, size) for label in cols.labels.values() for word in label.split() or [""])
        self._column_width = max(self._cells.width, min(longest, 10 * size))
        self._column_labels = {
            value: self._text(label, self._column_width, size) for value, label in cols.labels.items()
        }
        names = [self._text_width(axis.name, size) for axis in (rows, cols)]
        natural = max(self._text_width(label, size) for label in rows.labels.values())
        self._row_label_width = max(*names, min(natural, max(16 * size, self._cells.width)))
        self._row_labels = {
            value: self._text(label, self._row_label_width, size) for value, label in rows.labels.items()
        }
        self._head_height = max(
            *(text.height for text in self._column_labels.values()), 2 * _line_height(self._cells.text_size)
        )

    def _lay_out(self) -> Iterator[_Page]:
        rows, cols, *more = self._grid.axes
        cells, gap = self._cells, self._cells.gap
        free = MAX_SIDE - 2 * self._margin - self._row_label_width
        column_count = free // (self._column_width + gap)
        if column_count < 1:
            raise UserError(f"cells of {cells.width:,} pixels do not fit on a page of {MAX_SIDE:,}; use --cell best1")
        for page in [(value,) for value in more[0].labels] if more else [()]:
            for some_cols in _chunks(list(cols.labels), column_count):
                header = self._header(page, self._width(len(some_cols)) - 2 * self._margin)
                free = MAX_SIDE - self._top(header) - _line_height(cells.text_size) - self._margin
                heights = {value: self._row_height(value) + gap for value in rows.labels}
                if max(heights.values()) > free:
                    raise UserError(
                        f"the labels do not fit on a page of {MAX_SIDE:,} pixels; leave out the longest prompts"
                    )
                for some_rows in _fill(heights, free):
                    yield _Page(header, page, some_rows, some_cols)

    def _header(self, page: Place, width: int) -> list[tuple[_Text, Colour]]:
        """Return what is fixed: the prompt as a title, the rest below it, and what a cell shows."""
        grid, size, theme = self._grid, self._cells.text_size, self._theme
        fixed = dict(grid.fixed)
        if page:
            fixed = {grid.axes[2].name: grid.axes[2].labels[page[0]], **fixed}
        title = fixed.pop("prompt", "")
        rest = " · ".join(f"{name} {label}" for name, label in fixed.items() if label != "(none)")
        count = CELLS[grid.cell]
        cell = "the same noise in all cells" if grid.cell == SAME_SEED else f"the best {count if count > 1 else ''}"
        note = cell if grid.cell == SAME_SEED else f"{cell.strip()} of each by CLIP score"
        lines = [(title, size * 3 // 2, theme.text), (rest, size, theme.text), (note, size, theme.faint)]
        return [(self._text(text, width, each), colour) for text, each, colour in lines if text]

    def _text(self, text: str, width: int, size: int) -> _Text:
        font = load_font(self._style.font, size)
        return _Text(wrap_text(self._measure, renderable(text, self._style.font), font, width), font, size)

    def _text_width(self, text: str, size: int) -> int:
        shown = renderable(text, self._style.font)
        return math.ceil(self._measure.textlength(shown, load_font(self._style.font, size)))

    def _width(self, column_count: int) -> int:
        grid = self._row_label_width + column_count * (self._column_width + self._cells.gap)
        return 2 * self._margin + max(grid, _MIN_HEADER_WIDTH)

    def _top(self, header: Sequence[tuple[_Text, Colour]]) -> int:
        """Return where the first row of cells starts."""
        return self._margin + sum(text.height for text, _ in header) + 2 * self._cells.gap + self._head_height

    def _row_height(self, value: Value) -> int:
        return max(self._cells.height, self._row_labels[value].height)

    # Rendering

    def _render(self, page: _Page, number: int) -> Image.Image:
        cells, gap, theme = self._cells, self._cells.gap, self._theme
        top = self._top(page.header)
        heights = [self._row_height(value) for value in page.rows]
        footer = _line_height(cells.text_size) if len(self) > 1 else 0
        height = top + sum(heights) + len(heights) * gap + footer + self._margin - gap
        sheet = Image.new("RGB", (self._width(len(page.cols)), height), theme.background)
        draw = ImageDraw.Draw(sheet)
        self._draw_heads(draw, page)
        images = self._images(page)
        for row, row_height in zip(page.rows, heights, strict=True):
            label = self._row_labels[row]
            self._draw_text(draw, label, self._margin, top + (row_height - label.height) / 2, theme.text)
            for index, col in enumerate(page.cols):
                x = self._column_left(index) + (self._column_width - cells.width) // 2
                y = top + (row_height - cells.height) // 2
                self._draw_cell(sheet, draw, (x, y), self._grid.cells.get((row, col, *page.page), ()), images)
            top += row_height + gap
        if footer:
            text = self._text(f"page {number:,} of {len(self):,}", sheet.width, cells.text_size)
            self._draw_text(draw, text, self._margin, top, theme.faint)
        return sheet

    def _images(self, page: _Page) -> dict[int, Image.Image]:
        places = [(row, col, *page.page) for row in page.rows for col in page.cols]
        ids = [row_id for place in places for row_id in self._grid.cells.get(place, ())]
        return dict(zip(ids, self._decode(ids), strict=True)) if ids else {}

    def _draw_heads(self, draw: ImageDraw.ImageDraw, page: _Page) -> None:
        """Draw the header, the names of the axes, and the labels of the columns."""
        y: float = self._margin
        for text, colour in page.header:
            self._draw_text(draw, text, self._margin, y, colour)
            y += text.height
        bottom = y + self._cells.gap + self._head_height
        rows, cols, *_ = self._grid.axes
        line, right = _line_height(self._cells.text_size), self._margin + self._row_label_width
        font = load_font(self._style.font, self._cells.text_size)
        draw.text((right, bottom - 1.5 * line), cols.name, self._theme.faint, font, anchor="rm")
        draw.text((self._margin, bottom - 0.5 * line), rows.name, self._theme.faint, font, anchor="lm")
        for index, col in enumerate(page.cols):
            label = self._column_labels[col]
            middle = self._column_left(index) + self._column_width / 2
            self._draw_text(draw, label, middle, bottom - label.height, self._theme.text, "mm")

    def _draw_cell(
        self,
        sheet: Image.Image,
        draw: ImageDraw.ImageDraw,
        corner: tuple[int, int],
        ids: Sequence[int],
        images: Mapping[int, Image.Image],
    ) -> None:
        cells, theme = self._cells, self._theme
        for place in range(cells.images_a_side**2):
            row, col = divmod(place, cells.images_a_side)
            x = corner[0] + col * (cells.image_size + cells.inner_gap)
            y = corner[1] + row * (cells.image_height + cells.inner_gap)
            if place >= len(ids):
                draw.rectangle((x, y, x + cells.image_size - 1, y + cells.image_size - 1), theme.empty)
                continue
            sheet.paste(images[ids[place]], (x, y))
            score = self._grid.scores[ids[place]]
            if cells.has_scores and score is not None:
                middle = (x + cells.image_size / 2, y + (cells.image_size + cells.image_height) / 2)
                font = load_font(self._style.font, cells.score_size)
                draw.text(middle, _SCORE.format(score), theme.faint, font, anchor="mm")

    def _column_left(self, index: int) -> int:
        return self._margin + self._row_label_width + self._cells.gap + index * (self._column_width + self._cells.gap)

    def _draw_text(
        self, draw: ImageDraw.ImageDraw, text: _Text, x: float, y: float, colour: Colour, anchor: str = "lm"
    ) -> None:
        for number, line in enumerate(text.lines):
            draw.text((x, y + (number + 0.5) * _line_height(text.size)), line, colour, text.font, anchor=anchor)


def _line_height(size: int) -> int:
    return size * 5 // 4


def _chunks(values: Sequence[Value], size: int) -> list[Sequence[Value]]:
    """Split values into parts of at most `size`, of about the same length."""
    count = -(-len(values) // size)
    ends = [len(values) * number // count for number in range(count + 1)]
    return [values[start:end] for start, end in itertools.pairwise(ends)]


def _fill(heights: Mapping[Value, int], free: int) -> Iterator[list[Value]]:
    """Yield the rows of each page, as many as fit into `free` pixels."""
    page: list[Value] = []
    used = 0
    for value, height in heights.items():
        if page and used + height > free:
            yield page
            page, used = [], 0
        page.append(value)
        used += height
    yield page
