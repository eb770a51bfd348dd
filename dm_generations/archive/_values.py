"""Values as SQLite gives them to the records of this package. Those of a 2022 archive can be of any type."""

import dataclasses
from pathlib import Path

from dm_generations.archive._layout import SETTINGS
from dm_generations.archive._records import ImageRow, Settings
from dm_generations.archive._sqlite import ArchiveError

SETTINGS_TYPES = (int, int, int, float, float, float)
REAL_SETTINGS = ("top_p", "temperature", "cond_scale")


def settings_of(values: tuple, path: Path) -> Settings:
    """Settings from the six columns of a group. ArchiveError, naming the file, for values that are no settings."""
    if tuple(map(type, values)) == SETTINGS_TYPES:
        return Settings(*values)
    for name, value in zip(SETTINGS, values, strict=True):
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not is_whole and not (isinstance(value, float) and name in REAL_SETTINGS):
            raise ArchiveError(f"{path}: some pictures have {name} {value!r:.40}; `verify` lists them")
    return Settings(*(convert(value) for convert, value in zip(SETTINGS_TYPES, values, strict=True)))


def image_row(values: tuple) -> ImageRow:
    """A picture from its columns, in the order of `ImageRow`."""
    row = ImageRow(*values)
    # Not a blob, so certainly not tokens: as no bytes at all it fails every length check downstream.
    return row if isinstance(row.quantvec, bytes) else dataclasses.replace(row, quantvec=b"")


def text_of(value: object) -> str | None:
    """A prompt. Bytes that are not UTF-8 become U+FFFD; NULL is None."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)
