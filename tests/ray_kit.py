"""A real Ray cluster of this machine, and a stand-in for a pool on one."""

import argparse
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from helpers import ROOT

from dm_generations.errors import UserError

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # as the commands do: nothing of its own on stdout
    "RAY_worker_niceness": "0",  # else a machine with other work lets them wait
}


def make_square(args: argparse.Namespace) -> Callable[[int], int]:
    """What the workers of `ray_squares.py` do, with its arguments."""

    def square(number: int) -> int:
        is_killed = args.always or not list(args.folder.glob(f"{number}-*"))
        tempfile.mkstemp(prefix=f"{number}-", dir=args.folder)
        if number in args.killed and is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if number in args.refused:
            raise UserError(f"{number} is refused")
        time.sleep(args.seconds)
        return number**2

    return square


class PickledPool:
    """Does in this process what a pool of one does: all that goes to a worker, and comes back, is pickled."""

    def map(self, make: Callable[[], Callable], work: Iterable) -> Iterator[Any]:
        function = pickle.loads(pickle.dumps(make))()
        return (pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(item))))) for item in work)


class RayCluster:
    """A cluster of one node with one CPU, in processes of their own.

    Attributes:
        address: For --ray.
    """

    def __init__(self) -> None:
        program = ROOT / "tests" / "programs" / "ray_cluster.py"
        self._process = subprocess.Popen(
            [sys.executable, program],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the cluster did not start"

    def add_node(self) -> None:
        """Start one more node."""
        self._order("add")

    def lose_node(self) -> None:
        """Kill all processes of the last node."""
        self._order("lose")

    def workers(self) -> list[int]:
        """Numbers of the processes that hold the models."""
        return [pid for pid in _descendants(self._process.pid) if b"MapWorker" in _read(f"/proc/{pid}/cmdline")]

    def close(self) -> None:
        """End all its processes."""
        assert self._process.stdin is not None
        try:
            self._process.communicate(timeout=60)  # closes its stdin
        finally:
            self._process.kill()
            self._process.wait()

    def _order(self, word: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline().strip() == word


def wait_for(happens: Callable[[], Any], seconds: float = 300) -> Any:
    """Return what `happens` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def _descendants(pid: int) -> list[int]:
    """Numbers of the processes that a process started, and of those that these started."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _read(f"/proc/{name}/stat").rpartition(b")")[2].split()):
            parents[int(name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
