"""Read `flax_model.msgpack`, the weight file of vqgan-jax and dalle-mini, as views of the mapped file.

The format is that of `flax.serialization.to_bytes`: a MessagePack map of maps with string keys. An array is
extension type 1, whose payload is itself MessagePack: [shape, dtype name, little-endian bytes in C order]; a
NumPy scalar is extension type 3 with the same payload. Arrays above 1 GiB are cut into flat chunks:
{"__msgpack_chunked_array__": true, "shape": {"0": ..}, "chunks": {"0": array, ..}}.

Flax's own reader, and msgpack's, copy all arrays. Here msgpack reads what lies between their contents.
"""

import math
import os
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from dm_generations.errors import UserError
from dm_generations.weights.mmap import MAX_DIMENSIONS, Malformed, MappedFile, release

NDARRAY, NUMPY_SCALAR = 1, 3  # extension types
CHUNKED = "__msgpack_chunked_array__"
_INTEGERS = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("bool", *(f"float{bits}" for bits in (16, 32, 64)), *_INTEGERS)
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_DEPTH = 64
MAX_ENTRIES = 1_000_000  # of all maps together
MAX_NAME = 10_000  # bytes
_WINDOW = 16 << 10  # bytes that msgpack gets at once: a name, or what an array begins with
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}  # by first byte: bytes, extensions
_FIXED_LENGTHS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # extensions


def read_flax_msgpack(path: str | os.PathLike) -> dict[str, Any]:
    """Read the tree of a file of Flax.

    Args:
        path: The file. It is not trusted.

    Returns:
        Nested dicts of read-only arrays, in the dtypes of the file: views of the mapped file, except for arrays of
        several chunks, which are joined.

    Raises:
        UserError: The file cannot be read, is damaged, or is something else.
    """
    file = MappedFile(path)
    try:
        return _join_chunks(_Reader(file).read_tree(), "")
    except (Malformed, msgpack.UnpackException, LookupError, ValueError) as error:
        what = error if isinstance(error, Malformed) else "it is cut short or wrong"
        raise UserError(f"{path} is damaged or not a Flax msgpack file: {what}; download it again") from error


class _Reader:
    """Reads values from `position` on."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.position, self.entries = file, 0, 0

    def unpack(self, *methods: str) -> list[Any]:
        """Return what these methods of msgpack's unpacker read one after another."""
        limits = {"max_str_len": MAX_NAME, "max_bin_len": MAX_NAME, "max_array_len": MAX_DIMENSIONS}
        unpacker = msgpack.Unpacker(max_buffer_size=_WINDOW, max_map_len=MAX_ENTRIES, **limits)
        unpacker.feed(self.file.content[self.position : self.position + _WINDOW])
        values = [getattr(unpacker, method)() for method in methods]
        self.position += unpacker.tell()
        return values

    def read_tree(self) -> dict[str, Any]:
        tree = self.read("", 0)
        if not isinstance(tree, dict):
            raise Malformed("it holds no tree of parameters")
        if self.position != self.file.size:
            raise Malformed("more follows behind the tree")
        return tree

    def read(self, name: str, depth: int) -> Any:
        """Read a map, an array, or the size or boolean that tells of an array in chunks."""
        first = self.file.content[self.position]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            return self.read_map(name, depth)
        if 0xC7 <= first <= 0xC9 or first in _FIXED_LENGTHS:
            return self.read_array(name)
        return self.unpack("unpack")[0]

    def read_map(self, name: str, depth: int) -> dict[str, Any]:
        (count,) = self.unpack("read_map_header")
        self.entries += count
        if depth > MAX_DEPTH or self.entries > MAX_ENTRIES:
            raise Malformed(f"its tree is deeper than {MAX_DEPTH} levels or has more than {MAX_ENTRIES} entries")
        tree: dict[str, Any] = {}
        for _ in range(count):
            (key,) = self.unpack("unpack")
            if not isinstance(key, str) or key in tree:
                raise Malformed(f"{name!r:.200} has a name twice, or one that is not text")
            tree[key] = self.read(f"{name}/{key}" if name else key, depth + 1)
        return tree

    def read_array(self, name: str) -> np.ndarray:
        """Read an extension: its length, its type, then a list of shape, dtype and content."""
        end = self.read_length() + self.position + 1
        code = self.file.content[self.position]
        self.position += 1
        if code not in (NDARRAY, NUMPY_SCALAR):
            raise Malformed(f"{name!r:.200} has the unknown extension type {code}")
        field_count, shape, dtype_name = self.unpack("read_array_header", "unpack", "unpack")
        dtype_name = dtype_name.decode() if isinstance(dtype_name, bytes) else dtype_name
        if field_count != 3 or not _are_sizes(shape) or not isinstance(dtype_name, str):
            raise Malformed(f"{name!r:.200} is not [shape, dtype, bytes]")
        if dtype_name not in DTYPES:
            raise Malformed(f"{name!r:.200} has the unknown dtype {dtype_name!r:.40}")
        length, dtype = self.read_length(), DTYPES[dtype_name]
        if math.prod(shape) * dtype.itemsize != length or self.position + length != end:
            raise Malformed(f"{name!r:.200} of dtype {dtype_name} has another number of bytes than its shape")
        array = self.file.array(self.position, dtype, tuple(shape))
        self.position = end
        return array

    def read_length(self) -> int:
        """Read the first bytes of an extension or of bytes."""
        first = self.file.content[self.position]
        size = _LENGTH_BYTES.get(first, 0)
        self.position += 1 + size
        length = int.from_bytes(self.file.content[self.position - size : self.position], "big")
        return length if size else _FIXED_LENGTHS[first]


def _join_chunks(node: dict[str, Any], name: str) -> Any:
    """Return `node` with arrays in chunks joined. Raises Malformed for anything but arrays and maps of them."""
    if CHUNKED in node:
        return _join(node, name)
    for key, value in node.items():
        child = f"{name}/{key}" if name else key
        if isinstance(value, dict):
            node[key] = _join_chunks(value, child)
        elif not isinstance(value, np.ndarray):
            raise Malformed(f"{child!r:.200} is not an array")
    return node


def _join(node: dict[str, Any], name: str) -> np.ndarray:
    """Return the array that `node` describes by its shape and chunks."""
    shape, chunks = (_in_order(node.get(key), name) for key in ("shape", "chunks"))
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise Malformed(f"{name!r:.200} has chunks that are not flat arrays")
    if len({chunk.dtype for chunk in chunks}) != 1 or not _are_sizes(shape):
        raise Malformed(f"{name!r:.200} has chunks of different dtypes, or no shape")
    # without the ones for zeros, an empty array could have sides that NumPy cannot count
    if math.prod(max(size, 1) for size in shape) > 2**48 or math.prod(shape) != sum(chunk.size for chunk in chunks):
        raise Malformed(f"{name!r:.200} has chunks that do not add up to its shape")
    array = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    array.flags.writeable = False
    release(chunks)
    return array.reshape(shape)


def _are_sizes(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(size) is int for size in shape)


def _in_order(items: Any, name: str) -> list[Any]:
    """Return the values of {"0": .., "1": .., ...}, Flax's way to write a list."""
    if not isinstance(items, dict) or set(items) != {str(index) for index in range(len(items))}:
        raise Malformed(f"{name!r:.200} is an incomplete list of chunks")
    return [items[str(index)] for index in range(len(items))]
