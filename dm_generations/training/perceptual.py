"""LPIPS: how different two images look, by the features that a VGG16 sees in them.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
https://arxiv.org/abs/1801.03924.

B: images   S: pixels a side, at least MIN_SIZE   h, w: places of a feature map   C: its channels
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dm_generations.errors import UserError
from dm_generations.models.base import prefix_errors
from dm_generations.weights.native import read_safetensors
from dm_generations.weights.state_dict import convolution_kernel, find_state, get_tensor
from dm_generations.weights.torch_file import read_torch, state_of

MIN_SIZE: Final = 16
# Places of the convolutions in VGG16's `features`. Each stage ends in a map that is compared; between two, maps shrink.
_STAGES: Final = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_SHIFT: Final = (-0.030, -0.088, -0.188)  # mean and deviation of ImageNet's pixels, in [-1, 1]
_SCALE: Final = (0.458, 0.448, 0.450)
_EPSILON: Final = 1e-10
# Before the names in the file of a VQGAN with its losses; and what a whole LPIPS has in place of "features.".
_WHOLE: Final = re.compile(r"^loss\.perceptual_loss\.")
_NET: Final = re.compile(r"^net\.slice\d\.")

Stages = list[dict[str, Any]]  # "convolutions": pairs of a kernel and a bias; "head": (C,)


def read_perceptual(paths: Sequence[Path]) -> Stages:
    """Read the weights of LPIPS.

    Args:
        paths: Files of PyTorch or safetensors that have them together: torchvision's `vgg16` and the lpips package's
            `vgg.pth` of linear heads, or one of a whole LPIPS or of a taming VQGAN with its losses.

    Returns:
        Arrays in float32, on the host.

    Raises:
        UserError: A file cannot be read, or a tensor is missing or does not fit the others.
    """
    state: dict[str, Any] = {}
    for path in paths:
        with prefix_errors(path):
            content = read_safetensors(path) if path.suffix == ".safetensors" else state_of(read_torch(path))
        for name, tensor in find_state(content).items():
            state[_NET.sub("features.", _WHOLE.sub("", str(name)))] = tensor
    try:
        return _make_stages(state, Path(", ".join(map(str, paths))))
    except UserError as error:
        raise UserError(f"{error}; --perceptual takes torchvision's vgg16 and the heads of lpips, vgg.pth") from error


def _make_stages(state: dict[str, np.ndarray], path: Path) -> Stages:
    stages, width = [], 3
    for number, places in enumerate(_STAGES):
        convolutions = []
        for place in places:
            name = f"features.{place}"
            weight, bias = get_tensor(state, f"{name}.weight", 4, path), get_tensor(state, f"{name}.bias", 1, path)
            _check_shape(path, f"{name}.weight", weight, (len(bias), width, 3, 3))
            convolutions.append((np.array(convolution_kernel(weight), np.float32), np.array(bias, np.float32)))
            width = len(bias)
        name = f"lin{number}.model.1.weight"
        head = get_tensor(state, name, 4, path)
        _check_shape(path, name, head, (1, width, 1, 1))
        stages.append({"convolutions": convolutions, "head": np.array(head, np.float32).reshape(-1)})
    return stages


def _check_shape(path: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UserError(f"{path}: {name} has shape {array.shape}, not {shape}")


def perceptual_distance(stages: Stages, images: jax.Array, others: jax.Array) -> jax.Array:
    """Compute how different images look from others.

    Args:
        stages: From `read_perceptual`.
        images: (B, S, S, 3) float32, -1 is black and 1 is white.
        others: The same.

    Returns:
        (B,) float32, 0 for equal images.
    """
    total = jnp.zeros(len(images))
    for stage, one, two in zip(stages, _features(stages, images), _features(stages, others), strict=True):
        difference = (_unit(one) - _unit(two)) ** 2
        total += (difference @ stage["head"]).mean((1, 2))
    return total


def _features(stages: Stages, images: jax.Array) -> list[jax.Array]:
    """The map (B, h, w, C) of each stage."""
    x = (images - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    found: list[jax.Array] = []
    for stage in stages:
        if found:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for kernel, bias in stage["convolutions"]:
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = nn.relu(x + bias)
        found.append(x)
    return found


def _unit(features: jax.Array) -> jax.Array:
    """Divide the vector of each place by its length; one of zeros has no gradient."""
    squares = (features**2).sum(-1, keepdims=True)
    is_zero = squares == 0
    return features / (jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squares))) + _EPSILON)
