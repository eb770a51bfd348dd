"""Computations beside each other on a CPU.

XLA computes what one thread asks for in turn, and the layers of a small model leave cores idle: two batches, each asked
for by a thread of its own, take little longer than one.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax

from dm_generations.interrupts import uninterrupted

_T = TypeVar("_T")
_ON_A_CPU = 2


def count_at_once(devices: Sequence[jax.Device]) -> int:
    """Batches to compute beside each other on these devices."""
    return _ON_A_CPU if len(devices) == 1 and devices[0].platform == "cpu" else 1


class Beside(Generic[_T]):
    """A computation in a thread of its own.

    compute: waits for what it computes   slots: as many of several run at a time; None for all
    """

    def __init__(self, compute: Callable[[], _T], slots: threading.Semaphore | None = None):
        self._found: _T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(compute, slots or contextlib.nullcontext()))
        with uninterrupted():
            self._thread.start()

    def result(self) -> _T:
        """Wait for it. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self, compute: Callable[[], _T], slots: contextlib.AbstractContextManager) -> None:
        try:
            with slots:
                self._found = compute()
        except BaseException as error:
            self._error = error
