"""Where the golden files are: values recorded from the original programs, each folder with a README.

The full set lies beside a checkout (`../shared/golden`); `tests/golden` holds what the tests need of it.
"""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_FOLDERS = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")


def golden_dirs(name: str) -> list[Path]:
    """All places that have these golden files, the fuller one first."""
    return [folder / name for folder in GOLDEN_FOLDERS if (folder / name).is_dir()]


def golden(name: str) -> Path:
    """The fullest set of these golden files; FileNotFoundError if there is none."""
    found = golden_dirs(name)
    if not found:
        raise FileNotFoundError(f"no golden files {name!r} in {' or '.join(map(str, GOLDEN_FOLDERS))}")
    return found[0]


def first_fast(cases: Iterable) -> list:
    """The first case for the fast set, the others for e2e."""
    return [pytest.param(case, marks=[pytest.mark.e2e] * (number > 0)) for number, case in enumerate(cases)]


def first_of(cases: Iterable, count: int = 1) -> list:
    """The first cases as they are, the others slow: for tests of several seconds whose cases are much alike."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (number >= count))
        for number, case in enumerate(cases)
    ]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer. Needs SIGALRM."""

    def stop(number, frame):
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
