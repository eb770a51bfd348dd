"""Files as read-only memory: arrays that are views of them, and pages released once they have been copied.

A page of a mapped file counts as memory of the process from its first reading until it is released. Whoever copies
a large file array by array, and releases in between, needs the memory of the copy and little more.
"""

import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError

MAX_DIMENSIONS = 32  # of an array, in any format: more than weights have, and no more than any NumPy takes

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Malformed(ValueError):
    """What is wrong with the content of a file; its reader adds the name."""


class _Mapping(mmap.mmap):
    is_immutable = False


class MappedFile:
    """The bytes of a file, mapped read-only. Arrays keep the mapping alive, this object does not have to.

    Attributes:
        path: The file.
        size: Of the file, in bytes.
        content: The mapped bytes.
    """

    def __init__(self, path: str | os.PathLike, is_immutable: bool = False) -> None:
        """Map a file.

        Args:
            path: The file.
            is_immutable: The file is only ever replaced, never written in place, so that its bytes stay the same for
                as long as they are mapped.

        Raises:
            UserError: The file cannot be read, is empty, or is a pointer of Git LFS.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise UserError(f"{self.path} is empty: download it again")
                self.content = _Mapping(file.fileno(), self.size, access=mmap.ACCESS_READ)
                self.content.is_immutable = is_immutable
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        refuse_lfs_pointer(self.path, self.content[: len(_LFS_POINTER)])

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Return a C-ordered array of the file as a read-only view.

        Args:
            offset: Where it starts, in bytes.
            dtype: Of the array, with its byte order.
            shape: Of the array.

        Raises:
            UserError: The file ends before the array does, or the shape is not one.
        """
        dtype = np.dtype(dtype)
        # without the ones for zeros, an empty array could have sides that NumPy cannot count
        extent = math.prod(max(size, 1) for size in shape) * dtype.itemsize
        end = offset if 0 in shape else offset + extent
        sizes_fit = len(shape) <= MAX_DIMENSIONS and min(shape, default=0) >= 0 and extent <= 2**62
        if offset < 0 or not sizes_fit or end > self.size:
            raise UserError(f"{self.path} is damaged: an array of shape {short_shape(shape)} is larger than it")
        return np.ndarray(shape, dtype, self.content, offset)


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Raise UserError for what Git LFS has in place of a large file, which begins with `content`."""
    if content.startswith(_LFS_POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")


def is_apple_double(path: Path) -> bool:
    """Return whether this is what macOS writes next to a file for its attributes, under the same ending."""
    return path.name.startswith("._")


def is_immutable(array: np.ndarray) -> bool:
    """Whether `array` is a view of a file that is never written in place."""
    mapping = _mapping(array)
    return mapping is not None and mapping.is_immutable


def release(arrays: Iterable[np.ndarray]) -> None:
    """Let the pages of the files behind these arrays leave the process; arrays without a file are passed over.

    Another use of the arrays reads the files another time.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # on Windows
        return
    for mapping in {id(mapping): mapping for mapping in map(_mapping, arrays) if mapping is not None}.values():
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: np.ndarray) -> _Mapping | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Mapping) else None


def short_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as a short text for a message, whatever a file made of it."""
    return "x".join(f"{size:#x}" if abs(size) > 2**63 else str(size) for size in shape[:8]) or "()"
