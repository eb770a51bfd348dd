"""What the readers of PyTorch files share: tensors of a state dict looked up, renamed and laid out as Flax has them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.checkpoints.source import Shape


def tensor(state: Mapping[str, Any], name: str, ndim: int, path: Path, prefix: str = "") -> np.ndarray:
    """The tensor `name` with `ndim` axes, none of them empty. Raises UserError if there is none.

    prefix: what stands before `name` in the file, for messages
    """
    found = state.get(name)
    if found is None:
        raise UserError(f"{path} lacks the tensor {prefix}{name}")
    if not isinstance(found, np.ndarray) or found.ndim != ndim or 0 in found.shape:
        what = f"has shape {found.shape}" if isinstance(found, np.ndarray) else "is no tensor"
        raise UserError(f"{path}: {prefix}{name} {what}, a tensor of {ndim} axes is needed")
    return found


def count(state: Mapping[str, Any], template: str, first: int = 0) -> int:
    """How many of `template.format(first)`, `template.format(first + 1)`, ... there are until one is missing."""
    number = first
    while template.format(number) in state:
        number += 1
    return number - first


def only_tensors(state: Any, path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """`state` as a dict of tensors by name. Raises UserError if it holds anything else.

    prefix: what stands before the names in the file, for messages
    """
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {prefix + str(name)!r:.200} is no tensor")
    return dict(state)


def without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def in_file(path: str, shape: Shape, prefix: str = "") -> tuple[str, Shape]:
    """What a PyTorch file calls the parameter of this path, after `prefix`, and the shape that it has there.

    For names whose parts readers join with "/" and leave as they are; what else they change they undo before.
    """
    *modules, leaf = path.split("/")
    if leaf == "kernel":
        shape = (*shape[:-3:-1], *shape[:-2])  # (H, W, in, out) as (out, in, H, W), (in, out) as (out, in)
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return prefix + ".".join([*modules, leaf]), shape


def numbers_apart(path: str) -> str:
    """A path in which readers joined the numbers of a list's modules on, "blocks_0/mlp_2", as "blocks/0/mlp/2"."""
    return re.sub(r"_(\d+)(?=/)", r"/\1", path)


def convolution_kernel(weight: np.ndarray) -> np.ndarray:
    """A view of a convolution's weight (out, in, H, W) as (H, W, in, out); other tensors as they are."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
