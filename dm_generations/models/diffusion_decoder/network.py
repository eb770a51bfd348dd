"""The UNet of DALL-3's diffusion decoder: a noisy image and the codebook vectors of its tokens to the noise in it.

It is the UNet of guided-diffusion (Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021,
https://arxiv.org/abs/2105.05233) with one addition of Jack000's fork: the vectors of the tokens are joined to what
the encoder gives. Module names are those of its files with "_" for the dots before and after numbers.

On a CPU in float32 the 3x3 convolutions are Winograd's, as those of the VQGAN's decoder.

B: batch   h, w: token grid   H, W: rows and columns of the map at hand   C: channels   D: width of a codebook row
T: positions of a map, H * W   E: width of the time embedding
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dm_generations.errors import UserError
from dm_generations.models.base import (
    LAYERS,
    MAX_LAYERS,
    POSITIONS,
    WIDTH,
    Bounds,
    check_config,
    layer_class,
    select_fields,
)
from dm_generations.models.vqgan.fast_decoder import CONV, UPSAMPLED_CONV, convolve, transform_kernel
from dm_generations.runtime.device import matmul_precision
from dm_generations.weights.mmap import release

GROUPS, EPSILON = 32, 1e-5  # of every group norm
MAX_LEVELS = 12
WINOGRAD_CHANNELS = 64  # with fewer on either side of a convolution, transforms take more time than they save
_MAX_PERIOD = 10_000
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_BOUNDS: Bounds = {
    "image_size": POSITIONS,
    "num_channels": WIDTH,
    "level_channels": WIDTH,
    "attention_levels": (0, MAX_LEVELS - 1),
    "num_res_blocks": LAYERS,
    "num_heads": (1, 1024),
    "num_head_channels": (-1, WIDTH[1]),
    "emb_input_dims": WIDTH,
    "emb_output_dims": WIDTH,
    "diffusion_steps": (2, 1 << 16),
}
_CHOICES: Mapping[str, Collection[str]] = {"noise_schedule": ("linear", "cosine")}


@dataclasses.dataclass(frozen=True)
class DiffusionDecoderConfig:
    """Sizes of a decoder and the diffusion it was trained for; names are those of the original's options.

    Attributes:
        image_size: Pixels a side that it was trained at.
        level_channels: Of each resolution level, full resolution first.
        attention_levels: The levels with attention, 0 is full resolution.
        num_res_blocks: Of a level of the encoder; the decoder has one more.
        num_head_channels: Of an attention head; -1 if `num_heads` says how many there are.
        use_new_attention_order: Whether all queries come before all keys, not those of each head.
        emb_input_dims: D.
        emb_output_dims: Channels of the condition that is joined to the encoder's output.
        learn_sigma: Whether it also predicts the variance of a step.
        use_scale_shift_norm: Whether the time embedding scales and shifts after a norm; else it is added before.
        rescale_timesteps: Whether it reads times from 0 to 1000 for any number of `diffusion_steps`.
    """

    image_size: int = 256
    num_channels: int = 256
    level_channels: tuple[int, ...] = (256, 256, 512, 512, 1024, 1024)
    attention_levels: tuple[int, ...] = (3, 4, 5)
    num_res_blocks: int = 2
    emb_input_dims: int = 256
    emb_output_dims: int = 512
    num_heads: int = 4
    num_head_channels: int = -1
    use_new_attention_order: bool = False
    learn_sigma: bool = True
    use_scale_shift_norm: bool = True
    noise_schedule: str = "linear"
    diffusion_steps: int = 1000
    rescale_timesteps: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for sizes that no network can have."""
        check_config("decoder", self, _BOUNDS, _CHOICES)
        levels = len(self.level_channels)
        if not 1 <= levels <= MAX_LEVELS or levels * self.num_res_blocks > MAX_LAYERS:
            raise UserError(
                f"decoder config: {levels} levels of {self.num_res_blocks} blocks are not supported: from 1 to "
                f"{MAX_LEVELS} levels and {MAX_LAYERS} blocks in all"
            )
        middle = self.level_channels[-1] + self.emb_output_dims
        for channels in (self.num_channels, *self.level_channels, middle):
            if channels % GROUPS:
                raise UserError(f"decoder config: {channels} channels are not a multiple of {GROUPS}")
        with_attention = {self.level_channels[level] for level in self.attention_levels if level < levels} | {middle}
        heads = self.num_heads if self.num_head_channels == -1 else self.num_head_channels
        if heads == 0 or any(channels % heads for channels in with_attention):
            name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
            raise UserError(
                f"decoder config: {name} {heads} does not divide the channels with attention, "
                f"{', '.join(map(str, sorted(with_attention)))}"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "DiffusionDecoderConfig":
        """Return the config in a `config.json` of our own.

        Raises:
            UserError: A value is of a wrong type, or no network can have this size.
        """
        return cls(**select_fields(cls, values))

    @property
    def out_channels(self) -> int:
        """Of the network: the noise and, if learned, the variance."""
        return 6 if self.learn_sigma else 3

    def head_count(self, channels: int) -> int:
        """Heads of an attention over so many channels."""
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels

    def image_side(self, grid: int) -> int:
        """Pixels a side of the image of `grid` x `grid` tokens."""
        return -(-grid // 2) << (len(self.level_channels) - 1)


def _initializer(begins_at_zero: bool) -> Callable:
    return nn.initializers.zeros if begins_at_zero else nn.initializers.lecun_normal()


class Conv(nn.Module):
    """A convolution, zero-padded on all sides, or Winograd's if its kernel was prepared for that."""

    features: int
    dtype: Any
    size: int = 3
    stride: int = 1
    upsamples: bool = False  # rows and columns are doubled before
    begins_at_zero: bool = False  # as training starts, so that a block with a shortcut changes nothing

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        activate: Callable[[jax.Array], jax.Array] = lambda x: x,
        add: jax.Array | None = None,
    ) -> jax.Array:
        """Map (B, H, W, C) to `add` plus the convolution of `activate(x)`, (B, H', W', features)."""
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.has_variable("params", "products"):
            products: Any = self.get_variable("params", "products")
            return convolve(x, products, bias, UPSAMPLED_CONV if self.upsamples else CONV, activate, add)
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _initializer(self.begins_at_zero), shape)
        x = activate(x).astype(self.dtype)
        if self.upsamples:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        padding = ((self.size // 2, self.size // 2),) * 2
        strides = (self.stride, self.stride)
        y = lax.conv_general_dilated(x, kernel.astype(self.dtype), strides, padding, dimension_numbers=_LAYOUT)
        y = y + bias.astype(self.dtype)
        return y if add is None else y + add


class Pointwise(nn.Module):
    """A matrix on the channels, stored as a convolution of one axis."""

    features: int
    dtype: Any
    begins_at_zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, T, C) to (B, T, features)."""
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = self.param("kernel", _initializer(self.begins_at_zero), (1, x.shape[-1], self.features))
        return x @ kernel[0].astype(self.dtype) + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group norm as a factor and an offset for each channel, which whoever reads the map applies."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factor and offset (B, 1, 1, C) float32 of x (B, H, W, C)."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)
        count = height * width * (channels // GROUPS)

        def mean(values: jax.Array) -> jax.Array:  # (B, C) of sums to (B, C) of means of its group
            means = values.reshape(batch, GROUPS, -1).sum(-1) / count
            return jnp.repeat(means, channels // GROUPS, axis=1)

        average = mean(_sum(x))
        variance = jnp.maximum(mean(_sum(x * x)) - average**2, 0)
        factor = scale * lax.rsqrt(variance + EPSILON)
        return factor[:, None, None], (bias - average * factor)[:, None, None]


def _sum(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (B, C). Row by row: sums of 65,536 numbers one after the other lose a digit more."""
    return lax.optimization_barrier(x.sum(2)).sum(1)


class ResBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, with a shortcut around them."""

    config: DiffusionDecoderConfig
    features: int
    dtype: Any
    resample: str = ""  # "down" halves the map and "up" doubles it

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) and SiLU of the time embedding (B, E) to (B, H', W', features)."""
        factor, offset = GroupNorm(name="in_layers_0")(x)
        conv = Conv(self.features, self.dtype, upsamples=self.resample == "up", name="in_layers_2")
        if self.resample == "down":
            h = conv(_halve(_activated(x, factor, offset)))
            x = _halve(x)
        else:
            h = conv(x, lambda x: _activated(x, factor, offset))
        if self.resample == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        is_scaled = self.config.use_scale_shift_norm
        shift = nn.Dense(self.features * (2 if is_scaled else 1), name="emb_layers_1")(time)[:, None, None]
        if not is_scaled:
            h = h + shift.astype(self.dtype)
        factor_2, offset_2 = GroupNorm(name="out_layers_0")(h)
        if is_scaled:
            scale, shift = jnp.split(shift, 2, axis=-1)
            factor_2, offset_2 = factor_2 * (1 + scale), offset_2 * (1 + scale) + shift
        if x.shape[-1] != self.features:
            x = Conv(self.features, self.dtype, size=1, name="skip_connection")(x)
        last = Conv(self.features, self.dtype, begins_at_zero=True, name="out_layers_3")
        return last(h, lambda h: _activated(h, factor_2, offset_2), add=x)


def _activated(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return nn.silu(x.astype(jnp.float32) * factor + offset).astype(x.dtype)


def _halve(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to the averages of 2x2, (B, H / 2, W / 2, C)."""
    batch, height, width, channels = x.shape
    x = x.astype(jnp.float32).reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.mean((2, 4)).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention over all positions."""

    config: DiffusionDecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        heads = self.config.head_count(channels)
        factor, offset = GroupNorm(name="norm")(x)
        normed = (x.astype(jnp.float32) * factor + offset).astype(self.dtype)
        qkv = Pointwise(3 * channels, self.dtype, name="qkv")(normed.reshape(batch, height * width, channels))
        order = (3, heads) if self.config.use_new_attention_order else (heads, 3)
        qkv = qkv.reshape(batch, height * width, *order, channels // heads)
        q, k, v = jnp.moveaxis(qkv, 2 if self.config.use_new_attention_order else 3, 0)
        scale = (channels // heads) ** -0.25  # of each: their product stays in the range of float16
        scale = jnp.asarray(scale, self.dtype)
        logits = jnp.einsum("bqhc,bkhc->bhqk", q * scale, k * scale, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, height * width, channels)
        return x + Pointwise(channels, self.dtype, begins_at_zero=True, name="proj_out")(mixed).reshape(x.shape)


class Condition(nn.Module):
    """The vectors of the tokens at half their resolution."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Map (B, h, w, D) to (B, ceil(h / 2), ceil(w / 2), features)."""
        return Conv(self.features, self.dtype, stride=2, name="op")(vectors)


class UNet(nn.Module):
    """The network. Parameters are float32; `dtype` is that of the convolutions and of what they read and write.

    Norms, the softmax, everything about the time and the last convolution are float32 in every dtype.
    """

    config: DiffusionDecoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, times: jax.Array, vectors: jax.Array) -> jax.Array:
        """Predict the noise.

        Args:
            x: Noisy images (B, H, W, 3) float32.
            times: (B,) float32, from 0 to 1000.
            vectors: Codebook rows of the tokens (B, h, w, D); H is `config.image_side(h)`.

        Returns:
            (B, H, W, 3) float32; if the variance is learned (B, H, W, 6), the last three for it.
        """
        config, levels = self.config, len(self.config.level_channels)
        block = layer_class(ResBlock)
        time = nn.Dense(4 * config.num_channels, name="time_embed_0")(sinusoid(times, config.num_channels))
        time = nn.silu(nn.Dense(4 * config.num_channels, name="time_embed_2")(nn.silu(time)))
        h = Conv(config.level_channels[0], self.dtype, name="input_blocks_0_0")(x.astype(self.dtype))
        kept, number = [h], 1
        for level, channels in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                h = self._block("input_blocks", number, channels, h, time, level)
                kept, number = [*kept, h], number + 1
            if level != levels - 1:
                h = block(config, channels, self.dtype, "down", name=f"input_blocks_{number}_0")(h, time)
                kept, number = [*kept, h], number + 1
        condition = Condition(config.emb_output_dims, self.dtype, name="external_block")(vectors.astype(self.dtype))
        h = jnp.concatenate([h, condition], axis=-1)
        h = block(config, h.shape[-1], self.dtype, name="middle_block_cond_0")(h, time)
        h = layer_class(Attention)(config, self.dtype, name="middle_block_cond_1")(h)
        h = block(config, config.level_channels[-1], self.dtype, name="middle_block_cond_2")(h, time)
        number = 0
        for level in reversed(range(levels)):
            channels = config.level_channels[level]
            for index in range(config.num_res_blocks + 1):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                h = self._block("output_blocks", number, channels, h, time, level)
                if level and index == config.num_res_blocks:
                    place = 2 if level in config.attention_levels else 1
                    h = block(config, channels, self.dtype, "up", name=f"output_blocks_{number}_{place}")(h, time)
                number += 1
        h = h.astype(jnp.float32)
        factor, offset = GroupNorm(name="out_0")(h)
        last = Conv(config.out_channels, jnp.float32, begins_at_zero=True, name="out_2")
        return last(h, lambda h: _activated(h, factor, offset))

    def _block(self, part: str, number: int, channels: int, h: jax.Array, time: jax.Array, level: int) -> jax.Array:
        h = layer_class(ResBlock)(self.config, channels, self.dtype, name=f"{part}_{number}_0")(h, time)
        if level in self.config.attention_levels:
            h = layer_class(Attention)(self.config, self.dtype, name=f"{part}_{number}_1")(h)
        return h

    @staticmethod
    def example_inputs(config: DiffusionDecoderConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        side = config.image_side(2)
        shapes = (1, side, side, 3), (1,), (1, 2, 2, config.emb_input_dims)
        return [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]


def sinusoid(times: jax.Array, width: int) -> jax.Array:
    """Cosines, then sines, of times (B,) at geometric frequencies: (B, width) float32."""
    half = width // 2
    frequencies = np.exp(-math.log(_MAX_PERIOD) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = times.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@dataclasses.dataclass(frozen=True)
class PreparedUNet:
    """The network on one kind of device: parameters are prepared once, then it is called.

    Args:
        config: Of the network.
        dtype: See `UNet`.
        platform: "cpu", "gpu" or "tpu".
    """

    config: DiffusionDecoderConfig
    dtype: np.dtype
    platform: str

    def prepare_params(self, params: dict, sharding: jax.sharding.Sharding | None = None) -> dict:
        """Put the parameters on the devices, or where `sharding` says, in the form that `__call__` takes."""
        return {
            name: self._prepare(module, name, is_wide=name.startswith(("out_", "time_embed")), sharding=sharding)
            for name, module in params.items()
        }

    def __call__(self, params: dict, x: jax.Array, times: jax.Array, vectors: jax.Array) -> jax.Array:
        """See `UNet`."""
        network: Any = UNet(self.config, self.dtype)
        with matmul_precision(self.dtype):
            return network.apply({"params": params}, x, times, vectors)

    def _prepare(self, params: dict, name: str, is_wide: bool, sharding: jax.sharding.Sharding | None) -> dict:
        prepared = {}
        for key, value in params.items():
            path = f"{name}/{key}"
            if isinstance(value, dict):
                is_linear = key.startswith("emb_layers")
                prepared[key] = self._prepare(value, path, is_wide or is_linear, sharding)
                continue
            array = np.array(value, np.float32, order="C")
            release([value])
            if key == "kernel" and self._is_winograd(array, name):
                scheme = UPSAMPLED_CONV if self._is_upsampling(name) else CONV
                key, array = "products", transform_kernel(array, scheme)
            elif key == "kernel" and not is_wide:
                array = array.astype(self.dtype)
            prepared[key] = jax.device_put(array, sharding)
        return prepared

    def _is_winograd(self, kernel: np.ndarray, name: str) -> bool:
        # Accelerators have convolutions of their own; a strided one has fewer products than its transform.
        is_known = kernel.ndim == 4 and kernel.shape[0] == 3 and min(kernel.shape[2:]) >= WINOGRAD_CHANNELS
        return is_known and (self.platform, self.dtype) == ("cpu", np.float32) and name != "external_block/op"

    def _is_upsampling(self, name: str) -> bool:
        """Whether a kernel is the first one of a block that doubles the map: the last of an output block."""
        module, _, leaf = name.partition("/")
        return module.startswith("output_blocks_") and not module.endswith("_0") and leaf == "in_layers_2"
