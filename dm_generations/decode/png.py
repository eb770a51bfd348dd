"""Pixels to PNG bytes, filtered by NumPy and compressed by zlib or by Huffman codes alone; both release the GIL.

Three efforts, on 256x256 VQGAN pictures; the times are against Pillow's default:
    default   a fifth of the time, 1 in 100 smaller: filters chosen by row, zlib for runs only
    fast      a fifteenth, 2 to 3 in 100 larger: one filter, Huffman codes that are ready beforehand
    small     several times as long, a little smaller than default: the shortest of what filters and strategies give
Such pictures have no repeats for zlib to find, so that looking for them is most of the time, and in vain.

H, W: pixels   h: rows of a band   n: bytes of a row, 3 * W
Format: PNG, third edition (W3C). Filters 1 to 4: Sub, Up, Average, Paeth.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dm_generations.decode.deflate import fitting_code, literal_block

EFFORTS = ("default", "fast", "small")

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB8 = (8, 2, 0, 0, 0)  # bits, colour type, and the only kinds of compression, filters and order
_ZLIB_HEADER, _LAST_BLOCK = b"\x78\x01", b"\x03\x00"  # of a stream of our own: 32 KB window; an empty block
_BAND = 1 << 17  # bytes filtered at a time: bounds memory; few to a picture, as each step is a turn of the GIL
_FLAT_BITS = 2.5  # of a Huffman code for a byte, below which runs are worth a look: a code has at least one bit
_SHORT = 1 << 15  # bytes of pixels below which zlib is done before NumPy has started
_PROBE_ROWS, _WORTH_PAETH = 16, 1.05  # Paeth takes twice as long, and is for pictures where it saves this much


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
    return _compressed(_bands(rows, _best_by_row), 1, zlib.Z_RLE)


def _fast(rows: np.ndarray) -> bytes:
    if rows.size < _SHORT:
        return _compressed(_bands(rows, _paeth), 1, zlib.Z_RLE)
    first = max(0, len(rows) // 2 - _PROBE_ROWS // 2)
    probe = rows[first : first + _PROBE_ROWS]
    average, paeth = (sum(fitting_code(band)[1] for band in _bands(probe, filtered)) for filtered in (_average, _paeth))
    blocks, checksum = [_ZLIB_HEADER], 1
    for band in _bands(rows, _average if average < _WORTH_PAETH * paeth else _paeth):
        code, bits = fitting_code(band)
        blocks.append(literal_block(band, code) if bits > _FLAT_BITS else _runs(band))
        checksum = zlib.adler32(band, checksum)
    return b"".join([*blocks, _LAST_BLOCK, struct.pack(">I", checksum)])


def _runs(band: np.ndarray) -> bytes:
    """Byte-aligned deflate blocks, none of them the last: of a band that repeats bytes."""
    stream = zlib.compressobj(1, wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    return stream.compress(band) + stream.flush(zlib.Z_SYNC_FLUSH)


def _small(rows: np.ndarray) -> bytes:
    strategies = ((9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FILTERED), (9, zlib.Z_RLE))
    found = [_compressed(_bands(rows, _best_by_row), *strategy) for strategy in strategies]
    found += [_compressed(_bands(rows, filtered), 9, zlib.Z_DEFAULT_STRATEGY) for filtered in (_none, _paeth)]
    return min(found, key=len)


def _compressed(bands: Iterable[np.ndarray], level: int, strategy: int) -> bytes:
    stream = zlib.compressobj(level, memLevel=9, strategy=strategy)
    return b"".join([*map(stream.compress, bands), stream.flush()])


Filter = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _bands(rows: np.ndarray, filtered: Filter) -> Iterator[np.ndarray]:
    """What is compressed: the bytes of `rows` (H, n) uint8 after a filter, in bands of whole rows."""
    height, row_bytes = rows.shape
    band_count = -(-height * row_bytes // _BAND)
    band_rows = -(-height // band_count)
    for first in range(0, height, band_rows):
        band = rows[first : first + band_rows]
        framed = np.zeros((len(band) + 1, 3 + row_bytes), np.uint8)  # with the row above, and a pixel to the left
        framed[0 if first else 1 :, 3:] = rows[max(0, first - 1) : first + len(band)]
        yield filtered(band, framed[1:, :-3], framed[:-1, 3:], framed[:-1, :-3]).reshape(-1)


# Filters. Of (h, n) uint8 each: the bytes themselves, those of the pixel to the left, of the one above, and of the one
# above on the left. They give (h, 1 + n): the filter's number and what it makes of the row. Modulo 256 throughout.


def _none(band, left, above, corner) -> np.ndarray:
    return _numbered(0, band)


def _average(band, left, above, corner) -> np.ndarray:
    return _numbered(3, band - _mean(left, above))


def _paeth(band, left, above, corner) -> np.ndarray:
    return _numbered(4, band - _paeth_guess(left, above, corner))


def _best_by_row(band, left, above, corner) -> np.ndarray:
    """For each row the filter that makes it smallest: the sum of its differences without their signs."""
    guesses = (left, above, _mean(left, above), _paeth_guess(left, above, corner))
    found = np.empty((4, *band.shape), np.uint8)
    for difference, guess in zip(found, guesses, strict=True):
        np.subtract(band, guess, out=difference)
    sizes = np.abs(found.view(np.int8)).view(np.uint8).sum(axis=2, dtype=np.uint32)  # (4, h); |-128| is 128 again
    best = sizes.argmin(axis=0)
    return _numbered(best + 1, found[best, np.arange(len(band))])


def _numbered(number: int | np.ndarray, differences: np.ndarray) -> np.ndarray:
    numbered = np.empty((len(differences), 1 + differences.shape[1]), np.uint8)
    numbered[:, 0], numbered[:, 1:] = number, differences
    return numbered


def _mean(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Half the sum, rounded down, without a wider type."""
    return (first & second) + ((first ^ second) >> np.uint8(1))


def _paeth_guess(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Which of the three is nearest to left + above - corner; in bytes, which is several times as fast as in int16.

    Its distance to left is |above - corner|, and to above |left - corner|. With the corner between the two, its
    distance to the corner is the difference of these; else it is their sum, and the corner is not the nearest.
    """
    to_left, to_above = _distance(above, corner), _distance(left, corner)
    is_outside = (above > corner) == (left > corner)
    to_corner = _distance(to_left, to_above) | _mask(is_outside)
    guess = corner ^ ((corner ^ above) & _mask(to_above <= to_corner))
    return guess ^ ((guess ^ left) & _mask(to_left <= np.minimum(to_above, to_corner)))


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.maximum(first, second) - np.minimum(first, second)


def _mask(condition: np.ndarray) -> np.ndarray:
    """255 where true, else 0."""
    return -condition.view(np.uint8)
