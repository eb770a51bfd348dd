"""How many pictures fit into the memory of a device at a time."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from dm_generations.errors import UserError

# Pixels of a batch beyond which more are no faster: a CPU is busy with a picture, a GPU with some dozens.
_ENOUGH_PIXELS = {"cpu": 1 << 20}
_ENOUGH_PIXELS_ELSEWHERE = 1 << 24
_MAPS = 6  # of the largest one: what a convolution reads, adds and writes, and the workspace of its library
_UNKNOWN_HOST_BYTES = 4 << 30  # of a small machine
_SHARE = 0.5  # of the free memory; the next batch is under way while the last one is fetched


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory: JAX has no exception of its own for that."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fitting_batch_size(largest: int, image_size: int, devices: Sequence[jax.Device]) -> int:
    """A power of two: pictures for each device to decode at a time. An estimate.

    largest: `largest_bytes` of decoding one
    """
    pixels = _ENOUGH_PIXELS.get(devices[0].platform, _ENOUGH_PIXELS_ELSEWHERE)
    enough = max(1, pixels // image_size**2)
    fitting = max(1, int(free_bytes_of_each(devices) * _SHARE / (largest * _MAPS)))
    return 1 << int(math.log2(min(enough, fitting)))


def check_fits(largest: int, device: jax.Device, what: str) -> None:
    """UserError where decoding a `what` takes more memory than `device` has left, by an estimate from `largest_bytes`.

    For what grows faster than its pixels: the attention of a sheet holds a number for each two of its codes. A CPU
    that is asked for too much may grant it, and end the program later.
    """
    needed = 2 * largest  # what the largest step reads and writes
    if needed > (free := free_bytes(device)):
        raise UserError(
            f"a {what} takes {needed / 1e9:,.0f} GB to decode as one, and {free / 1e9:,.1f} GB are free; "
            "put fewer pictures on it"
        )


def largest_bytes(decode: Callable[[jax.Array], jax.Array], item: tuple[int, ...]) -> int:
    """Bytes of the largest array in decoding tokens (1, *item) uint16; nothing is computed.

    decode: tokens (b, *item) to pictures, as JAX traces it
    """
    traced = jax.make_jaxpr(decode)(jax.ShapeDtypeStruct((1, *item), np.uint16))
    return max(_sizes(traced.jaxpr))


def _sizes(jaxpr) -> Iterator[int]:
    """Bytes of everything that a traced function computes."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) * out.aval.dtype.itemsize for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _sizes(getattr(inner, "jaxpr", inner))


def free_bytes_of_each(devices: Sequence[jax.Device]) -> float:
    """Bytes that new arrays can take on every one of these devices at once; devices of a CPU share the host's."""
    free = min(map(free_bytes, devices))
    return free / len(devices) if devices[0].platform == "cpu" else free


def free_bytes(device: jax.Device) -> int:
    """Bytes that new arrays on a device can take, in its own memory or, of a CPU, in the host's."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return _free_host_bytes()


def _free_host_bytes() -> int:
    with contextlib.suppress(OSError):  # Linux; pages of files count, which it gives up when memory is asked for
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS tells what there is, not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN_HOST_BYTES  # Windows has no sysconf
