"""Deflate by Huffman codes alone, in NumPy: for bytes that are small differences, as of filtered pictures.

zlib looks for repeats, which such bytes do not have, and makes a code for each block. Here the code is one of a few
that were fitted beforehand to differences of all sizes, so that coding is a look-up for each pair of bytes: a
fraction of the time of zlib's Z_HUFFMAN_ONLY at nearly its size. Format: RFC 1951. NumPy releases the GIL.

n: bytes of data   q: pieces of the stream, each of fewer than 64 bits
"""

import functools
from itertools import product

import numpy as np

from dm_generations.decode.scratch import scratch

_END = 256  # the symbol that ends a block; those before it are bytes
_MAX_BITS = 13  # of a code, so that the codes of two bytes and the number of their bits fit into 32 bits
_COUNT_BITS = np.uint32(5)
_SAMPLE = 1 << 12  # bytes that a code is chosen by
_LENGTHS_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)  # RFC 1951, 3.2.7

# Differences of neighbours have a sharp peak and long tails: a narrow and a wide two-sided geometric distribution.
# These shapes, fitted by eye to VQGAN pictures, cost about 1 in 100 of the size against a code for each picture.
_NARROW_MEANS = tuple(0.15 * 1.4**step for step in range(18))
_WIDE, _WIDE_SHARES, _FLOOR = 10, (0.1, 0.3, 0.5), 2e-5


def fitting_code(data: np.ndarray) -> tuple[int, float]:
    """The number of the code that suits `data` (n,) uint8 best, and the bits that it takes for a byte, about."""
    sample = data[:: max(1, len(data) // _SAMPLE) | 1]  # odd, to meet all channels
    counts = np.bincount(sample, minlength=256).astype(np.float32)
    costs = _costs() @ counts
    code = int(costs.argmin())
    return code, float(costs[code]) / max(1, len(sample))


def literal_block(data: np.ndarray, code: int) -> bytes:
    """A whole, byte-aligned deflate block that gives `data` (n,) uint8, and is not the last of its stream.

    Takes about 15 n bytes of memory, which each thread keeps for its next block.
    """
    (header, header_lengths), end, byte_table, pair_table = _coder(code)
    quad_count = len(data) // 4
    places = scratch("places", (2 * quad_count,), np.intp)
    places[:] = data[: 4 * quad_count].view("<u2")
    pairs = pair_table.take(places, out=scratch("pairs", (2 * quad_count,), np.uint32), mode="clip")
    counts = np.bitwise_and(pairs, np.uint32(31), out=scratch("counts", (2 * quad_count,), np.uint32)).view(np.int32)
    pairs >>= _COUNT_BITS
    pieces = scratch("pieces", (len(header) + quad_count + 4,), np.uint64)
    lengths = scratch("lengths", pieces.shape, np.int64)
    body = slice(len(header), len(header) + quad_count)
    np.left_shift(pairs[1::2], counts[0::2], out=pieces[body], dtype=np.uint64, casting="unsafe")
    pieces[body] |= pairs[0::2]
    np.add(counts[0::2], counts[1::2], out=lengths[body])
    rest = [divmod(int(byte_table[byte]), 32) for byte in data[4 * quad_count :]]
    ends = [*rest, end, *[(0, 0)] * (3 - len(rest))]
    pieces[: len(header)], lengths[: len(header)] = header, header_lengths
    pieces[body.stop :], lengths[body.stop :] = zip(*ends, strict=True)
    return _packed(pieces, lengths)


def _packed(pieces: np.ndarray, lengths: np.ndarray) -> bytes:
    """`pieces` (q,) uint64, each of `lengths` (q,) bits, one after the other, lowest bits first. Spoils `pieces`.

    Then comes an empty stored block, as of zlib's Z_SYNC_FLUSH, which fills the last byte.
    """
    count = len(pieces)
    ends = np.cumsum(lengths, out=scratch("ends", (count,), np.int64))
    bit_count = int(ends[-1])
    shifts = np.subtract(ends, lengths, out=ends)  # where they start, for now
    shifts &= 63
    # As no piece has 64 bits, one starts in each word of the result, and only the last of these goes on to the next.
    is_last = np.less(shifts[1:], shifts[:-1], out=scratch("is_last", (count - 1,), np.bool_))
    lasts = np.append(np.flatnonzero(is_last), count - 1)
    shifts = shifts.view(np.uint64)
    carried = pieces[lasts] >> np.uint64(1) >> (np.uint64(63) - shifts[lasts])
    stream = np.zeros(len(lasts) + 1, "<u8")
    # Bits of different pieces never overlap, so that OR is a sum, and sums up to here less those before: mod 2**64.
    pieces <<= shifts
    sums = pieces.view(np.int64)  # NumPy is faster with signed ones
    stream[:-1] = np.cumsum(sums, out=sums).view(np.uint64)[lasts]
    stream[1:-1] -= stream[:-2].copy()
    stream[1:] |= carried
    size = (bit_count + 3 + 7) // 8  # the stored block starts with three zero bits
    return stream.tobytes()[:size].ljust(size, b"\0") + b"\0\0\xff\xff"


@functools.cache
def _shapes() -> np.ndarray:
    """Probabilities (codes, 257) float64 of the symbols."""
    size = np.minimum(np.arange(256), 256 - np.arange(256))  # of a difference, modulo 256

    def geometric(mean: float) -> np.ndarray:
        weights = (mean / (1 + mean)) ** size
        return weights / weights.sum()

    shapes = np.full((len(_NARROW_MEANS) * len(_WIDE_SHARES), 257), _FLOOR)
    for shape, (mean, share) in zip(shapes, product(_NARROW_MEANS, _WIDE_SHARES), strict=True):
        shape[:256] += (1 - share) * geometric(mean) + share * geometric(mean * _WIDE)
    return shapes / shapes.sum(axis=1, keepdims=True)


@functools.cache
def _costs() -> np.ndarray:
    """Bits (codes, 256) float32 of each byte value."""
    return -np.log2(_shapes()[:, :256]).astype(np.float32)


@functools.cache
def _coder(code: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[int, int], np.ndarray, np.ndarray]:
    """What a block of this code takes: its header, its end, and what stands for each byte and each pair of bytes.

    The header: pieces and lengths, as for `_packed`. The end: bits and their count. The tables, (256,) and (65536,)
    uint32: bits * 32 + count; the first byte of a pair is the low one.
    """
    lengths = _code_lengths(_shapes()[code], _MAX_BITS)
    codes = _canonical(lengths)
    counts = lengths[:256].astype(np.uint32)
    bits = codes[:256].astype(np.uint32)
    first, second = np.arange(1 << 16) & 255, np.arange(1 << 16) >> 8
    pair_table = ((bits[second] << counts[first] | bits[first]) << _COUNT_BITS) | (counts[first] + counts[second])
    return _header(lengths), (int(codes[_END]), int(lengths[_END])), bits << _COUNT_BITS | counts, pair_table


def _header(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The header of a block with these code `lengths` (257,), as pieces and their lengths."""
    # Two codes for distances, as zlib gives where there are none: some readers want a complete code.
    listed = np.append(lengths, [1, 1])
    meta_lengths = _code_lengths(np.bincount(listed, minlength=19).astype(float), 7)
    meta_codes = _canonical(meta_lengths)
    meta_count = max(place for place, symbol in enumerate(_LENGTHS_ORDER) if meta_lengths[symbol]) + 1
    fields = [(0, 1), (2, 2), (257 - 257, 5), (2 - 1, 5), (meta_count - 4, 4)]  # not the last block, with own codes
    fields += [(int(meta_lengths[symbol]), 3) for symbol in _LENGTHS_ORDER[:meta_count]]
    fields += [(int(meta_codes[length]), int(meta_lengths[length])) for length in listed]
    bits = bit_count = 0
    for value, count in fields:
        bits |= value << bit_count
        bit_count += count
    starts = range(0, bit_count, 32)
    pieces = [bits >> start & 0xFFFFFFFF for start in starts]
    return np.array(pieces, np.uint64), np.array([min(32, bit_count - start) for start in starts])


def _code_lengths(weights: np.ndarray, limit: int) -> np.ndarray:
    """Bits of each symbol in the best prefix code of at most `limit` bits; 0 where the weight is 0. Package-merge."""
    symbols = np.flatnonzero(weights)
    singles = [(weights[symbol], np.bincount([symbol], minlength=len(weights))) for symbol in symbols]
    merged = []
    for _ in range(limit):
        pairs = zip(merged[0::2], merged[1::2], strict=False)
        packages = [(first[0] + second[0], first[1] + second[1]) for first, second in pairs]
        merged = sorted(singles + packages, key=lambda package: package[0])
    return np.sum([counts for _, counts in merged[: 2 * (len(symbols) - 1)]], axis=0)


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """The code of each symbol as deflate numbers them (RFC 1951, 3.2.2), its first bit lowest."""
    codes = np.zeros(len(lengths), np.int64)
    code = 0
    for length in range(1, int(lengths.max()) + 1):
        code <<= 1
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code += 1
    return codes
