"""3x3 convolutions in fewer multiplications, exact but for rounding: Winograd's minimal filtering.

A picture is cut into overlapping tiles; tiles and kernel are transformed along both axes, multiplied position by
position (matrix products over the channels) and transformed back. Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks", 2015, https://arxiv.org/abs/1509.09308. Where multiplying is what takes the time (CPUs in float32),
this is about twice as fast as the convolution itself; it needs the range and precision of float32.

B: pictures   H, W: rows and columns   C, N: channels in and out   a: positions of a transformed tile along an axis
t: tiles of all pictures   s: rows of a strip, the part of a picture that is computed at a time, to stay in the cache
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_STRIP_TILES = 256  # computed at a time; of 128 channels they take 4.7 MB transformed, which stays in a cache


class Scheme(NamedTuple):
    """Transforms along one axis: out = (from_products @ ((kernel @ k) * (tile @ x))), for a tile x and 3 taps k."""

    tile: np.ndarray  # (a, taps of the input)
    kernel: np.ndarray  # (a, 3)
    from_products: np.ndarray  # (outputs, a)
    step: int  # from tile to tile, in the input

    @property
    def scale(self) -> int:
        """Outputs for each position of the input."""
        return len(self.from_products) // self.step


def _interpolating(points: Sequence[float], outputs: int) -> Scheme:
    """The scheme of Toom and Cook for 3 taps: products of polynomials from their values at `points` and at infinity."""
    positions = outputs + 2
    tile, kernel = np.zeros((positions, positions)), np.zeros((positions, 3))
    from_products = np.zeros((outputs, positions))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        tile[i, :-1] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(3) / np.prod(point - np.array(others))
        from_products[:, i] = point ** np.arange(outputs)
    tile[-1], kernel[-1, -1], from_products[-1, -1] = np.poly(points)[::-1], 1, 1
    return Scheme(tile, kernel, from_products, step=outputs)


# 36 products for 16 outputs, instead of 144. These points lose a third of the precision that Lavin's and Gray's lose
# (0, 1, -1, 2, -2), and their powers are numbers that float32 holds.
CONV = _interpolating((0, 0.75, -0.75, 1.5, -1.5), outputs=4)

# The convolution of a map doubled by repeating each row and column. Of neighbours l, m, r the doubled map has
# l, m, m, r, and two outputs are k0 l + (k1 + k2) m and (k0 + k1) m + k2 r: three products, of l - m, m and r - m.
# So 9 products give 4 outputs, instead of 36 (or 16 as four 2x2 convolutions), without factors that lose precision.
UPSAMPLED_CONV = Scheme(
    tile=np.array([[1, -1, 0], [0, 1, 0], [0, -1, 1]]),
    kernel=np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
    from_products=np.array([[1, 1, 0], [0, 1, 1]]),
    step=1,
)


def transformed_kernel(kernel: np.ndarray, scheme: Scheme) -> np.ndarray:
    """(3, 3, C, N) float32 to (a * a, C, N), positions by columns as in `_convolved`; once for all pictures."""
    both_axes = np.einsum("pi,qj->qpij", scheme.kernel, scheme.kernel).reshape(-1, 9).astype(np.float32)
    return (both_axes @ kernel.reshape(9, -1)).reshape(-1, *kernel.shape[2:])


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scheme: Scheme,
    activate: Callable[[jax.Array], jax.Array] = lambda x: x,
    add: jax.Array | None = None,
) -> jax.Array:
    """`add` plus the convolution, zero-padded, of `activate(x)`, for x (B, H, W, C) float32: (B, rH, rW, N).

    r is 2 for `UPSAMPLED_CONV`   kernel: from `transformed_kernel`   activate: pointwise, and alike at every point
    """
    batch, height, width, _ = x.shape
    rows = strip_rows(batch, height, width, scheme)

    def strip(first):
        pixels = _convolved(_window(x, first, rows, activate), kernel, scheme) + bias
        if add is None:
            return pixels
        return pixels + lax.dynamic_slice_in_dim(add, scheme.scale * first, scheme.scale * rows, axis=1)

    if rows == height:
        return strip(0)
    # One strip after the other, written once: between them nothing leaves the cache.
    _, strips = lax.scan(lambda _, first: (None, strip(first)), None, jnp.arange(0, height, rows))
    return jnp.moveaxis(strips, 0, 1).reshape(batch, scheme.scale * height, scheme.scale * width, kernel.shape[-1])


def strip_rows(batch: int, height: int, width: int, scheme: Scheme) -> int:
    """Rows of the input to compute at a time: a divisor of `height`."""
    tiles = batch * -(-width // scheme.step)  # of a row of tiles
    rows = max(1, _STRIP_TILES // tiles) * scheme.step
    while rows < height and (height % rows or rows + 2 > height):  # a strip is read with a row before and one after
        rows += scheme.step
    return min(rows, height)


def _window(x: jax.Array, first: jax.Array | int, rows: int, activate: Callable) -> jax.Array:
    """`rows` rows of `activate(x)` from `first` on, with one more on each side, zeros outside: (B, s + 2, W + 2, C)."""
    batch, height, width, channels = x.shape
    frame = ((0, 0), (1, 1), (1, 1), (0, 0))
    if rows == height:
        return jnp.pad(activate(x), frame)
    start = jnp.clip(first - 1, 0, height - rows - 2)
    read = lax.dynamic_slice_in_dim(x, start, rows + 2, axis=1)
    framed = lax.optimization_barrier(jnp.pad(activate(read), frame))
    return lax.dynamic_slice_in_dim(framed, first - start, rows + 2, axis=1)


def _convolved(window: jax.Array, kernel: jax.Array, scheme: Scheme) -> jax.Array:
    """(B, s + 2, W + 2, C) to (B, rs, rW, N). Without barriers XLA would compute a step anew for each that follows."""
    batch, height, width, channels = window.shape
    positions, taps = scheme.tile.shape
    outputs = len(scheme.from_products)
    height, width = height - 2, width - 2
    tile_rows, tile_cols = -(-height // scheme.step), -(-width // scheme.step)
    window = jnp.pad(window, ((0, 0), (0, -height % scheme.step), (0, -width % scheme.step), (0, 0)))
    window = lax.optimization_barrier(window)
    x = _combined(scheme.tile, [_every(window, 1, tap, tile_rows, scheme.step) for tap in range(taps)])
    x = lax.optimization_barrier(x)  # (a, B, rows of tiles, W + 2, C)
    x = _combined(scheme.tile, [_every(x, 3, tap, tile_cols, scheme.step) for tap in range(taps)])
    x = lax.optimization_barrier(x.reshape(positions**2, batch * tile_rows * tile_cols, channels))
    x = lax.optimization_barrier(jnp.einsum("ptc,pcn->ptn", x, kernel))
    x = x.reshape(positions, positions, batch, tile_rows, tile_cols, -1)  # of columns, then of rows
    x = lax.optimization_barrier(_combined(scheme.from_products, list(x)))
    x = _combined(scheme.from_products, [x[:, position] for position in range(positions)])
    x = x.transpose(2, 3, 0, 4, 1, 5)  # (B, rows of tiles, outputs, columns of tiles, outputs, N)
    x = x.reshape(batch, tile_rows * outputs, tile_cols * outputs, -1)
    return lax.optimization_barrier(x[:, : scheme.scale * height, : scheme.scale * width])


def _every(x: jax.Array, axis: int, start: int, count: int, step: int) -> jax.Array:
    """`count` slices along `axis`, `step` apart."""
    return lax.slice_in_dim(x, start, start + (count - 1) * step + 1, step, axis)


def _combined(matrix: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    """`matrix` times the parts, stacked on a new first axis; what is 0 or 1 in the matrix costs nothing."""
    sums = []
    for row in matrix:
        terms = [_scaled(part, float(factor)) for factor, part in zip(row, parts, strict=True) if factor]
        sums.append(sum(terms[1:], start=terms[0]))
    return jnp.stack(sums)


def _scaled(part: jax.Array, factor: float) -> jax.Array:
    return part if factor == 1 else -part if factor == -1 else part * jnp.asarray(factor, part.dtype)
