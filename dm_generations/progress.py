"""How far a long command is: a bar on a terminal, now and then a plain line elsewhere. On stderr."""

import contextlib
import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """Counts pictures up to `total`; a context manager."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # when pictures first came, and how many
        self._bar = tqdm(total=total, unit="pictures", smoothing=0.05) if sys.stderr and sys.stderr.isatty() else None

    def advance(self, pictures: int) -> None:
        """So many more are done, whether well or not."""
        if not pictures:
            return
        self._done += pictures
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(pictures)
        elif self._first is None:  # most of the time until now went into loading and compiling
            self._first, self._last_line = (now, self._done), now
        elif self._done < self._total and now - self._last_line >= _LINE_EVERY_S:
            since, count = self._first
            rate = (self._done - count) / (now - since)
            left = (self._total - self._done) / rate
            self._last_line = now
            self.say(f"{self._done:,} of {self._total:,} pictures, {rate:.1f} a second, {left:,.0f} s left")

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar. Where it goes to a full disk, say, the work goes on without it."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()
