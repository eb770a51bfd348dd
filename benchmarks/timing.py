"""What benchmarks measure with: the best of some calls, and the device's matrix peak."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def seconds_of(function: Callable, repeats: int = 3) -> float:
    """The best of some calls; the first, which compiles, is left out."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return min(times)


def matrix_peak(dtype: str, size: int = 4096) -> float:
    """Operations a second of a large matrix product: what the device can do at best."""
    matrix = jnp.ones((size, size), dtype)
    return 2 * size**3 / seconds_of(lambda: matrix @ matrix)
