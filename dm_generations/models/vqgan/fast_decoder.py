"""The decoder of a VQGAN in less time: computes what `VQGAN.decode_code` does, equal except for rounding.

The 1x1 convolution after the codebook is applied to the codebook, once. Nearest-neighbour doubling and the 3x3
convolution after it are one operation on the small map. A group norm is a factor and an offset for each channel,
applied together with swish where the convolution reads its input; its statistics are float32 in every dtype. On CPUs
in float32 the convolutions are Winograd's.

Winograd's minimal filtering computes 3x3 convolutions in fewer multiplications, exact except for rounding. An image is
cut into overlapping tiles; tiles and kernel are transformed along both axes, multiplied position by position (matrix
products over the channels) and transformed back. Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
2015, https://arxiv.org/abs/1509.09308. If multiplying is what takes the time (CPUs in float32), this is about twice as
fast as the convolution itself; it needs the range and precision of float32.

B: batch   h, w: token grid   H, W: rows and columns of the map at hand   C, N: channels in and out   L: h * w
a: positions of a transformed tile along an axis   t: tiles of all images
s: rows of a strip, the part of an image that is computed at a time, to stay in the cache
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dm_generations.models.base import token_grid
from dm_generations.models.vqgan.network import VQGANConfig, normalized
from dm_generations.runtime.device import matmul_precision
from dm_generations.weights.mmap import release

WINOGRAD_CH = 64  # `ch` of the smallest network
WINOGRAD_CHANNELS = 32  # with fewer on either side of a convolution, transforms take more time than they save
_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True)
class VQGANDecoder:
    """The decoder of one VQGAN on one kind of device; an `ImageDecoder`.

    Args:
        config: of the VQGAN.
        dtype: of activations and matrices; float64 too, if JAX has it enabled.
        platform: "cpu", "gpu" or "tpu".
    """

    config: VQGANConfig
    dtype: np.dtype
    platform: str

    def prepare_params(self, params: dict, sharding: jax.sharding.Sharding | None = None) -> dict:
        """Put the parameters on the devices in the form that `decode` takes.

        Args:
            params: NumPy arrays under VQGAN's names, of any float dtype.
            sharding: where to put them; None is the default device.
        """
        (codebook,) = (part["embedding"] for part in params["quantize"].values() if "embedding" in part)
        after = {name: np.array(leaf, self._wide, order="C") for name, leaf in params["post_quant_conv"].items()}
        # All are in C order, also views of a file of another order: sums of products are rounded by it.
        rows = np.array(codebook, self._wide, order="C")
        if self.config.is_normalized:
            rows = np.asarray(normalized(jnp.asarray(rows)))
        rows = rows @ after["kernel"][0, 0] + after["bias"]
        release([codebook])
        return {
            "codebook": jax.device_put(rows.astype(self.dtype), sharding),
            "decoder": self._prepare_module(params["decoder"], "decoder", sharding),
        }

    def decode(self, params: dict, tokens: jax.Array) -> jax.Array:
        """Decode tokens.

        Args:
            params: from `prepare_params`.
            tokens: (B, L) int with L a square, or grids of them (B, h, w). A token outside the codebook gives the row
                of some other one; callers check on the host.

        Returns:
            Pixels (B, H, W, 3) float32 (or float64), not clipped; 0 is black and 1 is white.
        """
        with matmul_precision(self.dtype):
            x = params["codebook"][token_grid(tokens)]
            if self.platform == "cpu":
                # One image keeps a CPU busy, stays in the cache, and comes out the same whatever B is.
                pixels = lax.map(lambda x: self._decoder(params["decoder"], x[None])[0], x)
            else:
                pixels = self._decoder(params["decoder"], x)
        pixels = pixels.astype(self._wide)
        return (pixels + 1) / 2 if self.config.is_signed else pixels

    def _prepare_module(self, params: dict, name: str, sharding: jax.sharding.Sharding | None) -> dict:
        """Kernels in the form that they are applied in; norms and biases stay float32."""
        prepared = {}
        for key, value in params.items():
            if isinstance(value, dict):
                prepared[key] = self._prepare_module(value, f"{name}/{key}", sharding)
                continue
            array = np.array(value, self._wide, order="C")
            release([value])
            if key == "kernel":
                is_upsampling = name.endswith("/upsample/conv")
                if self._is_winograd and array.shape[0] == 3 and min(array.shape[2:]) >= WINOGRAD_CHANNELS:
                    scheme = UPSAMPLED_CONV if is_upsampling else CONV
                    key, array = "products", transform_kernel(array, scheme)
                else:
                    array = (_double_kernel(array) if is_upsampling else array).astype(self.dtype)
            prepared[key] = jax.device_put(array, sharding)
        return prepared

    @property
    def _wide(self) -> np.dtype:
        """What norms, softmax and pixels are computed in."""
        return np.promote_types(self.dtype, np.float32)

    @property
    def _is_winograd(self) -> bool:
        # Accelerators have convolutions of their own; a small network takes longer to compile than it saves.
        return (self.platform, self.dtype) == ("cpu", np.float32) and self.config.ch >= WINOGRAD_CH

    # The network, with the structure and the names of `network.Decoder`.

    def _decoder(self, weights: dict, x: jax.Array) -> jax.Array:
        """(B, h, w, D) to (B, H, W, 3)."""
        x = self._mid(weights["mid"], _conv(weights["conv_in"], x))
        for i in reversed(range(len(self.config.ch_mult))):
            x = self._level(weights[f"up_{i}"], x, is_last=i == 0)
        return self._norm_swish_conv(weights["norm_out"], weights["conv_out"], x)

    def _mid(self, weights: dict, x: jax.Array) -> jax.Array:
        x = self._res_block(weights["block_1"], x)
        if "attn_1" in weights:
            x = self._attention(weights["attn_1"], x)
        return self._res_block(weights["block_2"], x)

    def _level(self, weights: dict, x: jax.Array, is_last: bool) -> jax.Array:
        for j in range(self.config.num_res_blocks + 1):
            x = self._res_block(weights[f"block_{j}"], x)
            if f"attn_{j}" in weights:
                x = self._attention(weights[f"attn_{j}"], x)
        if is_last:
            return x
        if "upsample" in weights:
            return _upsampled_conv(weights["upsample"]["conv"], x)
        return x.repeat(2, axis=1).repeat(2, axis=2)

    def _res_block(self, weights: dict, x: jax.Array) -> jax.Array:
        h = self._norm_swish_conv(weights["norm1"], weights["conv1"], x)
        shortcut = _conv(weights["nin_shortcut"], x) if "nin_shortcut" in weights else x
        return self._norm_swish_conv(weights["norm2"], weights["conv2"], h, add=shortcut)

    def _attention(self, weights: dict, x: jax.Array) -> jax.Array:
        """Single-head self-attention over all positions."""
        batch, height, width, channels = x.shape
        scale, offset = self._norm(weights["norm"], x)
        normed = (x.astype(self._wide) * scale + offset).astype(self.dtype)
        q, k, v = (_conv(weights[name], normed).reshape(batch, height * width, channels) for name in ("q", "k", "v"))
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=self._wide) * channels**-0.5
        mixed = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(logits, axis=-1).astype(self.dtype), v)
        return x + _conv(weights["proj_out"], mixed.reshape(x.shape))

    def _norm_swish_conv(self, norm: dict, conv: dict, x: jax.Array, add: jax.Array | None = None) -> jax.Array:
        scale, offset = self._norm(norm, x)
        return _conv(conv, x, lambda x: jax.nn.swish(x.astype(self._wide) * scale + offset).astype(self.dtype), add)

    def _norm(self, weights: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factor and offset (B, 1, 1, C) float32 that group norm comes to for each channel of each image."""
        batch, height, width, channels = x.shape
        groups = self.config.num_groups
        x = x.astype(self._wide)
        count = height * width * (channels // groups)

        def mean(values):  # (B, C) of sums to (B, C) of means of its group
            means = values.reshape(batch, groups, -1).sum(-1) / count
            return jnp.repeat(means, channels // groups, axis=1)

        average = mean(_sum(x))
        variance = jnp.maximum(mean(_sum(x * x)) - average**2, 0)
        scale = weights["scale"] * lax.rsqrt(variance + self.config.group_norm_eps)
        return scale[:, None, None], (weights["bias"] - average * scale)[:, None, None]


def _sum(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (B, C). Row by row: sums of 65,536 numbers one after the other lose a digit more."""
    return lax.optimization_barrier(x.sum(2)).sum(1)


def _conv(
    weights: dict, x: jax.Array, activate: Callable[[jax.Array], jax.Array] = lambda x: x, add: jax.Array | None = None
) -> jax.Array:
    """`add` plus the convolution of `activate(x)`, zero-padded: (B, H, W, C) to (B, H, W, N)."""
    if "products" in weights:
        return convolve(x, weights["products"], weights["bias"], CONV, activate, add)
    kernel = weights["kernel"]
    y = lax.conv_general_dilated(activate(x), kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)
    y = y + weights["bias"].astype(x.dtype)
    return y if add is None else y + add


def _upsampled_conv(weights: dict, x: jax.Array) -> jax.Array:
    """Each row and column twice, and a 3x3 convolution: (B, H, W, C) to (B, 2H, 2W, N)."""
    if "products" in weights:
        return convolve(x, weights["products"], weights["bias"], UPSAMPLED_CONV)
    y = lax.conv_general_dilated(
        x, weights["kernel"], (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=_LAYOUT
    )
    return y + weights["bias"].astype(x.dtype)


def _double_kernel(kernel: np.ndarray) -> np.ndarray:
    """The kernel for a map with zeros between its points that equals `kernel` on a map with rows and columns doubled.

    It takes (3, 3, C, N) to (4, 4, C, N), and needs four multiplications an output instead of nine.
    """
    for axis in (0, 1):
        before, after = [(0, 0)] * 4, [(0, 0)] * 4
        before[axis], after[axis] = (1, 0), (0, 1)
        kernel = np.pad(kernel, before) + np.pad(kernel, after)
    return kernel


STRIP_TILES = 256  # computed at a time; of 128 channels they take 4.7 MB transformed, which stays in a cache


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


def _interpolation_scheme(points: Sequence[float], outputs: int) -> Scheme:
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
CONV = _interpolation_scheme((0, 0.75, -0.75, 1.5, -1.5), outputs=4)

# The convolution of a map doubled by repeating each row and column. Of neighbours l, m, r the doubled map has
# l, m, m, r, and two outputs are k0 l + (k1 + k2) m and (k0 + k1) m + k2 r: three products, of l - m, m and r - m.
# So 9 products give 4 outputs, instead of 36 (or 16 as four 2x2 convolutions), without factors that lose precision.
UPSAMPLED_CONV = Scheme(
    tile=np.array([[1, -1, 0], [0, 1, 0], [0, -1, 1]]),
    kernel=np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
    from_products=np.array([[1, 1, 0], [0, 1, 1]]),
    step=1,
)


def transform_kernel(kernel: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Transform a kernel (3, 3, C, N) float32 to (a * a, C, N), positions by columns as in `_convolve_window`."""
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
    """Convolve `activate(x)`, zero-padded, and add `add`.

    Args:
        x: (B, H, W, C) float32.
        kernel: from `transform_kernel`.
        bias: (N,).
        scheme: the one of the kernel.
        activate: a pointwise function, the same at every point.
        add: (B, rH, rW, N).

    Returns:
        (B, rH, rW, N) float32, with r 2 for `UPSAMPLED_CONV`, else 1.
    """
    batch, height, width, _ = x.shape
    rows = count_strip_rows(batch, height, width, scheme)

    def strip(first):
        pixels = _convolve_window(_window(x, first, rows, activate), kernel, scheme) + bias
        if add is None:
            return pixels
        return pixels + lax.dynamic_slice_in_dim(add, scheme.scale * first, scheme.scale * rows, axis=1)

    if rows == height:
        return strip(0)
    # One strip after the other, written once: between them nothing leaves the cache.
    _, strips = lax.scan(lambda _, first: (None, strip(first)), None, jnp.arange(0, height, rows))
    return jnp.moveaxis(strips, 0, 1).reshape(batch, scheme.scale * height, scheme.scale * width, kernel.shape[-1])


def count_strip_rows(batch: int, height: int, width: int, scheme: Scheme) -> int:
    """Rows of the input to compute at a time: a divisor of `height`."""
    tiles = batch * -(-width // scheme.step)  # of a row of tiles
    rows = max(1, STRIP_TILES // tiles) * scheme.step
    while rows < height and (height % rows or rows + 2 > height):  # a strip is read with a row before and one after
        rows += scheme.step
    return min(rows, height)


def _window(x: jax.Array, first: jax.Array | int, rows: int, activate: Callable) -> jax.Array:
    """`rows` rows of `activate(x)` from `first` on, with one more on each side, zeros outside: (B, s + 2, W + 2, C)."""
    height = x.shape[1]
    frame = ((0, 0), (1, 1), (1, 1), (0, 0))
    if rows == height:
        return jnp.pad(activate(x), frame)
    start = jnp.clip(first - 1, 0, height - rows - 2)
    read = lax.dynamic_slice_in_dim(x, start, rows + 2, axis=1)
    framed = lax.optimization_barrier(jnp.pad(activate(read), frame))
    return lax.dynamic_slice_in_dim(framed, first - start, rows + 2, axis=1)


def _convolve_window(window: jax.Array, kernel: jax.Array, scheme: Scheme) -> jax.Array:
    """(B, s + 2, W + 2, C) to (B, rs, rW, N). Without barriers XLA would compute a step anew for each that follows."""
    batch, height, width, channels = window.shape
    positions, taps = scheme.tile.shape
    outputs = len(scheme.from_products)
    height, width = height - 2, width - 2
    tile_rows, tile_cols = -(-height // scheme.step), -(-width // scheme.step)
    window = jnp.pad(window, ((0, 0), (0, -height % scheme.step), (0, -width % scheme.step), (0, 0)))
    window = lax.optimization_barrier(window)
    x = _combine(scheme.tile, [_slice_every(window, 1, tap, tile_rows, scheme.step) for tap in range(taps)])
    x = lax.optimization_barrier(x)  # (a, B, rows of tiles, W + 2, C)
    x = _combine(scheme.tile, [_slice_every(x, 3, tap, tile_cols, scheme.step) for tap in range(taps)])
    x = lax.optimization_barrier(x.reshape(positions**2, batch * tile_rows * tile_cols, channels))
    x = lax.optimization_barrier(jnp.einsum("ptc,pcn->ptn", x, kernel))
    x = x.reshape(positions, positions, batch, tile_rows, tile_cols, -1)  # of columns, then of rows
    x = lax.optimization_barrier(_combine(scheme.from_products, list(x)))
    x = _combine(scheme.from_products, [x[:, position] for position in range(positions)])
    x = x.transpose(2, 3, 0, 4, 1, 5)  # (B, rows of tiles, outputs, columns of tiles, outputs, N)
    x = x.reshape(batch, tile_rows * outputs, tile_cols * outputs, -1)
    return lax.optimization_barrier(x[:, : scheme.scale * height, : scheme.scale * width])


def _slice_every(x: jax.Array, axis: int, start: int, count: int, step: int) -> jax.Array:
    """`count` slices along `axis`, `step` apart."""
    return lax.slice_in_dim(x, start, start + (count - 1) * step + 1, step, axis)


def _combine(matrix: np.ndarray, parts: list[jax.Array]) -> jax.Array:
    """`matrix` times the parts, stacked on a new first axis; what is 0 or 1 in the matrix costs nothing."""
    sums = []
    for row in matrix:
        terms = [_scale(part, float(factor)) for factor, part in zip(row, parts, strict=True) if factor]
        sums.append(sum(terms[1:], start=terms[0]))
    return jnp.stack(sums)


def _scale(part: jax.Array, factor: float) -> jax.Array:
    return part if factor == 1 else -part if factor == -1 else part * jnp.asarray(factor, part.dtype)
