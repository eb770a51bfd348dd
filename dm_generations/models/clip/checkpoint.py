"""Checkpoints of CLIP as transformers saves them.

A folder has `config.json` with `model.safetensors` or `pytorch_model.bin`, whole or in several files. Names and layouts
become those of transformers' FlaxCLIPModel. Whether the result is complete and of the right shapes is the caller's
check.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import RawCheckpoint, prefix_errors
from dm_generations.models.clip.network import CLIPConfig
from dm_generations.weights.native import FORMAT, flatten, read_config, read_json_object, read_safetensors
from dm_generations.weights.state_dict import check_tensors, find_state, torch_name
from dm_generations.weights.torch_file import read_torch, state_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"  # after the name of a weight file: which of several files has which tensor

# Constants 0, 1, 2, ... that older transformers saved as if they were parameters.
POSITION_IDS = re.compile(r"(text|vision)_model\.embeddings\.position_ids")
EMBEDDINGS = ("token_embedding", "position_embedding")


def read_transformers(path: Path) -> RawCheckpoint | None:
    """Read a CLIP of transformers, with its tokenizer in the same folder; None for anything else."""
    values = read_config(path)
    if values is None or values.get("model_type") != "clip" or values.get("format") == FORMAT:
        return None
    files = find_weight_files(path)
    if not files:
        raise UserError(f"{path} lacks its weights: {' or '.join(WEIGHT_FILES)}")
    config = CLIPConfig.from_dict(values)
    tensors: dict[str, np.ndarray] = {}
    file_by_prefix: dict[str, Path] = {}
    for file in files:
        found = read_tensors(file)
        tensors |= found
        if len(files) > 1:
            file_by_prefix |= dict.fromkeys(flatten(flax_from_torch(found)), file)
    if file_by_prefix:
        file_by_prefix[""] = path  # what is in none of the files
    return RawCheckpoint("clip", config, flax_from_torch(tensors), files, path, "clip", file_by_prefix, torch_name)


def flax_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """Convert a PyTorch state dict to Flax's names and layouts.

    Args:
        tensors: By name. Dense weights are (out, in), that of the patch convolution is (out, in, H, W).

    Returns:
        Nested dict of arrays, `a.b.weight` as `a/b/kernel`, `scale` or `embedding`. Dense kernels are (in, out), that
        of the patch convolution is (H, W, in, out).

    Raises:
        UserError: A name is a prefix of another, which no module can have.
    """
    tree: dict = {}
    for name, array in tensors.items():
        if POSITION_IDS.fullmatch(name):
            continue
        path, array = _rename(name.split("."), np.asarray(array))
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"CLIP checkpoint: {name} cannot be a tensor and hold others at once")
        if path[-1] in node:
            raise UserError(f"CLIP checkpoint: {name} gives {'/'.join(path)} a second time")
        node[path[-1]] = array
    return tree


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the file of the weights, or the files that its index lists; empty if there is neither.

    Raises:
        UserError: A file that the index lists is missing.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return _read_index(index)
    return ()


def _read_index(index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not say which files of its folder hold the weights: download it again")
    files = tuple(index.parent / name for name in sorted(set(names)))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks a file of its weights: {missing[0]:.200}")
    return files


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a weight file."""
    with prefix_errors(file):
        if file.suffix == ".safetensors":
            return find_state(read_safetensors(file))
        return check_tensors(find_state(state_of(read_torch(file))), file)


def _rename(path: list[str], array: np.ndarray) -> tuple[list[str], np.ndarray]:
    if path[-1] != "weight" or len(path) == 1:
        return path, array
    if path[-2] in EMBEDDINGS:
        return [*path[:-1], "embedding"], array
    if array.ndim == 1:
        return [*path[:-1], "scale"], array
    axes = (2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim)))
    return [*path[:-1], "kernel"], array.transpose(axes)
