"""Matrix products as exact as their type."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np


def matmul_precision(dtype: Any) -> AbstractContextManager:
    """Within it, what is traced with activations of `dtype` multiplies all bits of float32.

    JAX's default would round the factors first: to 10 bits on a GPU (TF32), to 7 on a TPU. Activations of 16 bits keep
    the default, which loses nothing of theirs.
    """
    return jax.default_matmul_precision("highest" if np.dtype(dtype).itemsize >= 4 else "default")
