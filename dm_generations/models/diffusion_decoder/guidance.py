"""CLIP guidance: each step also goes towards what a CLIP sees as nearer to a text.

The CLIP looks at cutouts, squares of random size and place, of a mixture of the noisy image and the predicted one.

B: batch   N: cutouts of an image   P: texts   F: width of CLIP's vectors   H, W: pixels of an image, H = W
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dm_generations.models.diffusion_decoder.samplers import Loss
from dm_generations.sampling.prng import threefry2x32

ImageFeatures = Callable[[jax.Array], jax.Array]  # images of the CLIP's size in [0, 1] to vectors of any length


@dataclasses.dataclass(frozen=True)
class GuidanceScales:
    """How much guidance counts.

    Attributes:
        clip: The distance of CLIP's vectors.
        total_variation: Differences of neighbouring pixels.
        outside: How far predicted pixels are outside of their range.
    """

    clip: float = 1000.0
    total_variation: float = 0.0
    outside: float = 0.0


def guidance_loss(
    features: ImageFeatures,
    cut_size: int,
    cutouts: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    scales: GuidanceScales,
) -> Loss:
    """Return the loss that `samplers.denoise` takes.

    Args:
        features: Of the CLIP.
        cut_size: Pixels a side that it reads.
        cutouts: (B, N, 3) int32: side, left and top of each.
        targets: (B, P, F), vectors of the texts of each image.
        weights: (B, P), whose sum is 1.
        scales: How much each part counts.
    """

    def loss(mixture: jax.Array, x0: jax.Array) -> jax.Array:
        cut = cut_out((mixture + 1) / 2, cutouts, cut_size)
        batch, count = cut.shape[:2]
        vectors = _unit(features(cut.reshape(-1, *cut.shape[2:]))).reshape(batch, count, 1, -1)
        half_chord = jnp.linalg.norm(vectors - _unit(targets)[:, None], axis=-1) / 2
        distance = 2 * jnp.arcsin(half_chord) ** 2
        total = scales.clip * (distance * weights[:, None]).sum(-1).mean(1).sum()
        if scales.total_variation:
            total += scales.total_variation * total_variation(mixture)
        if scales.outside:
            total += scales.outside * ((x0 - jnp.clip(x0, -1, 1)) ** 2).mean((1, 2, 3)).sum()
        return total

    return loss


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def total_variation(x: jax.Array) -> jax.Array:
    """Mean of the squared differences to the right and downwards of x (B, H, W, 3), summed over B; 0 at the edges."""
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    right, down = padded[:, :-1, 1:] - x, padded[:, 1:, :-1] - x
    return (right**2 + down**2).mean((1, 2, 3)).sum()


def cut_out(images: jax.Array, cutouts: jax.Array, cut_size: int) -> jax.Array:
    """Cut squares out, each averaged or repeated to one size.

    Args:
        images: (B, H, W, 3).
        cutouts: (B, N, 3) int32: side, left and top of each.
        cut_size: Pixels a side of the result.

    Returns:
        (B, N, cut_size, cut_size, 3).
    """
    sides, lefts, tops = jnp.moveaxis(cutouts, -1, 0)
    rows = _averages(sides, tops, images.shape[1], cut_size)
    columns = _averages(sides, lefts, images.shape[2], cut_size)
    return jnp.einsum("bnih,bhwc,bnjw->bnijc", rows, images, columns)


def _averages(sides: jax.Array, firsts: jax.Array, count: int, cut_size: int) -> jax.Array:
    """Weights (B, N, cut_size, count) of adaptive average pooling of the pixels from `firsts` on (B, N)."""
    place = jnp.arange(cut_size)
    starts = place * sides[..., None] // cut_size
    ends = -(-(place + 1) * sides[..., None] // cut_size)
    pixel = jnp.arange(count) - firsts[..., None, None]
    is_inside = (pixel >= starts[..., None]) & (pixel < ends[..., None])
    return is_inside / (ends - starts)[..., None].astype(jnp.float32)


def draw_cutouts(keys: jax.Array, step: jax.Array, count: int, side: int, cut_size: int) -> jax.Array:
    """Draw the cutouts of a step, the same ones for a key whatever else is in the batch.

    Args:
        keys: (B, 2) uint32.
        step: Number of the step.
        count: N.
        side: H.
        cut_size: Pixels a side that the CLIP reads: the smallest cutout, if the image is larger.

    Returns:
        (B, N, 3) int32: side, left and top of each.
    """
    counter = jnp.arange(2 * count, dtype=jnp.uint32)
    draw = jnp.uint32(1 << 31) | jnp.asarray(step, jnp.uint32)  # the noise of a step has no such number
    words = threefry2x32(keys[:, :1], keys[:, 1:], draw, counter)
    uniform = jnp.concatenate([word.astype(jnp.float32) * jnp.float32(2.0**-32) for word in words], axis=1)
    size, left, top = jnp.split(jnp.minimum(uniform, 1 - 2.0**-24)[:, : 3 * count], 3, axis=1)
    smallest = min(side, cut_size)
    sides = (size * (side - smallest) + smallest).astype(jnp.int32)
    lefts, tops = ((place * (side - sides + 1)).astype(jnp.int32) for place in (left, top))
    return jnp.stack([sides, lefts, tops], axis=-1)
