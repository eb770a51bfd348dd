"""Contact sheets: where images are, that labels are whole, and how pages are split."""

import numpy as np
import pytest
from PIL import Image

from dm_generations.archive.grid import CELLS, Axis, Grid
from dm_generations.errors import UserError
from dm_generations.export import contact_sheet
from dm_generations.export.contact_sheet import MAX_SIDE, THEMES, ContactSheet, Style

SIZE = 24


def colour(row_id: int) -> tuple[int, int, int]:
    """Of no theme, and another one for each image."""
    return 200, row_id % 251, row_id // 251


def decode(ids, size=SIZE):
    return [Image.new("RGB", (size, size), colour(row_id)) for row_id in ids]


def make_grid(rows, cols, pages=None, cell="best1", missing=(), fixed=None) -> Grid:
    """A full grid whose labels are given; ids count from 1, along rows, then columns, then pages."""
    names = ("prompt", "cond_scale", "top_k")
    lists = [rows, cols] if pages is None else [rows, cols, pages]
    axes = [
        Axis(name, {(i,): label for i, label in enumerate(labels)}) for name, labels in zip(names, lists, strict=False)
    ]
    places = [(row, col, *((page,) if pages else ())) for row in axes[0].labels for col in axes[1].labels
              for page in (axes[2].labels if pages else [()])]  # fmt: skip
    count = CELLS[cell]
    cells = {
        place: [count * number + i + 1 for i in range(count)]
        for number, place in enumerate(places)
        if number not in missing
    }
    ids = [row_id for listed in cells.values() for row_id in listed]
    return Grid(axes, cell, fixed or {"temperature": "1"}, cells, dict.fromkeys(ids, 12.5), {None: ids[0]})


def corners(page: Image.Image, row_id: int, size: int = SIZE) -> tuple[int, int]:
    """Where an image is; it has to be there whole, and nowhere else."""
    ys, xs = np.nonzero((np.asarray(page) == colour(row_id)).all(axis=2))
    assert len(ys) == size**2, row_id
    assert ys.max() - ys.min() == xs.max() - xs.min() == size - 1
    return int(xs.min()), int(ys.min())


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("scores", [False, True])
def test_images_are_in_rows_and_columns_unchanged(theme, scores):
    grid = make_grid(["a cat", "a dog with a very long tail and a hat"], ["1", "3", "10"], missing=[4])
    (page,) = ContactSheet(grid, Style(theme, scores), decode)
    places = {place: corners(page, row_id) for place, (row_id,) in grid.cells.items()}
    for row in grid.axes[0].labels:
        assert len({y for (r, _), (_, y) in places.items() if r == row}) == 1
    for col in grid.axes[1].labels:
        assert len({x for (_, c), (x, _) in places.items() if c == col}) == 1
    assert places[(0,), (0,)][0] < places[(0,), (1,)][0] < places[(0,), (2,)][0]
    assert places[(0,), (0,)][1] < places[(1,), (0,)][1]
    pixels = np.asarray(page)
    assert tuple(pixels[0, 0]) == THEMES[theme].background
    assert tuple(pixels[places[(1,), (0,)][1], places[(0,), (1,)][0]]) == THEMES[theme].empty


def test_cells_of_several_images_are_squares_best_first():
    grid = make_grid(["a", "b"], ["1"], cell="best4")
    (page,) = ContactSheet(grid, Style(), decode)
    for ids in grid.cells.values():
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corners(page, row_id) for row_id in ids)
        assert (y0, y2, x0, x1) == (y1, y3, x2, x3) and x0 + SIZE <= x1 and y0 + SIZE <= y2


def test_scores_take_space_below_the_images():
    grid = make_grid(["a", "b"], ["1"])
    (without,), (with_scores,) = (ContactSheet(grid, Style(scores=scores), decode) for scores in (False, True))
    x, y = corners(with_scores, 1)
    below = np.asarray(with_scores)[y + SIZE : corners(with_scores, 2)[1], x : x + SIZE]
    assert (below != THEMES["light"].background).any() and with_scores.height > without.height
    ids = list(grid.scores)
    unscored = Grid(grid.axes, grid.cell, grid.fixed, grid.cells, dict.fromkeys(ids), grid.id_by_codec)
    (page,) = ContactSheet(unscored, Style(scores=True), decode)
    x, y = corners(page, 1)
    assert (np.asarray(page)[y + SIZE : corners(page, 2)[1], x : x + SIZE] == THEMES["light"].background).all()


@pytest.mark.parametrize("label", ["word " * 200, "W" * 500, "naïve 猫 \x1b[31m\u202e" * 30])
def test_labels_wrap_and_are_never_cut(label, monkeypatch):
    drawn = []
    draw_text = contact_sheet.ImageDraw.ImageDraw.text

    def record(self, xy, text, *args, **kwargs):
        left, top, right, bottom = self.textbbox(xy, text, args[1], kwargs["anchor"])
        assert left >= 0 and top >= 0 and right <= self.im.size[0] and bottom <= self.im.size[1]
        drawn.append(text)
        draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(contact_sheet.ImageDraw.ImageDraw, "text", record)
    (page,) = ContactSheet(make_grid([label, "b"], [label, "c"], fixed={"prompt": label}), Style(), decode)
    letters = "".join("".join(drawn).split())
    shown = "".join(contact_sheet.renderable(label, None).split())
    assert letters.count(shown) == 3, "title, row and column"
    for row_id in (1, 2, 3, 4):
        corners(page, row_id)


def test_what_is_fixed_stands_above(monkeypatch):
    drawn = []
    draw_text = contact_sheet.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        contact_sheet.ImageDraw.ImageDraw,
        "text",
        lambda self, xy, text, *args, **kwargs: (drawn.append(text), draw_text(self, xy, text, *args, **kwargs)),
    )
    sheet = ContactSheet(make_grid(["a"], ["1"], pages=["50", "256"], fixed={"temperature": "0.7"}), Style(), decode)
    assert len(sheet) == 2
    for page, label in zip(sheet, ("50", "256"), strict=True):
        assert page.size and any("top_k" in text and label in text and "0.7" in text for text in drawn)
        drawn.clear()


def test_large_grids_are_split_and_no_image_is_lost(monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_SIDE", side := 400)
    rows, cols = [str(number) for number in range(30)], [str(number) for number in range(9)]
    grid = make_grid(rows, cols)
    asked = []

    def record(ids):
        asked.extend(ids)
        return decode(ids, 50)

    sheet = ContactSheet(grid, Style(), record)
    asked.clear()
    assert len(sheet) > 2
    for number in range(len(sheet)):
        page = sheet[number]
        assert max(page.size) <= side
    assert sorted(asked) == sorted(grid.scores)
    assert sheet[-1].size == page.size and len(sheet[:1]) == 1
    with pytest.raises(IndexError):
        sheet[len(sheet)]


def test_what_does_not_fit_is_an_error(monkeypatch):
    assert MAX_SIDE == 8192
    monkeypatch.setattr(contact_sheet, "MAX_SIDE", 600)
    with pytest.raises(UserError, match="best1"):
        ContactSheet(make_grid(["a"], ["1"], cell="best9"), Style(), lambda ids: decode(ids, 300))
    for rows, cols in ((["a"], ["long " * 300]), (["x" * 10**7], ["1"])):
        with pytest.raises(UserError):
            ContactSheet(make_grid(rows, cols), Style(), decode)
    with pytest.raises(UserError, match="pink"):
        ContactSheet(make_grid(["a"], ["1"]), Style("pink"), decode)
    with pytest.raises(UserError, match=r"no\.ttf"):
        ContactSheet(make_grid(["a"], ["1"]), Style(font="no.ttf"), decode)


def test_endless_pages_are_an_error(monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_PAGES", 3)
    values = [str(number) for number in range(4)]
    with pytest.raises(UserError, match="pages"):
        ContactSheet(make_grid(["a"], ["1"], pages=values), Style(), decode)
