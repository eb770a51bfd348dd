"""Memory that each thread keeps, for work that is done over and over."""

import math
import threading

import numpy as np

_held = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of this thread, with whatever it held; the next call with this `name` gives the same memory again.

    Memory that is new at each call would cost as much time again, in page faults, and threads would queue for it.
    """
    count = math.prod(shape)
    held = getattr(_held, name, None)
    if held is None or held.dtype != dtype or len(held) < count:
        held = np.empty(count, dtype)
        setattr(_held, name, held)
    return held[:count].reshape(shape)
