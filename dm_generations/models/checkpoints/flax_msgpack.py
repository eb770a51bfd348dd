"""Read `flax_model.msgpack`, the weight file of vqgan-jax and dalle-mini, without Flax.

The format is that of `flax.serialization.to_bytes`: a MessagePack map of maps with string keys. An array is
extension type 1, whose payload is itself MessagePack: [shape, dtype name, little-endian bytes in C order]; a
NumPy scalar is extension type 3 with the same payload. Arrays above 1 GiB are cut into flat pieces:
{"__msgpack_chunked_array__": true, "shape": {"0": ..}, "chunks": {"0": array, ..}}.

The file is not trusted: nothing in it is executed, and nothing is allocated that its length does not cover.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from dm_generations.errors import UserError

NDARRAY, NUMPY_SCALAR = 1, 3  # extension types
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split())
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
MAX_DIMENSIONS = 32
MAX_DEPTH = 64
MAX_MAP_ENTRIES = 1_000_000


class _Malformed(ValueError):
    """What is wrong with the content; the reader adds the file's name."""


def read_flax_msgpack(path: Path) -> dict[str, Any]:
    """The tree in the file: nested dicts of read-only NumPy arrays, in the dtypes that the file holds.

    Raises UserError, naming the file, if it cannot be read, is cut short or is something else.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            tree = msgpack.unpackb(
                content,
                ext_hook=_extension,
                # lists are allocated by their header; the tree has none
                max_array_len=0,
                max_map_len=MAX_MAP_ENTRIES,
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _Malformed as error:
        raise UserError(f"{path} is damaged: {error}") from error
    # msgpack's errors are ValueErrors; an empty file is one to mmap; strange keys are TypeErrors
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise UserError(f"{path} is cut short or is not a Flax msgpack file: download it again") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a Flax msgpack file: it holds no tree of parameters")
    try:
        return _arrays_only(tree, "", 0)
    except _Malformed as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _extension(code: int, payload: bytes) -> np.ndarray:
    """The array in a MessagePack extension."""
    if code not in (NDARRAY, NUMPY_SCALAR):
        raise _Malformed(f"unknown extension type {code}")
    fields = msgpack.unpackb(payload, max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0)
    if not (isinstance(fields, list) and len(fields) == 3):
        raise _Malformed("an array is not [shape, dtype, bytes]")
    shape, dtype_name, data = fields
    if isinstance(dtype_name, bytes):
        dtype_name = dtype_name.decode("ascii", "replace")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise _Malformed(f"an array has the unknown dtype {dtype_name!r:.40}")
    if not isinstance(data, bytes):
        raise _Malformed("an array's content is not bytes")
    dtype = DTYPES[dtype_name]
    if math.prod(_checked_shape(shape)) * dtype.itemsize != len(data):
        raise _Malformed(f"an array of shape {shape} and dtype {dtype_name} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def _checked_shape(shape: Any) -> list[int]:
    sizes_ok = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes_ok or len(shape) > MAX_DIMENSIONS:
        raise _Malformed("an array's shape is not a list of sizes")
    return shape


def _arrays_only(node: dict[str, Any], name: str, depth: int) -> Any:
    """`node` with chunked arrays joined. Raises _Malformed for anything but arrays under string keys."""
    if depth > MAX_DEPTH:
        raise _Malformed(f"its tree is deeper than {MAX_DEPTH} levels")
    if CHUNKED in node:
        return _joined(node, name)
    tree = {}
    for key, value in node.items():
        child = f"{name}/{key}" if name else str(key)
        if not isinstance(key, str):
            raise _Malformed(f"{child!r:.200} is not a name")
        if isinstance(value, dict):
            tree[key] = _arrays_only(value, child, depth + 1)
        elif isinstance(value, np.ndarray):
            tree[key] = value
        else:
            raise _Malformed(f"{child!r:.200} is not an array")
    return tree


def _joined(node: dict[str, Any], name: str) -> np.ndarray:
    """The array that was cut into pieces."""
    shape, chunks = (_in_order(node.get(key), name) for key in ("shape", "chunks"))
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise _Malformed(f"{name!r:.200} has pieces that are not flat arrays")
    if len({chunk.dtype for chunk in chunks}) != 1:
        raise _Malformed(f"{name!r:.200} has pieces of different dtypes")
    if math.prod(_checked_shape(shape)) != sum(chunk.size for chunk in chunks):
        raise _Malformed(f"{name!r:.200} has pieces that do not add up to its shape {shape}")
    array = np.concatenate(chunks).reshape(shape)
    array.flags.writeable = False
    return array


def _in_order(items: Any, name: str) -> list[Any]:
    """The values of {"0": .., "1": .., ...}, Flax's way to write a list."""
    if not isinstance(items, dict) or set(items) != {str(index) for index in range(len(items))}:
        raise _Malformed(f"{name!r:.200} is an incomplete list of pieces")
    return [items[str(index)] for index in range(len(items))]
