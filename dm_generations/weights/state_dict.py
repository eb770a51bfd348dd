"""PyTorch state dicts: tensors looked up, renamed and laid out as Flax has them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError

Shape = tuple[int, ...]


def get_tensor(state: Mapping[str, Any], name: str, ndim: int, path: Path, prefix: str = "") -> np.ndarray:
    """The tensor of this name.

    Args:
        state: a state dict.
        name: of the tensor in `state`.
        ndim: the number of axes that it must have, none of them empty.
        path: the file, for messages.
        prefix: what precedes `name` in the file, for messages.

    Raises:
        UserError: if there is no such tensor.
    """
    found = state.get(name)
    if found is None:
        raise UserError(f"{path} lacks the tensor {prefix}{name}")
    if not isinstance(found, np.ndarray) or found.ndim != ndim or 0 in found.shape:
        what = f"has shape {found.shape}" if isinstance(found, np.ndarray) else "is not a tensor"
        raise UserError(f"{path}: {prefix}{name} {what}, a tensor of {ndim} axes is needed")
    return found


def count_numbered(state: Mapping[str, Any], template: str, first: int = 0) -> int:
    """How many of `template.format(first)`, `template.format(first + 1)`, ... there are until one is missing."""
    number = first
    while template.format(number) in state:
        number += 1
    return number - first


def check_tensors(state: Any, path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Return `state` as a dict of tensors by name.

    Args:
        state: what the file holds.
        path: the file, for messages.
        prefix: what precedes the names in the file, for messages.

    Raises:
        UserError: if it holds anything else.
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {prefix + str(name)!r:.200} is not a tensor")
    return dict(state)


def strip_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same_name(path: str, shape: Shape) -> tuple[str, Shape]:
    """Name and shape, in the file, of a parameter that the file calls by its path."""
    return path, shape


def torch_name(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """Name and shape, in a PyTorch file, of the parameter of this path.

    It is for names whose parts readers join with "/" and leave as they are; what else a reader changes, it must undo
    before.

    Args:
        path: of the parameter, "a/b/kernel".
        shape: of the parameter.
        prefix: what precedes the name in the file.
    """
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        shape = (*shape[:-3:-1], *shape[:-2])  # (H, W, in, out) as (out, in, H, W), (in, out) as (out, in)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return prefix + ".".join([*modules, leaf]), shape


def split_list_indices(path: str) -> str:
    """A path in which list indices are joined to names, "blocks_0/mlp_2", as "blocks/0/mlp/2"."""
    return re.sub(r"_(\d+)(?=/)", r"/\1", path)


def join_list_indices(name: str) -> str:
    """A PyTorch name with list indices joined to names: "blocks.0.mlp.2.weight" as "blocks_0.mlp_2.weight"."""
    return re.sub(r"\.(\d+)(?=\.)", r"_\1", name)


def convolution_kernel(weight: np.ndarray) -> np.ndarray:
    """A view of a convolution's weight (out, in, H, W) as (H, W, in, out); other tensors as they are."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
