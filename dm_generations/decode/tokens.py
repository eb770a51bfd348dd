"""The tokens of one row of an archive, checked."""

import numpy as np

from dm_generations.archive import quantvec_md5

TOKEN_DTYPE = np.dtype("<u2")  # little-endian uint16, also on big-endian machines


class BadTokens(Exception):
    """A stored token vector that cannot be decoded; the text says why."""


def tokens_of(blob: object, md5: str | None, token_count: int | None, codebook_size: int) -> np.ndarray:
    """(token_count,) uint16, each below `codebook_size`. Raises BadTokens.

    An archive may come from anywhere, so `blob` may be whatever SQLite stores. `md5` None is not checked, and
    `token_count` None is any count but 0.
    """
    if not isinstance(blob, bytes):
        raise BadTokens(f"its tokens are stored as {type(blob).__name__}, not as a blob")
    if token_count is None:
        if not blob or len(blob) % TOKEN_DTYPE.itemsize:
            raise BadTokens(f"its token blob of {len(blob):,} bytes is not a row of uint16")
        token_count = len(blob) // TOKEN_DTYPE.itemsize
    expected = token_count * TOKEN_DTYPE.itemsize
    if len(blob) != expected:
        raise BadTokens(f"its token blob is {len(blob):,} bytes, not {expected:,} ({token_count:,} x uint16)")
    if md5 is not None and quantvec_md5(blob) != str(md5).lower():
        raise BadTokens("its tokens do not match their MD5")
    tokens = np.frombuffer(blob, TOKEN_DTYPE)
    largest = int(tokens.max())
    if largest >= codebook_size:
        raise BadTokens(f"it holds code {largest:,}, the codebook ends at {codebook_size - 1:,}")
    return tokens
