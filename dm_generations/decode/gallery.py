"""Pictures laid out on one sheet: a grid filled row by row, best first, black where there is none.

H, W: pixels of one picture
"""

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
