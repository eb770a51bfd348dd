"""The noise that dalle-mini's own `generate` draws with: JAX's keys and Gumbel numbers of 2022, made from Threefry.

dalle-mini calls `jax.random.categorical` with one key for all prompts of a call. What a JAX of today gives for that
key depends on its version and flags (since 0.5, `jax_threefry_partitionable` is on and gives other numbers), so the
numbers are made here, from the same counters as JAX without that flag. All functions can be traced.

S: leading axes   B: rows   V: columns of the logits

Source: JAX 0.3.25, `jax/_src/prng.py` (`threefry_seed`, `threefry_split`, `threefry_2x32`) and
`jax/_src/random.py` (`uniform`, `gumbel`).
"""

import jax
import jax.numpy as jnp

from dm_generations.threefry import WORD, threefry2x32

__all__ = ["call_gumbel", "prng_key", "row_gumbel", "split"]

_MANTISSA_BITS = 23
_ONE = 0x3F800000  # the bits of 1.0
_TINY = 2.0**-126  # the smallest normal float32: stands for a uniform number of 0


def prng_key(seed: int) -> tuple[int, int]:
    """(key0, key1) of `jax.random.PRNGKey(seed)`, for any whole number.

    As JAX gives it with 32-bit integers, its default: the lower 32 bits of the seed, and zeros above.
    """
    return 0, seed & WORD


def split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both halves of `jax.random.split(key)`, each (S, 2) uint32, of keys (S, 2) uint32.

    `generate` carries a key from step to step: the first half draws, the second is the next step's key.
    """
    words = _hashed(keys, 4)
    return words[..., :2], words[..., 2:]


def call_gumbel(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Noise (rows, columns) float32 of one call with several prompts: `jax.random.gumbel(key, (rows, columns))`.

    key: (2,) uint32. Every number depends on the size of the whole.
    """
    return _gumbel(_hashed(key, rows * columns)).reshape(rows, columns)


def row_gumbel(keys: jax.Array, columns: int) -> jax.Array:
    """Noise (B, columns) float32 of B calls with one prompt each, of which row i has keys[i]; keys: (B, 2) uint32."""
    return _gumbel(_hashed(keys, columns))


def _hashed(keys: jax.Array, size: int) -> jax.Array:
    """Words (S, size) uint32: Threefry of the counters 0 to size - 1, of which the halves are paired.

    With an odd size a 0 is appended to the counters, and its word is left out.
    """
    half = (size + 1) // 2
    low = jnp.arange(half, dtype=jnp.uint32)
    high = jnp.where(low + half < size, low + half, 0).astype(jnp.uint32)
    words = threefry2x32(keys[..., 0:1], keys[..., 1:2], *(_like(counters, keys) for counters in (low, high)))
    return jnp.concatenate(words, axis=-1)[..., :size]


def _like(counters: jax.Array, keys: jax.Array) -> jax.Array:
    """`counters` (n,) with as many axes as keys (S, 2)."""
    return counters.reshape(*[1] * (keys.ndim - 1), -1)


def _gumbel(bits: jax.Array) -> jax.Array:
    """Bits uint32 to standard Gumbel noise float32 of the same shape, from -4.47 to 15.94."""
    ones = (bits >> (32 - _MANTISSA_BITS)) | jnp.uint32(_ONE)
    uniform = jax.lax.bitcast_convert_type(ones, jnp.float32) - 1.0  # [0, 1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, _TINY)))
