"""Errors that a user can cause, which the command line prints as one line, and Ctrl-C."""

import contextlib
import reprlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Base of every error raised on purpose; its text says what, where and what to do, in one line."""


def one_line(error: BaseException) -> str:
    """What another library's error says, for a part of such a text: at most 200 characters."""
    return " ".join(str(error).split())[:200]


class _ShortRepr(reprlib.Repr):
    """Cuts while it walks, so that a value in which a few lists hold each other many times costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4

    def repr_instance(self, x: Any, level: int) -> str:
        return self.repr_dict(x, level) if isinstance(x, dict) else super().repr_instance(x, level)


def short_repr(value: Any) -> str:
    """Return what a file gave as a value, for a part of such a text: one line of at most 80 characters."""
    return " ".join(_ShortRepr().repr(value).split())[:80]


@contextlib.contextmanager
def defer_sigint() -> Iterator[None]:
    """Within it, or a function that it decorates, Ctrl-C waits, and comes at the end.

    For calls of pools and other threads: the standard library takes their locks in Python, and a KeyboardInterrupt
    between taking one and noting it leaves it taken. A thread that needs it then never ends, and who waits for that
    thread neither.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no KeyboardInterrupt can come here
        return
    came = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
