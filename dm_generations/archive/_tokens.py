"""Token vectors as bytes: little-endian uint16, row-major over a square grid. No NumPy."""

import array
import hashlib
import math
import sys

from dm_generations.archive._records import ModelInfo
from dm_generations.archive._sqlite import ArchiveError

BYTES_PER_TOKEN = 2
_ALL_BYTES = bytes(range(256))


def quantvec_md5(quantvec: bytes) -> str:
    """Hex MD5 of the stored bytes; a checksum, not a signature."""
    return hashlib.md5(quantvec, usedforsecurity=False).hexdigest()


def init_md5(quantvec: bytes, init_count: int) -> str:
    """Hex MD5 of the first `init_count` codes, which were given and not drawn; "" if there are none."""
    return quantvec_md5(quantvec[: BYTES_PER_TOKEN * init_count]) if init_count else ""


def grid_side(byte_count: int) -> int | None:
    """Side of the square grid that a token vector of this many bytes fills, or None if there is none."""
    token_count, odd = divmod(byte_count, BYTES_PER_TOKEN)
    side = math.isqrt(token_count)
    return side if side and not odd and side * side == token_count else None


def largest_code(quantvec: bytes) -> int:
    """The largest code of a non-empty vector of whole tokens."""
    codes = array.array("H", quantvec)
    if sys.byteorder == "big":
        codes.byteswap()
    return max(codes)


def codes_fit(quantvec: bytes, codebook_size: int) -> bool:
    """True when every code is below `codebook_size`.

    The high bytes settle nearly every case, and `bytes.translate` looks at them at the speed of C:
    this runs for each row that is written or verified.
    """
    high_limit = codebook_size >> 8
    if not quantvec[1::2].translate(None, delete=_ALL_BYTES[:high_limit]):
        return True
    return largest_code(quantvec) < codebook_size


def check_init(quantvec: bytes, init_count: int, md5: str) -> None:
    """ArchiveError unless a vector has `init_count` codes that were given, and `md5` is theirs."""
    token_count = len(quantvec) // BYTES_PER_TOKEN
    if not 0 <= init_count <= token_count:
        raise ArchiveError(f"init_count is {init_count}, not from 0 to the {token_count} codes of the picture")
    if init_md5(quantvec, init_count) != md5:
        raise ArchiveError(f"init_md5 is {md5!r:.40}, not that of the first {init_count} codes")


def check_tokens(quantvec: bytes, codec: ModelInfo) -> None:
    """ArchiveError unless the vector fills the codec's grid with codes of its codebook."""
    expected = codec.grid * codec.grid * BYTES_PER_TOKEN
    if len(quantvec) != expected:
        raise ArchiveError(
            f"a token vector has {len(quantvec)} bytes; codec {codec.name} needs {expected}"
            f" ({codec.grid}x{codec.grid} uint16)"
        )
    if not codes_fit(quantvec, codec.codebook_size):
        raise ArchiveError(f"a token vector holds a code that codec {codec.name} ({codec.codebook_size} codes) lacks")
