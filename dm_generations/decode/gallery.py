"""Pictures laid out on one sheet: a grid filled row by row, best first, black where there is none.

H, W: pixels of one picture
"""

from collections.abc import Collection, Mapping

import numpy as np


class Sheet:
    """What becomes one file: a grid of pictures; a single picture is a grid of one."""

    def __init__(self, path: str, replaced: str | None, cols: int, rows: int, picture_count: int):
        """`picture_count` pictures are going to be placed; then it goes to `path`, and `replaced` can go.

        Both are relative to the output folder.
        """
        self.path, self.replaced, self.cols, self.rows = path, replaced, cols, rows
        self.picture_count = self._missing = picture_count
        self.pixels: np.ndarray | None = None  # (rows * H, cols * W, 3) uint8, once a picture is placed

    @property
    def is_full(self) -> bool:
        """Every picture that was going to be placed is."""
        return self._missing == 0

    def place(self, cell: int, picture: np.ndarray) -> None:
        """Put `picture` (H, W, 3) uint8 into cell 0..cols*rows-1, counted along the rows."""
        height, width, channels = picture.shape
        if self.pixels is None:
            self.pixels = np.zeros((self.rows * height, self.cols * width, channels), np.uint8)
        row, col = divmod(cell, self.cols)
        self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = picture
        self._missing -= 1

    def place_all(self, pixels: np.ndarray, cells: Collection[int]) -> None:
        """Put all pictures at once, `pixels` (rows * H, cols * W, 3) uint8; what is not among `cells` becomes black."""
        height, width = pixels.shape[0] // self.rows, pixels.shape[1] // self.cols
        self.pixels = pixels.copy()
        for cell in set(range(self.rows * self.cols)).difference(cells):
            row, col = divmod(cell, self.cols)
            self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = 0
        self._missing = 0


def sheet_tokens(tokens_by_cell: Mapping[int, np.ndarray], cell_count: int) -> np.ndarray:
    """Tokens (cell_count, L) of a sheet that is decoded as one.

    A cell without a picture gets one of the others: whatever stands there shows a little in the pictures beside it,
    and those look least odd beside their like.
    """
    present = list(tokens_by_cell.values())
    return np.stack([tokens_by_cell.get(cell, present[cell % len(present)]) for cell in range(cell_count)])
