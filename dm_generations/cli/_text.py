"""Values as text for a terminal."""

import datetime

MAX_TEXT = 100  # characters of a prompt


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Text of a stranger, fit for a terminal: control characters escaped, cut to `limit` characters."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text[: limit + 1]
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def file_size(byte_count: int) -> str:
    """12,345,678 -> "12.3 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if byte_count >= size:
            return f"{byte_count / size:.1f} {unit}"
    return f"{byte_count} bytes"


def utc_time(seconds: float) -> str:
    """UTC Unix seconds as "2022-07-12 10:06:41 UTC"; the number itself where it is no date."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1, "image" -> "1 image"; 2,000 -> "2,000 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"
