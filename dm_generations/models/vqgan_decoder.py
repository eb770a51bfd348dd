"""The decoder of a VQGAN for many pictures: what `VQGAN.decode_code` computes, equal but for rounding, in less time.

The 1x1 convolution after the codebook is applied to the codebook, once. Nearest-neighbour doubling and the 3x3
convolution after it are one operation on the small map. A group norm is a factor and an offset for each channel,
applied together with swish where the convolution reads its input; its statistics are float32 in every dtype. On CPUs
in float32 the convolutions are Winograd's (see `winograd`).

B: pictures   h, w: token grid   H, W: rows and columns of the map at hand   C, N: channels in and out   L: h * w
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dm_generations.models import winograd
from dm_generations.models.checkpoints.mapped import release
from dm_generations.models.token_grid import token_grid
from dm_generations.models.vqgan import VQGANConfig
from dm_generations.runtime.params import matmul_precision

_WINOGRAD_CH = 64  # `ch` of the smallest network
_WINOGRAD_CHANNELS = 32  # with fewer on either side of a convolution, transforms take more time than they save
_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True)
class VQGANDecoder:
    """How one VQGAN is decoded on one kind of device: `prepare` its parameters once, then `decode` batches."""

    config: VQGANConfig
    dtype: np.dtype  # of activations and matrices; float64 too, where JAX is told to have it
    platform: str  # "cpu", "gpu" or "tpu"

    def prepare(self, params: dict, put: Callable[[np.ndarray], jax.Array] = jax.device_put) -> dict:
        """The weights that `decode` takes, from NumPy parameters under VQGAN's names, of any float dtype.

        put: places one array on the device; the array is new, and nobody else's
        """
        (codebook,) = (part["embedding"] for part in params["quantize"].values() if "embedding" in part)
        after = {name: np.asarray(leaf, self._wide) for name, leaf in params["post_quant_conv"].items()}
        rows = np.asarray(codebook, self._wide) @ after["kernel"][0, 0] + after["bias"]
        release([codebook])
        return {"codebook": put(rows.astype(self.dtype)), "decoder": self._prepared(params["decoder"], "decoder", put)}

    def decode(self, weights: dict, tokens: jax.Array) -> jax.Array:
        """Tokens (B, L) int, L a square, or grids of them (B, h, w), to pixels (B, H, W, 3), not clipped.

        Pixels are float32 (or float64), [0, 1] is black to white. A token outside the codebook gives some other one's
        row; callers check on the host.
        """
        with matmul_precision(self.dtype):
            x = weights["codebook"][token_grid(tokens)]
            if self.platform == "cpu":
                # One is enough to be busy with, stays in the cache, and comes out the same whatever B is.
                pixels = lax.map(lambda x: self._decoder(weights["decoder"], x[None])[0], x)
            else:
                pixels = self._decoder(weights["decoder"], x)
        pixels = pixels.astype(self._wide)
        return (pixels + 1) / 2 if self.config.is_signed else pixels

    def _prepared(self, params: dict, name: str, put: Callable[[np.ndarray], jax.Array]) -> dict:
        """Kernels in the form that they are applied in; norms and biases stay float32."""
        prepared = {}
        for key, value in params.items():
            if isinstance(value, dict):
                prepared[key] = self._prepared(value, f"{name}/{key}", put)
                continue
            array = np.array(value, self._wide)
            release([value])
            if key == "kernel":
                is_upsampling = name.endswith("/upsample/conv")
                if self._is_winograd and array.shape[0] == 3 and min(array.shape[2:]) >= _WINOGRAD_CHANNELS:
                    scheme = winograd.UPSAMPLED_CONV if is_upsampling else winograd.CONV
                    key, array = "products", winograd.transformed_kernel(array, scheme)
                else:
                    array = (_doubling(array) if is_upsampling else array).astype(self.dtype)
            prepared[key] = put(array)
        return prepared

    @property
    def _wide(self) -> np.dtype:
        """What norms, softmax and pixels are computed in."""
        return np.promote_types(self.dtype, np.float32)

    @property
    def _is_winograd(self) -> bool:
        # Accelerators have convolutions of their own; a small network takes longer to compile than it saves.
        return (self.platform, self.dtype) == ("cpu", np.float32) and self.config.ch >= _WINOGRAD_CH

    # The network, with the structure and the names of `vqgan.Decoder`.

    def _decoder(self, weights: dict, x: jax.Array) -> jax.Array:
        """(B, h, w, D) to (B, H, W, 3)."""
        x = self._mid(weights["mid"], _conv(weights["conv_in"], x))
        for i in reversed(range(len(self.config.ch_mult))):
            x = self._level(weights[f"up_{i}"], x, is_last=i == 0)
        return self._norm_swish_conv(weights["norm_out"], weights["conv_out"], x)

    def _mid(self, weights: dict, x: jax.Array) -> jax.Array:
        x = self._res_block(weights["block_1"], x)
        return self._res_block(weights["block_2"], self._attention(weights["attn_1"], x))

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
        """Factor and offset (B, 1, 1, C) float32 that group norm comes to for each channel of each picture."""
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
        return winograd.convolve(x, weights["products"], weights["bias"], winograd.CONV, activate, add)
    kernel = weights["kernel"]
    y = lax.conv_general_dilated(activate(x), kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)
    y = y + weights["bias"].astype(x.dtype)
    return y if add is None else y + add


def _upsampled_conv(weights: dict, x: jax.Array) -> jax.Array:
    """Each row and column twice, and a 3x3 convolution: (B, H, W, C) to (B, 2H, 2W, N)."""
    if "products" in weights:
        return winograd.convolve(x, weights["products"], weights["bias"], winograd.UPSAMPLED_CONV)
    y = lax.conv_general_dilated(
        x, weights["kernel"], (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2), dimension_numbers=_LAYOUT
    )
    return y + weights["bias"].astype(x.dtype)


def _doubling(kernel: np.ndarray) -> np.ndarray:
    """The kernel (4, 4, C, N) that on a map with zeros between its points does what `kernel` (3, 3, C, N) does on a map
    with each row and column twice, in four multiplications an output instead of nine."""
    for axis in (0, 1):
        before, after = [(0, 0)] * 4, [(0, 0)] * 4
        before[axis], after[axis] = (1, 0), (0, 1)
        kernel = np.pad(kernel, before) + np.pad(kernel, after)
    return kernel
