"""CLIP folders of transformers: `config.json` with `model.safetensors` or `pytorch_model.bin`, whole or in pieces.

Names and layouts become those of transformers' FlaxCLIPModel. Renames and transposes; whether the result is complete
and of the right shapes is the caller's check.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.own import FORMAT, flatten, read_config, read_json_object, read_safetensors
from dm_generations.models.checkpoints.source import Source
from dm_generations.models.checkpoints.torch_names import in_file
from dm_generations.models.checkpoints.torch_pickle import read_torch, state_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"  # behind the name of a weight file: which of its pieces has which tensor

# Constants 0, 1, 2, ... that older transformers saved beside the parameters.
POSITION_IDS = re.compile(r"(text|vision)_model\.embeddings\.position_ids")
EMBEDDINGS = ("token_embedding", "position_embedding")


def clip(path: Path) -> Source | None:
    """A CLIP of transformers, with its tokenizer in the same folder; None for anything else."""
    values = read_config(path)
    if values is None or values.get("model_type") != "clip" or values.get("format") == FORMAT:
        return None
    from dm_generations.models.clip import CLIPConfig

    files = _weight_files(path)
    if not files:
        raise UserError(f"{path} lacks its weights: {' or '.join(WEIGHT_FILES)}")
    config, tensors, places = CLIPConfig.from_dict(values), {}, {}
    for file in files:
        found = _tensors(file)
        tensors |= found
        if len(files) > 1:
            places |= dict.fromkeys(flatten(flax_from_torch(found)), file)
    if places:
        places[""] = path  # what is in no piece
    return Source("clip", config, flax_from_torch(tensors), files, path, "clip", places, in_file)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The file of the weights, or its pieces as the index beside them lists them; empty if there is neither."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}{INDEX_SUFFIX}"
        if index.is_file():
            return _pieces(index)
    return ()


def _pieces(index: Path) -> tuple[Path, ...]:
    pieces = read_json_object(index).get("weight_map")
    names = list(pieces.values()) if isinstance(pieces, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not say which files beside it hold the weights: download it again")
    files = tuple(index.parent / name for name in sorted(set(names)))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks a piece of its weights: {missing[0]:.200}")
    return files


def _tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return read_safetensors(file) if file.suffix == ".safetensors" else state_of(read_torch(file))
    except UserError as error:
        raise error if str(file) in str(error) else UserError(f"{file}: {error}") from error


def flax_from_torch(tensors: Mapping[str, np.ndarray]) -> dict:
    """Nested dict of arrays from a torch `state_dict`, `a.b.weight` becoming `a/b/kernel|scale|embedding`.

    Dense weights (out, in) are transposed to (in, out), the patch convolution (out, in, H, W) to (H, W, in,
    out). Raises UserError for a name that is a prefix of another, which no module can have.
    """
    tree: dict = {}
    for name, array in tensors.items():
        if POSITION_IDS.fullmatch(name):
            continue
        path, array = _renamed(name.split("."), np.asarray(array))
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"CLIP checkpoint: {name} cannot be a tensor and hold others at once")
        if path[-1] in node:
            raise UserError(f"CLIP checkpoint: {name} gives {'/'.join(path)} a second time")
        node[path[-1]] = array
    return tree


def _renamed(path: list[str], array: np.ndarray) -> tuple[list[str], np.ndarray]:
    if path[-1] != "weight" or len(path) == 1:
        return path, array
    if path[-2] in EMBEDDINGS:
        return [*path[:-1], "embedding"], array
    if array.ndim == 1:
        return [*path[:-1], "scale"], array
    axes = (2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim)))
    return [*path[:-1], "kernel"], array.transpose(axes)
