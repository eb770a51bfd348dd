"""How many pictures fit into the memory of a device at a time."""

import math
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

# Pixels of a batch beyond which more are no faster: a CPU is busy with a picture, a GPU with some dozens.
_ENOUGH_PIXELS = {"cpu": 1 << 20}
_ENOUGH_PIXELS_ELSEWHERE = 1 << 24
_MAPS = 6  # of the largest one: what a convolution reads, adds and writes, and the workspace of its library
_SHARE = 0.5  # of the free memory; the next batch is under way while the last one is fetched


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fitting_batch_size(
    decode: Callable[[jax.Array], jax.Array], token_count: int, image_size: int, devices: Sequence[jax.Device]
) -> int:
    """A power of two: pictures for each device to decode at a time. An estimate; nothing is computed.

    decode: tokens (b, L) uint16 to pictures, as JAX traces it
    """
    pixels = _ENOUGH_PIXELS.get(devices[0].platform, _ENOUGH_PIXELS_ELSEWHERE)
    enough = max(1, pixels // image_size**2)
    traced = jax.make_jaxpr(decode)(jax.ShapeDtypeStruct((1, token_count), np.uint16))
    largest = max(_sizes(traced.jaxpr))
    free = min(map(_free_bytes, devices)) / (len(devices) if devices[0].platform == "cpu" else 1)
    fitting = max(1, int(free * _SHARE / (largest * _MAPS)))
    return 1 << int(math.log2(min(enough, fitting)))


def _sizes(jaxpr) -> Iterator[int]:
    """Bytes of everything that a traced function computes."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) * out.aval.dtype.itemsize for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _sizes(inner)


def _free_bytes(device: jax.Device) -> int:
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
