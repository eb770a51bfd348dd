"""What the readers of PyTorch files share: tensors of a state dict looked up, renamed and laid out as Flax has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.errors import UserError


def tensor(state: Mapping[str, Any], name: str, ndim: int, path: Path) -> np.ndarray:
    """The tensor `name` with `ndim` axes, none of them empty. Raises UserError if there is none."""
    found = state.get(name)
    if found is None:
        raise UserError(f"{path} lacks the tensor {name}")
    if not isinstance(found, np.ndarray) or found.ndim != ndim or 0 in found.shape:
        what = f"has shape {found.shape}" if isinstance(found, np.ndarray) else "is no tensor"
        raise UserError(f"{path}: {name} {what}, a tensor of {ndim} axes is needed")
    return found


def count(state: Mapping[str, Any], template: str, first: int = 0) -> int:
    """How many of `template.format(first)`, `template.format(first + 1)`, ... there are until one is missing."""
    number = first
    while template.format(number) in state:
        number += 1
    return number - first


def only_tensors(state: Any, path: Path) -> dict[str, np.ndarray]:
    """`state` as a dict of tensors by name. Raises UserError if it holds anything else."""
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {str(name)!r:.200} is no tensor")
    return dict(state)


def without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def convolution_kernel(weight: np.ndarray) -> np.ndarray:
    """A view of a convolution's weight (out, in, H, W) as (H, W, in, out); other tensors as they are."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
