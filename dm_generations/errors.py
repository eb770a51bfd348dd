"""Errors that a user can cause, which the command line prints as one line, and Ctrl-C."""

import atexit
import contextlib
import os
import reprlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT  # exit status of a program that Ctrl-C ended
INTERRUPTED_LINE = "interrupted; repeat the command to do the rest"

# Callbacks that remove temporary files when the process ends, also when it ends without Python's own clean-up.
EXIT_CALLBACKS = contextlib.ExitStack()
atexit.register(EXIT_CALLBACKS.close)


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


def handle_sigint() -> None:
    """Let Ctrl-C raise KeyboardInterrupt once, and end the process at once after that or within an import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, _interrupt)


def exit_interrupted(signal_number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    """End the process with a line on stderr, without waiting for threads; also a signal handler."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.write(2, f"{INTERRUPTED_LINE}\n".encode())
    EXIT_CALLBACKS.close()
    os._exit(INTERRUPTED)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):  # a module in C can crash of an exception there, or lose it
        exit_interrupted()
    signal.signal(signal.SIGINT, exit_interrupted)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def defer_sigint() -> Iterator[None]:
    """Defer Ctrl-C to the end of a block, or of a function that this decorates.

    For calls of thread pools: the standard library takes their locks in Python, and a KeyboardInterrupt between taking
    a lock and recording that leaves it taken. A thread that waits for it then never ends.
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
