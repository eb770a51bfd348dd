"""Preprocessing of images for CLIP on the device: resized to the same bytes as Pillow, cropped and normalised.

CLIPs were trained on images that Pillow resized. Its two passes are sums of weights in fixed point, rounded to bytes in
between (`Resample.c`), so integers repeat them exactly. Columns come first, as in Pillow up to 12; later versions take
what is quicker first, which is the rows of tall images.

N: images   H, W: pixels   C: channels
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL.Image import Resampling

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

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
        height: rows of the result.
        width: columns of the result.
        resample: a filter in FILTERS.
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


def normalise(pixels, mean=OPENAI_MEAN, std=OPENAI_STD):
    """Normalise uint8 (..., 3) to float32 (..., 3): x / 255, minus `mean`, over `std`. NumPy or JAX arrays."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    mean, std = (np.asarray(values, np.float32).reshape(shape) for values in (mean, std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def preprocess(
    images: jax.Array,
    image_size: int,
    mean=OPENAI_MEAN,
    std=OPENAI_STD,
    resample: Resampling = Resampling.BICUBIC,
) -> jax.Array:
    """Make images (N, H, W, 3) uint8 what CLIP reads, (N, image_size, image_size, 3) float32.

    Args:
        images: of any size.
        image_size: pixels a side that the network reads.
        mean: of RGB in [0, 1].
        std: of RGB in [0, 1].
        resample: a filter in FILTERS.
    """
    return normalise(resize_and_crop(images, image_size, resample), mean, std)
