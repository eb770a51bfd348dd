"""Preprocessing of images for CLIP on the device: resized to the same bytes as Pillow, cropped and normalised.

CLIPs were trained on images that Pillow resized. Its two passes are sums of weights in fixed point, rounded to bytes in
between (`Resample.c`), so integers repeat them exactly. Columns come first, as in Pillow up to 12; later versions take
what is quicker first, which is the rows of tall images.

N: images   H, W: pixels   C: channels
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Resampling

from dm_generations.errors import UserError
from dm_generations.weights.native import read_json_object

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_STEPS = ("do_resize", "do_rescale", "do_normalize")  # that a config may switch off; cropping changes no square image

Triple = tuple[float, float, float]

_PRECISION_BITS = 22  # of the weights: 32, less 8 of a pixel, less 2 for sums beyond it


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


# Each filter, and how far it reaches at most, in pixels of the smaller image. NEAREST works otherwise; no CLIP asks
# for it.
FILTERS: dict[Resampling, tuple[Callable[[float], float], float]] = {
    Resampling.BOX: (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),
    Resampling.BILINEAR: (lambda x: max(0.0, 1 - abs(x)), 1.0),
    Resampling.HAMMING: (
        lambda x: _sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x)) if abs(x) < 1 else 0.0,
        1.0,
    ),
    Resampling.BICUBIC: (_bicubic, 2.0),
    Resampling.LANCZOS: (lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0, 3.0),
}


def resize(images: jax.Array, height: int, width: int, resample: Resampling = Resampling.BICUBIC) -> jax.Array:
    """Resize images (N, H, W, C) uint8 to (N, height, width, C) uint8, the bytes of Pillow's `Image.resize`.

    Args:
        images: (N, H, W, C) uint8.
        height: Rows of the result.
        width: Columns of the result.
        resample: A filter in FILTERS.
    """
    images = _resample_axis(images, 2, width, resample)
    return _resample_axis(images, 1, height, resample)


def _resample_axis(images: jax.Array, axis: int, size: int, resample: Resampling) -> jax.Array:
    if images.shape[axis] == size:
        return images
    positions, weights = _taps(images.shape[axis], size, resample)
    shape = [1] * images.ndim
    shape[axis] = size
    total = jnp.int32(1 << (_PRECISION_BITS - 1))
    for position, weight in zip(positions.T, weights.T, strict=True):
        total = total + jnp.take(images, position, axis=axis, mode="clip").astype(jnp.int32) * weight.reshape(shape)
    return jnp.clip(total >> _PRECISION_BITS, 0, 255).astype(jnp.uint8)


def _taps(old: int, new: int, resample: Resampling) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of `old` make each of `new`, and their weights in fixed point: int32 (new, taps) both."""
    function, reach = FILTERS[resample]
    scale = old / new
    stretch = max(scale, 1.0)
    reach *= stretch
    count = math.ceil(reach) * 2 + 1
    positions, weights = np.zeros((new, count), np.int32), np.zeros((new, count), np.int32)
    for pixel in range(new):
        centre = (pixel + 0.5) * scale
        first, end = max(0, int(centre - reach + 0.5)), min(old, int(centre + reach + 0.5))
        own = [function((position - centre + 0.5) * (1 / stretch)) for position in range(first, end)]
        total = sum(own)
        for index, weight in enumerate(own):
            fixed = weight / total * (1 << _PRECISION_BITS)
            positions[pixel, index] = first + index
            weights[pixel, index] = int(fixed + (0.5 if fixed >= 0 else -0.5))
    return positions, weights


def resize_and_crop(images: jax.Array, image_size: int, resample: Resampling = Resampling.BICUBIC) -> jax.Array:
    """Resize and crop images (N, H, W, 3) uint8 to (N, image_size, image_size, 3) as transformers' CLIP processor does.

    The shorter side becomes image_size and the longer one its share, truncated; then the centre is cropped.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    height, width = image_size * height // short, image_size * width // short
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return resize(images, height, width, resample)[:, top : top + image_size, left : left + image_size]


def normalise(pixels: Any, mean: Triple = OPENAI_MEAN, std: Triple = OPENAI_STD) -> Any:
    """Normalise uint8 (..., 3) to float32 (..., 3): x / 255, minus `mean`, over `std`. NumPy or JAX arrays."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    means, deviations = (np.asarray(values, np.float32).reshape(shape) for values in (mean, std))
    return (pixels.astype(np.float32) / np.float32(255) - means) / deviations


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for one CLIP.

    Attributes:
        image_size: Pixels a side that the network reads.
        mean: Of RGB in [0, 1].
        std: Of RGB in [0, 1].
        resample: A filter in FILTERS.
    """

    image_size: int
    mean: Triple = OPENAI_MEAN
    std: Triple = OPENAI_STD
    resample: Resampling = Resampling.BICUBIC

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "Preprocessing":
        """Read `preprocessor_config.json` of a model, or transformers 5's `processor_config.json`.

        Args:
            folder: The folder of the model. Without these files, the values are OpenAI's.
            image_size: Pixels a side that the network reads.

        Raises:
            UserError: A file is broken, was made for a network of another size, or leaves out a step.
        """
        found = [Path(folder) / name for name in ("preprocessor_config.json", "processor_config.json")]
        path = next(filter(Path.is_file, found), None)
        if path is None:
            return cls(image_size)
        values = read_json_object(path)
        try:
            if path.name == "processor_config.json":
                values = values.get("image_processor", {})
            left_out = [step for step in _STEPS if not values.get(step, True)]
            factor = float(values.get("rescale_factor", 1 / 255))
            mean: tuple[float, ...] = tuple(float(x) for x in values.get("image_mean", OPENAI_MEAN))
            std: tuple[float, ...] = tuple(float(x) for x in values.get("image_std", OPENAI_STD))
            resample = Resampling(values.get("resample", Resampling.BICUBIC))
            sizes = {_side(values[key]) for key in ("size", "crop_size") if key in values}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise UserError(f"{path}: not a CLIP preprocessor config ({error})") from error
        if left_out or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            what = f"{left_out[0]} is false" if left_out else f"rescale_factor is {factor} and not 1/255"
            raise UserError(f"{path}: {what}, which this program does not support")
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(f"{path}: image_mean and image_std must be 3 numbers each, the latter above 0")
        if resample not in FILTERS:
            raise UserError(
                f"{path}: resample {resample} is not one of {', '.join(str(int(name)) for name in FILTERS)}"
            )
        if sizes - {image_size}:
            raise UserError(f"{path}: images of {sorted(sizes)} pixels, but the model reads {image_size}")
        return cls(image_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), resample)

    def apply(self, images: jax.Array) -> jax.Array:
        """Turn images (N, H, W, 3) uint8 of any size into what CLIP reads, (N, image_size, image_size, 3) float32."""
        return normalise(resize_and_crop(images, self.image_size, self.resample), self.mean, self.std)


def _side(size: Any) -> int:
    """Return pixels, of any of the ways in which preprocessor configs write a size."""
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else max(size["height"], size["width"])
    return int(size)
