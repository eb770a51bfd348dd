"""A pool of threads that encode and write files, with a bounded queue and no lost errors."""

import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError, defer_sigint

QUEUE_PER_WORKER = 4  # enough to keep threads busy, few enough to bound memory
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no later file would fare better


class FileWriter:
    """Encodes and writes pictures in the background; a context manager that waits for the last one.

    A full or read-only disk ends the run with a UserError; what is queued then is given up.
    """

    def __init__(self, workers: int):
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        self._limit = QUEUE_PER_WORKER * workers
        self._pending: deque[tuple[Path, Future, Callable[[Exception | None], None]]] = deque()

    @defer_sigint()
    def submit(
        self, path: Path, encode: Callable[[], bytes | memoryview], done: Callable[[Exception | None], None]
    ) -> None:
        """Queue what `encode` gives for `path`; waits while the queue is full.

        `done` is called later in this thread, with None when the file is written and else with the error.
        """
        while self._pending and (self._pending[0][1].done() or len(self._pending) >= self._limit):
            self._settle(*self._pending.popleft())
        self._pending.append((path, self._pool.submit(_write_file, path, encode), done))

    def __enter__(self) -> "FileWriter":
        return self

    @defer_sigint()
    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            while error is None and self._pending:
                self._settle(*self._pending.popleft())
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _settle(self, path: Path, future: Future, done: Callable[[Exception | None], None]) -> None:
        error = future.exception()
        raise_if_hopeless(path, error)
        if error is not None and not isinstance(error, Exception):
            raise error
        done(error)


def raise_if_hopeless(path: Path, error: BaseException | None) -> None:
    """UserError if `error`, of writing `path`, is one that every later file would meet."""
    if isinstance(error, OSError) and error.errno in _HOPELESS:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room and run the same command again to go on"
        ) from error


def _write_file(path: Path, encode: Callable[[], bytes | memoryview]) -> None:
    data = encode()
    try:
        write_atomic(path, data)
    except FileNotFoundError:  # the first picture of a prompt
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
