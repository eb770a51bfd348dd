"""Read a `.safetensors` file as views of the mapped file.

The format (https://github.com/huggingface/safetensors, README, "Format"): the length N of the header as
little-endian uint64, N bytes of JSON, the data. The header has, for each tensor, its dtype, its shape and where its
bytes begin and end in the data; the tensors cover the data without gap or overlap, little-endian and in C order.
"""

import json
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from dm_generations.errors import UserError
from dm_generations.weights.mmap import MAX_DIMENSIONS, Malformed, MappedFile

# 100 MB are allowed; 1 MB is what some 10,000 tensors need, and JSON takes many times its length in memory
MAX_HEADER = 16 << 20
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


def read_safetensors(path: str | os.PathLike, stays: bool = False) -> dict[str, np.ndarray]:
    """The tensors by name, in the order of the header: read-only views, in the dtypes that the file holds.

    stays: see `MappedFile`. Raises UserError, naming the file, if it cannot be read, is cut short or is something else.
    """
    file = MappedFile(path, stays)
    try:
        header, start = _header(file)
        fields = {name: _fields(name, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_cover([(begin, end) for _, _, begin, end in fields.values()], file.size - start)
    except Malformed as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return {name: file.array(start + begin, dtype, shape) for name, (dtype, shape, begin, _) in fields.items()}


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The JSON of the header, and where the data begin."""
    length = int.from_bytes(file.content[:8], "little")
    if file.size < 8 or length > file.size - 8 or length > MAX_HEADER:
        raise Malformed("it is cut short or not a safetensors file: download it again")
    try:
        header = json.loads(file.content[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_repeats)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("its header is not JSON, so it is not a safetensors file: download it again") from error
    if not isinstance(header, dict):
        raise Malformed("its header is no JSON object")
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Malformed("its header has a name twice")
    return values


def _fields(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, begin and end in bytes of one tensor."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        found = repr(dtype) if isinstance(dtype, str) else "that is no text"
        raise Malformed(f"its tensor {name!r:.200} has a dtype that this program cannot read, {found:.40}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise Malformed(f"its tensor {name!r:.200} has a shape or place that are no sizes")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise Malformed(f"its tensor {name!r:.200} has another size than its shape and dtype")
    return DTYPES[dtype], tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _check_cover(places: list[tuple[int, int]], size: int) -> None:
    """Raises Malformed unless the places cover `size` bytes, without gap or overlap."""
    position = 0
    for begin, end in sorted(places):
        if begin != position:
            raise Malformed("its tensors overlap or leave gaps")
        position = end
    if position != size:
        raise Malformed(f"its tensors are {position} bytes, but {size} are there: download it again")
