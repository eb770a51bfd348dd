"""Devices: their free memory, cores, parameters on them, and batches that shrink when memory runs out.

The arrays of a checkpoint are views of mapped files. Pages that have been copied are released while the copying goes
on, so that loading N bytes of weights takes little more than N bytes of memory. Weights that need no copy (float32 on
a CPU, except what `models.base` splits) are read from the disk when they are first used, and shared with other
processes.
"""

import collections
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from dm_generations.errors import UserError, defer_sigint
from dm_generations.weights.mmap import is_immutable, release

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")
_CPU_CONCURRENCY = 2  # the layers of a small model leave cores idle: two batches take little longer than one
WEIGHTS_ADVICE = "the weights of the model are too large: use a smaller model, --dtype bfloat16 or --cpu-only"
UNKNOWN_HOST_BYTES = 4 << 30  # of a small machine
CHUNK_BYTES = 1 << 25  # between two releases: a call for each small tensor would cost more than it saves
_ALIGNMENT = 64  # bytes, of arrays that JAX takes over on a CPU instead of copying them


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batch_concurrency(devices: Sequence[jax.Device]) -> int:
    """Return how many batches to compute at the same time on these devices."""
    return _CPU_CONCURRENCY if len(devices) == 1 and devices[0].platform == "cpu" else 1


@dataclass(frozen=True)
class Work(Generic[_Batch, _Result]):
    """What `BatchRunner` computes.

    Attributes:
        count: Number of items.
        take: (first item, size) -> the batch that starts there, and the number of its last item plus one.
        compute: Batch -> result, which may still be on its way as an array of JAX.
        in_turn: Whether batches are computed one after the other, in the thread that asks for them.
        program: Name of what is compiled for `compute`.
    """

    count: int
    take: Callable[[int, int], tuple[_Batch, int]]
    compute: Callable[[_Batch], _Result]
    in_turn: bool = False
    program: str = ""


class _Job(NamedTuple):
    first: int
    size: int
    in_pool: bool
    future: Future


class BatchRunner:
    """Computes batches, and retries with smaller ones when a device runs out of memory.

    Attributes:
        size: Items of a batch.
        concurrency: Batches that are computed at the same time, each in a thread of its own.
    """

    def __init__(self, size: int, concurrency: int, error_message: str, step: int = 1):
        """Start with these values.

        Args:
            size: Items of a batch.
            concurrency: Batches at the same time.
            error_message: Of the UserError when memory does not hold the smallest batch.
            step: The smallest batch; `size` stays a multiple of it.
        """
        self.size, self.concurrency = size, concurrency
        self._error_message, self._step = error_message, step
        self._pool = ThreadPoolExecutor(concurrency)  # its threads start when they are needed
        self._compiled: set[tuple[str, int]] = set()  # programs and sizes; the first batch compiles, alone

    def run(self, work: Work[_Batch, _Result]) -> Iterator[_Result]:
        """Start the first batches now, and return an iterator over the results of all, in order.

        Raises:
            UserError: Memory is too small for the smallest batch. Other errors of `work.compute` are passed on.
        """
        jobs: collections.deque[_Job] = collections.deque()
        ahead = self._start(work, jobs, 0)
        return self._results(work, jobs, ahead)

    def _results(self, work: Work[_Batch, _Result], jobs: collections.deque[_Job], ahead: int) -> Iterator[_Result]:
        try:
            while jobs:
                job = jobs.popleft()
                try:
                    result = jax.block_until_ready(job.future.result())
                except jax.errors.JaxRuntimeError as error:
                    was_alone = not job.in_pool and not jobs
                    while jobs:  # else they would share the memory with the retry
                        with contextlib.suppress(jax.errors.JaxRuntimeError):
                            jax.block_until_ready(jobs.popleft().future.result())
                    self._shrink(error, job.size, was_alone)
                    ahead = self._start(work, jobs, job.first)
                else:
                    ahead = self._start(work, jobs, ahead)
                    yield result
        finally:
            for job in jobs:
                job.future.cancel()

    def _start(self, work: Work[_Batch, _Result], jobs: collections.deque[_Job], first: int) -> int:
        """Start as many batches as may be under way, from item `first` on; return the first item that is left."""
        limit = 1 if work.in_turn else self.concurrency
        while first < work.count and len(jobs) < limit:
            batch, end = work.take(first, self.size)
            in_pool = self.concurrency > 1 and not work.in_turn and (work.program, self.size) in self._compiled
            future = self._submit(work, batch, in_pool)
            jobs.append(_Job(first, self.size, in_pool, future))
            first = end
            if future.done() and future.exception() is not None:
                break
        return first

    def _submit(self, work: Work[_Batch, _Result], batch: _Batch, in_pool: bool) -> Future:
        if in_pool:
            with defer_sigint():
                return self._pool.submit(lambda: jax.block_until_ready(work.compute(batch)))
        future: Future = Future()
        try:
            future.set_result(work.compute(batch))
            self._compiled.add((work.program, self.size))
        except jax.errors.JaxRuntimeError as error:
            future.set_exception(error)
        return future

    def _shrink(self, error: jax.errors.JaxRuntimeError, size: int, was_alone: bool) -> None:
        """Compute less at a time, after a batch of `size` failed, alone or among others."""
        if not is_out_of_memory(error):
            raise error
        if not was_alone and self.concurrency > 1:
            self.concurrency = 1
        elif size <= self._step:
            raise UserError(self._error_message) from error
        else:
            self.size = min(self.size, -(-size // 2 // self._step) * self._step)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device had too little memory. JAX has no exception of its own for that."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn a lack of memory, of a device or of the host, into a UserError. Also a decorator.

    Args:
        advice: What to do about it.

    Raises:
        UserError: Memory ran out.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(f"not enough memory on this machine; {advice}") from error
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"not enough memory on the device; {advice}") from error


def largest_array_bytes(jaxpr: Jaxpr) -> int:
    """Return the bytes of the largest array that a traced function computes, on one device."""
    return max(_array_bytes(jaxpr))


def _array_bytes(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) * out.aval.dtype.itemsize for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _array_bytes(getattr(inner, "jaxpr", inner))


def free_bytes_of_each(devices: Sequence[jax.Device]) -> float:
    """Return the bytes that new arrays can take on every one of these devices at once.

    Devices of a CPU share the memory of the host.
    """
    free = min(map(free_bytes, devices))
    return free / len(devices) if devices[0].platform == "cpu" else free


def free_bytes(device: jax.Device) -> int:
    """Return the bytes that new arrays can take on a device: in its own memory or, for a CPU, in the host's."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return _free_host_bytes()


def _free_host_bytes() -> int:
    with contextlib.suppress(OSError):  # Linux; includes pages of files, which it gives up when memory is asked for
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS tells what there is, not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return UNKNOWN_HOST_BYTES  # Windows has no sysconf


# Parameters.


@memory_errors(WEIGHTS_ADVICE)
def put_params(params: dict, dtype: Any = np.float32, sharding: jax.sharding.Sharding | None = None) -> dict:
    """Put the parameters of a network on its devices.

    Args:
        params: Nested dict of NumPy arrays.
        dtype: Of matrices. Vectors (norms and biases) become float32, which costs nothing.
        sharding: Where to put them; None is the default device.

    Returns:
        A dict of the same structure with arrays of JAX.

    Raises:
        UserError: Memory is too small for the weights.
    """
    leaves, structure = jax.tree.flatten(params)
    on_device, unreleased = [], []
    for leaf in leaves:
        leaf = np.asarray(leaf)
        target = np.dtype(dtype if leaf.ndim > 1 else np.float32)
        # Never the mapped memory of other files: another program may rewrite them at any time.
        is_usable = leaf.dtype == target and is_immutable(leaf)
        on_device.append(jax.device_put(leaf if is_usable else _copy(leaf, target), sharding))
        unreleased.append(leaf)
        if sum(view.nbytes for view in unreleased) >= CHUNK_BYTES:
            release(unreleased)
            unreleased.clear()
    release(unreleased)
    return jax.tree.unflatten(structure, jax.block_until_ready(on_device))


def _copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Copy to contiguous `dtype`; of a large array, the pages it lies on are released on the way."""
    size = array.size * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    copy = raw[start : start + size].view(dtype).reshape(array.shape)
    if array.nbytes <= CHUNK_BYTES:
        copy[...] = array
        return copy
    # Along the axis that is slowest in the file, also of a transposed view, so that each page is read once.
    axis = max(range(array.ndim), key=lambda i: abs(array.strides[i]))
    count = max(1, array.shape[axis] * CHUNK_BYTES // array.nbytes)
    for first in range(0, array.shape[axis], count):
        part = (slice(None),) * axis + (slice(first, first + count),)
        copy[part] = array[part]
        release([array])
    return copy


def matmul_precision(dtype: Any) -> AbstractContextManager:
    """Return a context in which traced matrix products keep all bits of float32.

    JAX's default would round the factors first: to 10 bits on a GPU (TF32), to 7 on a TPU. For activations of 16 bits
    it is the default, which loses none of theirs.

    Args:
        dtype: Of the activations.
    """
    return jax.default_matmul_precision("highest" if np.dtype(dtype).itemsize >= 4 else "default")
