"""Read `flax_model.msgpack`, the weight file of vqgan-jax and dalle-mini, as views of the mapped file.

The format is that of `flax.serialization.to_bytes`: a MessagePack map of maps with string keys. An array is
extension type 1, whose payload is itself MessagePack: [shape, dtype name, little-endian bytes in C order]; a
NumPy scalar is extension type 3 with the same payload. Arrays above 1 GiB are cut into flat chunks:
{"__msgpack_chunked_array__": true, "shape": {"0": ..}, "chunks": {"0": array, ..}}.

Flax's own reader needs the file and a copy of all arrays in memory. Here msgpack reads one array at a time; as the
content is what an array ends with, its place in the file is known, and the copy is dropped for a view.
"""

import math
import os
from typing import Any, BinaryIO

import ml_dtypes
import msgpack
import numpy as np

from dm_generations.errors import UserError
from dm_generations.weights.mmap import MAX_DIMENSIONS, Malformed, MappedFile, release

NDARRAY, NUMPY_SCALAR = 1, 3  # extension types
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in "bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_DEPTH = 64
MAX_ENTRIES = 1_000_000  # of all maps together
MAX_NAME = 10_000  # characters


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
        with open(path, "rb") as stream:
            return _join_chunks(_Reader(file, stream).read_tree(), "")
    except (Malformed, msgpack.UnpackException, ValueError) as error:
        what = error if isinstance(error, Malformed) else "it is cut short or wrong"
        raise UserError(f"{path} is damaged or not a Flax msgpack file: {what}; download it again") from error


class _Reader:
    """Walks the maps of a file; msgpack reads what is in them."""

    def __init__(self, file: MappedFile, stream: BinaryIO) -> None:
        self.file, self.entries = file, 0
        # no list or bytes are outside of arrays
        limits = {"max_str_len": MAX_NAME, "max_array_len": 0, "max_bin_len": 0}
        self.unpacker = msgpack.Unpacker(stream, max_buffer_size=max(file.size, 1 << 20), **limits)

    def read_tree(self) -> dict[str, Any]:
        tree = self.read("", 0)
        if not isinstance(tree, dict):
            raise Malformed("it holds no tree of parameters")
        if self.unpacker.tell() != self.file.size:
            raise Malformed("more follows behind the tree")
        return tree

    def read(self, name: str, depth: int) -> Any:
        """Read a map, an array, or the size or boolean that tells of an array in chunks."""
        position = self.unpacker.tell()
        first = self.file.content[position : position + 1]
        if b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf"):
            return self.read_map(name, depth)
        value = self.unpacker.unpack()
        return self.view(value, name) if isinstance(value, msgpack.ExtType) else value

    def read_map(self, name: str, depth: int) -> dict[str, Any]:
        count = self.unpacker.read_map_header()
        self.entries += count
        if depth > MAX_DEPTH or self.entries > MAX_ENTRIES:
            raise Malformed(f"its tree is deeper than {MAX_DEPTH} levels or has more than {MAX_ENTRIES} entries")
        tree: dict[str, Any] = {}
        for _ in range(count):
            key = self.unpacker.unpack()
            if not isinstance(key, str) or key in tree:
                raise Malformed(f"{name!r:.200} has a name twice, or one that is not text")
            tree[key] = self.read(f"{name}/{key}" if name else key, depth + 1)
        return tree

    def view(self, extension: msgpack.ExtType, name: str) -> np.ndarray:
        """Return the array that was just read as a view of the file, where its content ends at this position."""
        if extension.code not in (NDARRAY, NUMPY_SCALAR):
            raise Malformed(f"{name!r:.200} has the unknown extension type {extension.code}")
        fields = msgpack.unpackb(extension.data, max_array_len=MAX_DIMENSIONS, max_map_len=0)
        if not isinstance(fields, list) or len(fields) != 3 or not _are_sizes(fields[0]):
            raise Malformed(f"{name!r:.200} is not [shape, dtype, bytes]")
        shape, dtype_name, content = fields
        dtype_name = dtype_name.decode() if isinstance(dtype_name, bytes) else dtype_name
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise Malformed(f"{name!r:.200} has the unknown dtype {dtype_name!r:.40}")
        dtype = DTYPES[dtype_name]
        if not isinstance(content, bytes) or math.prod(shape) * dtype.itemsize != len(content):
            raise Malformed(f"{name!r:.200} of dtype {dtype_name} has another number of bytes than its shape")
        return self.file.array(self.unpacker.tell() - len(content), dtype, tuple(shape))


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
