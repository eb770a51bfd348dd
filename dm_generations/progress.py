"""Progress of a long command on stderr: a bar on a terminal, otherwise a plain line every 10 seconds."""

import contextlib
import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """Counts finished images; a context manager."""

    def __init__(self, total: int):
        """Show nothing yet.

        Args:
            total: Number of images.
        """
        self._total, self._done = total, 0
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # when the first images were done, and how many
        self._bar = tqdm(total=total, unit=" images", smoothing=0.05) if sys.stderr and sys.stderr.isatty() else None

    def advance(self, images: int) -> None:
        """Count this many more images as finished, also if they failed."""
        if not images:
            return
        self._done += images
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(images)
        elif self._first is None:  # most of the time so far was loading and compiling
            self._first, self._last_line = (now, self._done), now
        elif self._done < self._total and now - self._last_line >= _LINE_EVERY_S:
            since, count = self._first
            rate = (self._done - count) / (now - since)
            left = (self._total - self._done) / rate
            self._last_line = now
            self.say(f"{self._done:,} of {self._total:,} images, {rate:.1f} images/s, {left:,.0f} s left")

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar. An error, as of a full disk, does not stop the work."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
