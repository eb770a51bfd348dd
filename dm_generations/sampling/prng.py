"""Threefry-2x32-20, the counter-based generator behind all noise, and the keys of images.

A pure function of a key and a counter, each two words of 32 bits: no state, nothing that depends on the batch or on a
library that may change. It needs neither JAX nor NumPy: the arithmetic is written with operators that NumPy and JAX
arrays of uint32 share. `schema/sampling.md` specifies it with test vectors.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from typing import Any

WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # Skein's key schedule constant, lower word
_ROUND_GROUPS = 5  # of four rounds each


def threefry2x32(key0: Any, key1: Any, counter0: Any, counter1: Any) -> tuple[Any, Any]:
    """Return the two output words, element by element.

    Args:
        key0: First word of the key, as all arguments a uint32 array of NumPy or JAX, of shapes that broadcast.
        key1: Second word of the key.
        counter0: First word of the counter.
        counter1: Second word of the counter.
    """
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = counter0 + key0, counter1 + key1
    for group in range(_ROUND_GROUPS):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
    return x0, x1


class _Word(int):
    """A Python integer that wraps at 32 bits, so that `threefry2x32` also runs without any array library."""

    def __add__(self, other):
        return _Word(int(self) + int(other) & WORD)

    def __lshift__(self, count):
        return _Word(int(self) << count & WORD)

    def __rshift__(self, count):
        return _Word(int(self) >> count)

    def __or__(self, other):
        return _Word(int(self) | int(other))

    def __xor__(self, other):
        return _Word(int(self) ^ int(other))


def row_key(seed: int, index: int) -> tuple[int, int]:
    """Return the key of image `index` of `--seed seed`: each seed's images are the words of one stream.

    Distinct indices of one seed give distinct keys (a bijection).

    Args:
        seed: 0 to 2^64 - 1.
        index: 0 to 2^64 - 1.

    Returns:
        (key0, key1).
    """
    words = threefry2x32(_Word(seed >> 32), _Word(seed & WORD), _Word(index >> 32), _Word(index & WORD))
    return int(words[0]), int(words[1])


def key_index(seed: int, key0: int, key1: int) -> int:
    """Return the index for which `row_key(seed, index)` is this key: threefry, undone.

    >>> key_index(7, *row_key(7, 123))
    123

    A key that does not belong to the seed has an index too: any of 0 to 2^64 - 1, so hardly ever a small one.

    Args:
        seed: 0 to 2^64 - 1.
        key0: 0 to 2^32 - 1.
        key1: 0 to 2^32 - 1.
    """
    high, low = seed >> 32, seed & WORD
    keys = (high, low, high ^ low ^ _PARITY)
    x0, x1 = key0, key1
    for group in reversed(range(_ROUND_GROUPS)):
        x1 = x1 - keys[(group + 2) % 3] - (group + 1) & WORD
        x0 = x0 - keys[(group + 1) % 3] & WORD
        for rotation in reversed(_ROTATIONS[group % 2]):
            x1 ^= x0
            x1 = (x1 >> rotation) | (x1 << (32 - rotation) & WORD)
            x0 = x0 - x1 & WORD
    return (x0 - high & WORD) << 32 | (x1 - low & WORD)


def prng_key(seed: int) -> tuple[int, int]:
    """Return the words of `jax.random.PRNGKey(seed)`, for any whole number.

    As JAX gives it with 32-bit integers, its default: the lower 32 bits of the seed, and zeros above.
    """
    return 0, seed & WORD
