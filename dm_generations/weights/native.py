"""Our own model folder: `config.json` and `model.safetensors`.

config.json has `"format": "dm-generations"`, the kind of network, its config, and `text_style` for a generator, whose
tokenizer lies in the same folder. Tensors are named by their path in the parameter tree, `decoder/conv_in/kernel`. A
generator's own codec may lie in the folder `codec` within. Large tensors come first and are aligned, so that a device
that computes in the system's memory uses them where the file is mapped, without a copy. So the file is never written
in place: a new one replaces it.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dm_generations.atomic_io import replacing, write_atomic
from dm_generations.errors import UserError, one_line
from dm_generations.weights.mmap import MappedFile, refuse_lfs_pointer, release

FORMAT = "dm-generations"
CONFIG_FILE, WEIGHTS_FILE, CODEC_FOLDER = "config.json", "model.safetensors", "codec"
LINEAGE = "lineage"  # in config.json, of a model that `train` made: an object
_ALIGNMENT = 64
_MAX_JSON = 16 << 20  # bytes: the index of a model in many files can have some
DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # those of weights
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    **{f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)},
}


def read_params(folder: Path) -> dict:
    """Read the weights of a folder of our own, as views of the mapped file.

    Returns:
        Nested dict of arrays.

    Raises:
        UserError: The file is missing or broken.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{folder} lacks its weights: {WEIGHTS_FILE}")
    return unflatten(read_safetensors(weights, is_immutable=True), weights)


def read_safetensors(path: str | os.PathLike, is_immutable: bool = False) -> dict[str, np.ndarray]:
    """Read a `.safetensors` file as views of the mapped file.

    The library checks the file and tells what lies where. Its own arrays are copies: with the pages of the file that
    they are read from, they would take twice the memory of the weights.

    Args:
        path: The file.
        is_immutable: See `MappedFile`.

    Returns:
        Read-only arrays by name, in the order in which they lie and in the dtypes of the file.

    Raises:
        UserError: The file cannot be read, is damaged, or is something else.
    """
    file = MappedFile(path, is_immutable)
    tensors, position = {}, 8 + int.from_bytes(file.content[:8], "little")
    try:
        with safe_open(path, framework="numpy") as opened:
            for name in opened.offset_keys():  # without gaps, which the library has checked
                found = opened.get_slice(name)
                shape, dtype_name = tuple(found.get_shape()), found.get_dtype()
                if dtype_name not in _DTYPES:
                    raise UserError(f"cannot read {path}: its tensor {name!r:.200} has the dtype {dtype_name:.40}")
                dtype = np.dtype(_DTYPES[dtype_name])
                tensors[name] = file.array(position, dtype, shape)
                position += math.prod(shape) * dtype.itemsize
    except SafetensorError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; download it again") from error
    return tensors


def read_config(folder: Path) -> dict | None:
    """Read the `config.json` of a folder.

    Returns:
        Its values; None if there is no such file.

    Raises:
        UserError: It cannot be read, or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    return read_json_object(path) if path.is_file() else None


def read_json_object(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: The file cannot be read, or is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_JSON + 1)
        refuse_lfs_pointer(path, content)
        if len(content) > _MAX_JSON:
            raise UserError(f"{path} is longer than {_MAX_JSON >> 20} MiB, not a configuration")
        values = json.loads(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Turn {"a": {"b": x}} into {"a/b": x}."""
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, np.ndarray], path: Path | str = "the weights") -> dict:
    """Turn {"a/b": x} into {"a": {"b": x}}.

    Args:
        flat: Arrays by path.
        path: The file that they come from, for messages.

    Raises:
        UserError: A name is a prefix of another.
    """
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{path}: {name!r:.200} cannot be a tensor and hold others at once")
        if leaf in node:
            raise UserError(f"{path}: {name!r:.200} cannot be a tensor and hold others at once")
        node[leaf] = value
    return tree


def save(
    folder: Path, kind: str, config: dict, params: dict, dtype: np.dtype | type | None = None, text_style: str = ""
) -> None:
    """Write a folder of our own. Each file is written under another name and then renamed.

    Args:
        folder: Made if it does not exist.
        kind: A name in `registry.KINDS`.
        config: Plain JSON data of the network's config.
        params: Nested dict of arrays, read one at a time, so that they may be mapped.
        dtype: Of the tensors in the file; None leaves each as it is.
        text_style: Of a generator: how its prompts become ids.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as file:
        for part in serialize(flatten(params), dtype):
            file.write(part)
    values: dict[str, Any] = {"format": FORMAT, "kind": kind} | ({"text_style": text_style} if text_style else {})
    write_atomic(folder / CONFIG_FILE, (json.dumps(values | config, indent=2) + "\n").encode())


def serialize(tensors: dict[str, np.ndarray], dtype: np.dtype | type | None = None) -> Iterator[bytes | memoryview]:
    """Yield what a safetensors file of these tensors consists of, the largest first, one at a time.

    The library sorts by name, aligns to 8 bytes and takes all at once.
    """
    order = sorted(tensors, key=lambda name: (-np.asarray(tensors[name]).nbytes, name))
    header, offset = {}, 0
    for name in order:
        array = np.asarray(tensors[name])
        stored = np.dtype(dtype or array.dtype)
        size = array.size * stored.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[stored.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        array = np.asarray(tensors[name])
        yield np.ascontiguousarray(array, dtype or array.dtype).reshape(-1).view(np.uint8).data
        release([array])


def digest(params: dict) -> str:
    """Return what the weights of a model are known by, whatever file they lie in.

    Args:
        params: Nested dict of arrays.

    Returns:
        Hex SHA-256 of the file that `save` writes of them.
    """
    found = hashlib.sha256()
    for part in serialize(flatten(params)):
        found.update(part)
    return found.hexdigest()
