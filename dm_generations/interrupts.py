"""Ctrl-C, kept away from where it would do harm."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
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
