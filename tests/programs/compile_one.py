"""Compiles one function with compiled programs cached."""

import jax

from dm_generations.runtime import compile_cache

compile_cache.enable()
assert jax.jit(lambda x: x + 1)(1) == 2
