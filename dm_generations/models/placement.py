"""Weights onto the device: those of our own folder as the mapped file has them, others piece by piece.

The arrays of a checkpoint are views of mapped files. Pages that have been copied are given back while the copying
goes on, so that loading N bytes of weights takes little more than N bytes of memory. What needs no copy, in float32
on a CPU, is read from the disk when it is first computed with, and shared with other processes.
"""

from typing import Any

import jax
import numpy as np

from dm_generations.models.checkpoints.mapped import release, stays

_PIECE = 1 << 25  # bytes between two releases: a call for each small tensor would cost more than it saves
_ALIGNMENT = 64  # of arrays that JAX takes over on a CPU instead of copying them


def placed(params: dict, dtype: Any = np.float32, where: jax.sharding.Sharding | None = None) -> dict:
    """`params`, a nested dict of NumPy arrays, on the default device or `where`, as a network computes with them.

    Matrices become `dtype`; vectors (norms and biases) float32, which costs nothing.
    """
    leaves, structure = jax.tree.flatten(params)
    on_device, unreleased = [], []
    for leaf in leaves:
        leaf = np.asarray(leaf)
        target = np.dtype(dtype if leaf.ndim > 1 else np.float32)
        # Of other files never the mapped memory itself: somebody may write them anew while the program runs.
        is_usable = leaf.dtype == target and stays(leaf)
        on_device.append(jax.device_put(leaf if is_usable else _copied(leaf, target), where))
        unreleased.append(leaf)
        if sum(view.nbytes for view in unreleased) >= _PIECE:
            release(unreleased)
            unreleased.clear()
    release(unreleased)
    return jax.tree.unflatten(structure, jax.block_until_ready(on_device))


def _copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy as `dtype`; of a large array, the pages it lies on are released on the way."""
    size = array.size * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    copy = raw[start : start + size].view(dtype).reshape(array.shape)
    if array.nbytes <= _PIECE:
        copy[...] = array
        return copy
    # Along the axis that is slowest in the file, also of a transposed view, so that each page is read once.
    axis = max(range(array.ndim), key=lambda i: abs(array.strides[i]))
    count = max(1, array.shape[axis] * _PIECE // array.nbytes)
    for first in range(0, array.shape[axis], count):
        piece = (slice(None),) * axis + (slice(first, first + count),)
        copy[piece] = array[piece]
        release([array])
    return copy
