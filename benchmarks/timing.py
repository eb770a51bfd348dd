"""Measuring for the benchmarks: the best of some calls, and the rate of matrix products of a device."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dm_generations.runtime.device import matmul_precision


def seconds_of(function: Callable, repeats: int = 3) -> float:
    """Return the seconds of the best of some calls, without the first one, which compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_peak(dtype: str, size: int = 4096) -> float:
    """Return the operations a second of a large matrix product."""
    matrix = jnp.ones((size, size), dtype)
    with matmul_precision(dtype):
        return 2 * size**3 / seconds_of(lambda: matrix @ matrix)
