"""Errors that a user can cause, which the command line prints as one line, text for it, and SIGINT (Ctrl-C)."""

import atexit
import contextlib
import difflib
import os
import reprlib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT  # exit status of a program that Ctrl-C ended
INTERRUPTED_LINE = "interrupted; repeat the command to go on"

MAX_TEXT = 100  # characters of a prompt on a terminal
MAX_COMPARED, MAX_COMPARED_CHARACTERS = 2000, 200  # texts and their characters that a mistyped one is compared with

# Callbacks that remove temporary files when the process ends, also when it ends without Python's own clean-up.
EXIT_CALLBACKS = contextlib.ExitStack()
atexit.register(EXIT_CALLBACKS.close)


class UserError(Exception):
    """Bad input, or a problem that the user can solve. The text is one line: what, where, and what to do."""


def one_line(error: BaseException) -> str:
    """Return the text of another library's error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Escape and shorten untrusted text for a terminal.

    Args:
        text: Any text, also with control characters.
        limit: Characters at most.
    """
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'a rocket'?" for a mistyped text, "" where nothing known is like it."""
    wanted = text.casefold()[:MAX_COMPARED_CHARACTERS]
    by_folded: dict[str, str] = {}
    similar: list[str] = []
    for name in known:
        folded = name.casefold()[:MAX_COMPARED_CHARACTERS]
        if len(by_folded) < MAX_COMPARED:
            by_folded.setdefault(folded, name)
        if wanted and (wanted == folded or wanted in folded):
            similar.append(name)
    similar.sort(key=len)
    similar += [by_folded[folded] for folded in difflib.get_close_matches(wanted, by_folded)]
    listed = list(dict.fromkeys(similar))[:3]
    return f"; did you mean {' or '.join(f'{name!r:.100}' for name in listed)}?" if listed else ""


class _ShortRepr(reprlib.Repr):
    """Shortens at every level, so that lists which repeat each other many times take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4

    def repr_instance(self, x: Any, level: int) -> str:
        return self.repr_dict(x, level) if isinstance(x, dict) else super().repr_instance(x, level)


def short_repr(value: Any) -> str:
    """Return the `repr` of a value from a file, shortened to one line of at most 80 characters."""
    return " ".join(_ShortRepr().repr(value).split())[:80]


def handle_sigint() -> None:
    """Let Ctrl-C raise KeyboardInterrupt once, and end the process at once after that or within an import."""
    sys.unraisablehook = _exit_if_interrupted
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, _interrupt)


def was_interrupted() -> bool:
    """Return whether Ctrl-C has raised KeyboardInterrupt."""
    return signal.getsignal(signal.SIGINT) is exit_interrupted


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


def _exit_if_interrupted(unraisable: Any) -> None:
    """Hear of Ctrl-C also where Python would only print it: in a finalizer, or a callback that C calls."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        exit_interrupted()
    sys.__unraisablehook__(unraisable)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def defer_sigint() -> Iterator[None]:
    """Defer SIGINT (Ctrl-C) until the end of the block, or of the function that it decorates.

    For calls of thread pools: the standard library takes locks in Python code, and a KeyboardInterrupt in the middle of
    that leaves a lock taken. Then every thread that needs it waits for ever.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no KeyboardInterrupt is raised here
        return
    received: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
