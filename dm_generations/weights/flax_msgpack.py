"""Read `flax_model.msgpack`, the weight file of vqgan-jax and dalle-mini, without Flax.

The format is that of `flax.serialization.to_bytes`: a MessagePack map of maps with string keys. An array is
extension type 1, whose payload is itself MessagePack: [shape, dtype name, little-endian bytes in C order]; a
NumPy scalar is extension type 3 with the same payload. Arrays above 1 GiB are cut into flat pieces:
{"__msgpack_chunked_array__": true, "shape": {"0": ..}, "chunks": {"0": array, ..}}.

The file is not trusted: nothing in it is executed, and nothing is allocated that its length does not cover.
"""

import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from dm_generations.errors import UserError
from dm_generations.weights.mmap import MAX_DIMENSIONS, Malformed, MappedFile

NDARRAY, NUMPY_SCALAR = 1, 3  # extension types
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split())
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_DEPTH = 64
MAX_ENTRIES = 1_000_000  # of all maps together
MAX_NAME = 10_000  # bytes

# The first byte of each kind of value, and the bytes of the length (or of the integer) that follows it. MessagePack
# also packs short lengths and small integers into the first byte: `_Reader.kind`.
_SIZED = {
    **{0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4)},
    **{0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)},
    **{0xCC: ("integer", 1), 0xCD: ("integer", 2), 0xCE: ("integer", 4), 0xCF: ("integer", 8)},
    **{0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4)},
    **{0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
_UNSIZED = {
    **{0xC2: ("boolean", 0), 0xC3: ("boolean", 1)},
    **{0xD4: ("extension", 1), 0xD5: ("extension", 2), 0xD6: ("extension", 4)},
    **{0xD7: ("extension", 8), 0xD8: ("extension", 16)},
}


def read_flax_msgpack(path: str | os.PathLike) -> dict[str, Any]:
    """The tree in the file: nested dicts of read-only NumPy arrays, in the dtypes that the file holds.

    The arrays are views of the mapped file; only one that was cut into pieces is copied, to join them. Raises
    UserError, naming the file, if it cannot be read, is cut short or is something else.
    """
    file = MappedFile(path)
    reader = _Reader(file)
    try:
        tree = reader.value("", 0)
        if not isinstance(tree, dict):
            raise Malformed("it holds no tree of parameters")
        if reader.position != file.size:
            raise Malformed("more follows behind the tree")
        return _arrays_only(tree, "")
    except Malformed as error:
        raise UserError(f"{path} is damaged or not a Flax msgpack file: {error}; download it again") from error


class _Reader:
    """Reads values from `position` on; lengths in the file are held against `end`, where it may read no further."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.position, self.end = file, 0, file.size
        self.entries = 0

    def value(self, name: str, depth: int) -> Any:
        """A map, an array, or (within the description of a chunked array) a size or boolean."""
        kind, size = self.kind()
        if kind == "map":
            return self.map(size, name, depth)
        if kind == "extension":
            return self.extension(size, name)
        if kind in ("integer", "boolean"):
            return size
        raise Malformed(f"{name!r:.200} is not an array")

    def kind(self) -> tuple[str, int]:
        """The kind of the next value, and its length in bytes or items, or itself if it is an integer or boolean."""
        first = self.integer(1)
        if first < 0x80:
            return "integer", first
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "list", first & 0x0F
        if first < 0xC0:
            return "text", first & 0x1F
        if first in _SIZED:
            kind, length = _SIZED[first]
            return kind, self.integer(length)
        return _UNSIZED.get(first, ("other", 0))

    def integer(self, length: int) -> int:
        return int.from_bytes(self.bytes(length), "big")

    def bytes(self, length: int) -> bytes:
        start = self.position
        self.skip(length)
        return self.file.content[start : self.position]

    def skip(self, length: int) -> None:
        if length > self.end - self.position:
            raise Malformed("it is cut short")
        self.position += length

    def text(self, kinds: tuple[str, ...], what: str) -> str:
        kind, size = self.kind()
        if kind not in kinds or size > MAX_NAME:
            raise Malformed(f"{what} is not a name")
        try:
            return self.bytes(size).decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"{what} is not text") from None

    def map(self, size: int, name: str, depth: int) -> dict[str, Any]:
        if depth > MAX_DEPTH:
            raise Malformed(f"its tree is deeper than {MAX_DEPTH} levels")
        tree: dict[str, Any] = {}
        for _ in range(size):
            self.entries += 1
            if self.entries > MAX_ENTRIES:
                raise Malformed(f"its tree has more than {MAX_ENTRIES} entries")
            key = self.text(("text",), f"something in {name!r:.200}")
            child = f"{name}/{key}" if name else key
            if key in tree:
                raise Malformed(f"{child!r:.200} is there twice")
            tree[key] = self.value(child, depth + 1)
        return tree

    def extension(self, size: int, name: str) -> np.ndarray:
        """The array in an extension: its type, then `size` bytes with a list of shape, dtype and content."""
        code = self.integer(1)
        if code not in (NDARRAY, NUMPY_SCALAR):
            raise Malformed(f"{name!r:.200} has the unknown extension type {code}")
        outer_end, self.end = self.end, self.position + size
        if self.end > outer_end:
            raise Malformed("it is cut short")
        if self.kind() != ("list", 3):
            raise Malformed(f"{name!r:.200} is not [shape, dtype, bytes]")
        kind, dimensions = self.kind()
        if kind != "list" or dimensions > MAX_DIMENSIONS:
            raise Malformed(f"{name!r:.200} has no shape")
        shape = self.shape(dimensions, name)
        dtype_name = self.text(("text", "bytes"), f"the dtype of {name!r:.200}")
        if dtype_name not in DTYPES:
            raise Malformed(f"{name!r:.200} has the unknown dtype {dtype_name!r:.40}")
        kind, length = self.kind()
        start = self.position
        dtype = DTYPES[dtype_name]
        if kind != "bytes" or math.prod(shape) * dtype.itemsize != length:
            raise Malformed(f"{name!r:.200} of shape {shape} and dtype {dtype_name} has another number of bytes")
        self.skip(length)
        if self.position != self.end:
            raise Malformed(f"more follows behind {name!r:.200}")
        self.end = outer_end
        return self.file.array(start, dtype, shape)

    def shape(self, dimensions: int, name: str) -> tuple[int, ...]:
        sizes = [self.kind() for _ in range(dimensions)]
        if any(kind != "integer" for kind, _ in sizes):
            raise Malformed(f"{name!r:.200} has a shape that is not a list of sizes")
        return tuple(size for _, size in sizes)


def _arrays_only(node: dict[str, Any], name: str) -> Any:
    """`node` with chunked arrays joined. Raises Malformed for anything but arrays and maps of them."""
    if CHUNKED in node:
        return _joined(node, name)
    tree = {}
    for key, value in node.items():
        child = f"{name}/{key}" if name else key
        if isinstance(value, dict):
            tree[key] = _arrays_only(value, child)
        elif isinstance(value, np.ndarray):
            tree[key] = value
        else:
            raise Malformed(f"{child!r:.200} is not an array")
    return tree


def _joined(node: dict[str, Any], name: str) -> np.ndarray:
    """The array that was cut into pieces."""
    shape, chunks = (_in_order(node.get(key), name) for key in ("shape", "chunks"))
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise Malformed(f"{name!r:.200} has pieces that are not flat arrays")
    if len({chunk.dtype for chunk in chunks}) != 1:
        raise Malformed(f"{name!r:.200} has pieces of different dtypes")
    if not all(type(size) is int for size in shape) or len(shape) > MAX_DIMENSIONS:
        raise Malformed(f"{name!r:.200} has a shape that is not a list of sizes")
    # without the ones for zeros, an empty array could have sides that NumPy cannot count
    if math.prod(max(size, 1) for size in shape) > 2**48 or math.prod(shape) != sum(chunk.size for chunk in chunks):
        raise Malformed(f"{name!r:.200} has pieces that do not add up to its shape {shape}")
    array = chunks[0].reshape(shape) if len(chunks) == 1 else np.concatenate(chunks).reshape(shape)
    array.flags.writeable = False
    return array


def _in_order(items: Any, name: str) -> list[Any]:
    """The values of {"0": .., "1": .., ...}, Flax's way to write a list."""
    if not isinstance(items, dict) or set(items) != {str(index) for index in range(len(items))}:
        raise Malformed(f"{name!r:.200} is an incomplete list of pieces")
    return [items[str(index)] for index in range(len(items))]
