"""Tokens to `.npy` bytes, as the DALL-3 fork of DALLE-pytorch writes them for its diffusion decoder."""

import io

import numpy as np


def encode_npy(tokens: np.ndarray) -> bytes:
    """A NumPy file of `tokens` (L,): int64, one dimension, row-major over the grid."""
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype("<i8"), allow_pickle=False)
    return buffer.getvalue()
