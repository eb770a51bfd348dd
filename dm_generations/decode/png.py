"""Pixels to PNG bytes, filtered by NumPy and compressed by zlib or ISA-L; all three release the GIL.

Three efforts, on 256x256 VQGAN pictures; the times are against Pillow's default:
    default   a fifth to a seventh of the time, no larger: filters chosen by row, zlib for runs only
    fast      a sixteenth, a tenth larger at most: one filter, and ISA-L, which looks for repeats quickly
    small     several times as long, a little smaller than default: the shortest of what filters and strategies give
Such pictures have no repeats for zlib to find, so that looking for them is most of the time, and in vain.
For threads to gain, NumPy's steps are few and long, as each is a turn of the GIL, and in memory that is there already.

H, W: pixels   h: rows of a band   n: bytes of a row, 3 * W
Format: PNG, third edition (W3C). Filters 1 to 4: Sub, Up, Average, Paeth.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from isal import isal_zlib

from dm_generations.decode.scratch import scratch

EFFORTS = ("default", "fast", "small")

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB8 = (8, 2, 0, 0, 0)  # bits, colour type, and the only kinds of compression, filters and order
_BAND = 1 << 18  # bytes filtered at a time: bounds memory; a picture of 256 px is one


def encode_png(pixels: np.ndarray, effort: str = "default", chunks: Iterable[bytes] = ()) -> bytes:
    """A PNG of `pixels` (H, W, 3) uint8, sRGB. `chunks` are whole ones (see `chunk`), to stand before the pixels."""
    height, width, _ = pixels.shape
    header = chunk(b"IHDR", struct.pack(">II5B", width, height, *_RGB8))
    body = {"default": _default, "fast": _fast, "small": _small}[effort](pixels.reshape(height, 3 * width))
    return b"".join([_SIGNATURE, header, *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")])


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))])


def _default(rows: np.ndarray) -> bytes:
    return _by_zlib(_bands(rows, _best_by_row), 1, zlib.Z_RLE)


def _fast(rows: np.ndarray) -> bytes:
    stream = isal_zlib.compressobj(1)
    return b"".join([*map(stream.compress, _bands(rows, _paeth)), stream.flush()])


def _small(rows: np.ndarray) -> bytes:
    strategies = ((9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FILTERED), (9, zlib.Z_RLE))
    found = [_by_zlib(_bands(rows, _best_by_row), *strategy) for strategy in strategies]
    found += [_by_zlib(_bands(rows, filtered), 9, zlib.Z_DEFAULT_STRATEGY) for filtered in (_none, _paeth)]
    return min(found, key=len)


def _by_zlib(bands: Iterable[np.ndarray], level: int, strategy: int) -> bytes:
    stream = zlib.compressobj(level, memLevel=9, strategy=strategy)
    return b"".join([*map(stream.compress, bands), stream.flush()])


Filter = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], int | np.ndarray]


def _bands(rows: np.ndarray, filtered: Filter) -> Iterator[np.ndarray]:
    """What is compressed: the bytes of `rows` (H, n) uint8 after a filter, in bands of whole rows.

    Each lies where the one before it was.
    """
    height, row_bytes = rows.shape
    band_count = -(-height * row_bytes // _BAND)
    band_rows = -(-height // band_count)
    framed = scratch("framed", (band_rows + 1, 3 + row_bytes), np.uint8)  # with the row above, and a pixel to the left
    numbered = scratch("numbered", (band_rows, 1 + row_bytes), np.uint8)
    framed[:, :3] = 0
    for first in range(0, height, band_rows):
        band = rows[first : first + band_rows]
        end = len(band)
        framed[0, 3:] = rows[first - 1] if first else 0
        framed[1 : end + 1, 3:] = band
        left, above, corner = framed[1 : end + 1, :-3], framed[:end, 3:], framed[:end, :-3]
        numbered[:end, 0] = filtered(band, left, above, corner, numbered[:end, 1:])
        yield numbered[:end].reshape(-1)


# Filters. Of (h, n) uint8 each: the bytes themselves, those of the pixel to the left, of the one above, and of the one
# above on the left. They put what they make of the bytes into `out` (h, n) and give the filter's number, or those of
# the rows. Modulo 256 throughout.


def _none(band, left, above, corner, out) -> int:
    out[...] = band
    return 0


def _average(band, left, above, corner, out) -> int:
    """Less the mean of left and above, rounded down, without a wider type."""
    np.bitwise_xor(left, above, out=out)
    out >>= 1
    out += np.bitwise_and(left, above, out=scratch("both", band.shape, np.uint8))
    np.subtract(band, out, out=out)
    return 3


def _paeth(band, left, above, corner, out) -> int:
    """Less the one of the three that is nearest to left + above - corner; of equally near ones the first.

    The corner lies below the larger one of left and above by `up`, or by 0, and above the smaller one by `down`, or
    by 0, so that the estimate is corner + up - down. The larger one is nearest if down <= up / 2, the smaller one if
    up <= down / 2, else the corner. All in bytes, which is several times as fast as in int16.
    """
    up, down = scratch("up", band.shape, np.uint8), scratch("down", band.shape, np.uint8)
    half, chosen = scratch("half", band.shape, np.uint8), scratch("chosen", (2, *band.shape), np.bool_)
    np.maximum(left, above, out=up)
    np.maximum(up, corner, out=up)
    up -= corner
    np.minimum(left, above, out=down)
    np.minimum(down, corner, out=down)
    np.subtract(corner, down, out=down)
    np.less_equal(down, np.right_shift(up, 1, out=half), out=chosen[0])
    np.less_equal(up, np.right_shift(down, 1, out=half), out=chosen[1])
    up *= chosen[0].view(np.uint8)
    down *= chosen[1].view(np.uint8)
    np.subtract(band, corner, out=out)
    out -= up
    out += down
    return 4


def _best_by_row(band, left, above, corner, out) -> np.ndarray:
    """For each row the filter that makes it smallest: the sum of its differences without their signs."""
    found = scratch("found", (4, *band.shape), np.uint8)
    np.subtract(band, left, out=found[0])
    np.subtract(band, above, out=found[1])
    _average(band, left, above, corner, found[2])
    _paeth(band, left, above, corner, found[3])
    sizes = np.abs(found.view(np.int8), out=scratch("sizes", found.shape, np.int8))
    best = sizes.view(np.uint8).sum(axis=2, dtype=np.uint32).argmin(axis=0)  # (h,); |-128| is 128 again
    out[...] = found[best, np.arange(len(band))]
    return best + 1
