"""Weights onto the devices, and the precision that networks compute with.

The arrays of a checkpoint are views of mapped files. Pages that have been copied are released while the copying goes
on, so that loading N bytes of weights takes little more than N bytes of memory. Weights that need no copy (float32 on
a CPU) are read from the disk when they are first used, and shared with other processes.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from dm_generations.runtime.device import WEIGHTS_ADVICE, memory_errors
from dm_generations.weights.mmap import is_immutable, release

CHUNK_BYTES = 1 << 25  # between two releases: a call for each small tensor would cost more than it saves
_ALIGNMENT = 64  # bytes, of arrays that JAX takes over on a CPU instead of copying them


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
        UserError: The weights do not fit into memory.
    """
    leaves, structure = jax.tree.flatten(params)
    on_device, unreleased = [], []
    for leaf in leaves:
        leaf = np.asarray(leaf)
        target = np.dtype(dtype if leaf.ndim > 1 else np.float32)
        # Never the mapped memory of other files: somebody may write them anew while the program runs.
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
