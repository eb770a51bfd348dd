"""Tokens of pictures as the grids that decoders read."""

import math

import jax


def token_grid(tokens: jax.Array) -> jax.Array:
    """Tokens (B, L), L a square, or grids of any shape (B, h, w), as grids (B, h, w), row-major.

    Raises ValueError where L is no square.
    """
    if tokens.ndim == 3:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a square grid")
    return tokens.reshape(-1, side, side)
