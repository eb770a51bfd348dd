"""Open-MAGVIT2: an image to a grid of tokens, whose bits are the signs of the encoder's channels, and back.

There is no codebook (lookup-free quantisation): bit k of a token, the lowest first, is 1 where channel k is above 0.
Luo et al., "Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-regressive Visual Generation", 2024,
https://arxiv.org/abs/2409.04410. Names are those of `VQModel` of TencentARC/SEED-Voken.

B: batch   H, W: pixels   h, w: token grid   L: tokens, h * w, row-major   C: channels   D: bits of a token
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.models.base import (
    MAX_LAYERS,
    POSITIONS,
    WIDTH,
    Bounds,
    check_config,
    check_levels,
    example_images,
    select_fields,
    token_grid,
)

GROUPS, EPSILON = 32, 1e-6  # of every group norm; the original fixes them
_BOUNDS: Bounds = {
    "ch": WIDTH,
    "ch_mult": (1, 1024),
    "num_res_blocks": (1, MAX_LAYERS),
    "resolution": POSITIONS,
    "z_channels": (1, 24),
    "in_channels": (3, 3),  # RGB
    "out_ch": (3, 3),
}


@dataclasses.dataclass(frozen=True)
class OpenMagvit2Config:
    """Sizes, under the names of `ddconfig` in the original's YAML; the defaults are those of its published models."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # one entry a resolution level, full resolution first
    num_res_blocks: int = 4  # a level
    resolution: int = 128  # pixels a side
    z_channels: int = 18  # D
    in_channels: int = 3
    out_ch: int = 3

    def __post_init__(self) -> None:
        """Raise UserError for sizes that no network can have."""
        check_config("Open-MAGVIT2", self, _BOUNDS)
        check_levels("Open-MAGVIT2", len(self.ch_mult), self.num_res_blocks, self.resolution)

    @classmethod
    def from_dict(cls, values: dict) -> "OpenMagvit2Config":
        """Return the config in a `config.json` or a `ddconfig`; keys that it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        return cls(**select_fields(cls, values))

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return 2**self.z_channels

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.resolution


def _conv(features: int, size: int, dtype: jnp.dtype, name: str, use_bias: bool = True) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, use_bias=use_bias, dtype=dtype, name=name)


def _norm(dtype: jnp.dtype, name: str, is_affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=EPSILON, dtype=dtype, use_bias=is_affine, use_scale=is_affine, name=name)


class ResBlock(nn.Module):
    """Two convolutions, each after a norm and swish, with a shortcut around them."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, features)."""
        h = _conv(self.features, 3, self.dtype, "conv1", False)(nn.swish(_norm(self.dtype, "norm1")(x)))
        h = _conv(self.features, 3, self.dtype, "conv2", False)(nn.swish(_norm(self.dtype, "norm2")(h)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "nin_shortcut", False)(x)
        return x + h


class EncoderLevel(nn.Module):
    """The blocks of one resolution, and the step to half of it."""

    config: OpenMagvit2Config
    level: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the next level's (B, H', W', C')."""
        features = self.config.ch * self.config.ch_mult[self.level]
        for j in range(self.config.num_res_blocks):
            x = ResBlock(features, self.dtype, name=f"block_{j}")(x)
        if self.level == len(self.config.ch_mult) - 1:
            return x
        return nn.Conv(features, (3, 3), (2, 2), padding=1, dtype=self.dtype, name="downsample")(x)


class Encoder(nn.Module):
    """Pixels to vectors, one for each token."""

    config: OpenMagvit2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) in [-1, 1] to (B, h, w, D)."""
        config = self.config
        x = _conv(config.ch, 3, self.dtype, "conv_in", False)(pixels)
        for i in range(len(config.ch_mult)):
            x = EncoderLevel(config, i, self.dtype, name=f"down_{i}")(x)
        for j in range(config.num_res_blocks):
            x = ResBlock(x.shape[-1], self.dtype, name=f"mid_block_{j}")(x)
        return _conv(config.z_channels, 1, self.dtype, "conv_out")(nn.swish(_norm(self.dtype, "norm_out")(x)))


class AdaptiveGroupNorm(nn.Module):
    """A group norm whose scale and offset come from all tokens of the image."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Map x (B, H, W, C), with what the decoder reads, z (B, h, w, D), to (B, H, W, C)."""
        z = z.astype(jnp.float32).reshape(len(z), -1, z.shape[-1])
        variance = z.var(axis=1) * (z.shape[1] / max(z.shape[1] - 1, 1))  # unbiased
        scale = nn.Dense(x.shape[-1], dtype=self.dtype, name="gamma")(jnp.sqrt(variance + EPSILON))
        offset = nn.Dense(x.shape[-1], dtype=self.dtype, name="beta")(z.mean(axis=1))
        return _norm(self.dtype, "norm", False)(x) * scale[:, None, None] + offset[:, None, None]


class Upsample(nn.Module):
    """A convolution to four times the channels, which become two rows and two columns."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, 2 H, 2 W, C)."""
        batch, height, width, channels = x.shape
        x = _conv(4 * channels, 3, self.dtype, "conv1")(x).reshape(batch, height, width, 2, 2, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels)


class DecoderLevel(nn.Module):
    """The blocks of one resolution, and the step to the double."""

    config: OpenMagvit2Config
    level: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the next level's (B, H', W', C')."""
        for j in range(self.config.num_res_blocks):
            x = ResBlock(self.config.ch * self.config.ch_mult[self.level], self.dtype, name=f"block_{j}")(x)
        return Upsample(self.dtype, name="upsample")(x) if self.level else x


class Decoder(nn.Module):
    """Bits of tokens to pixels."""

    config: OpenMagvit2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (B, h, w, D) of -1 and 1 to (B, H, W, 3) in about [-1, 1]."""
        config = self.config
        x = _conv(config.ch * config.ch_mult[-1], 3, self.dtype, "conv_in")(z)
        for j in range(config.num_res_blocks):
            x = ResBlock(x.shape[-1], self.dtype, name=f"mid_block_{j}")(x)
        for i in reversed(range(len(config.ch_mult))):  # up_0 is full resolution and runs last
            x = AdaptiveGroupNorm(self.dtype, name=f"adaptive_{i}")(x, z)
            x = DecoderLevel(config, i, self.dtype, name=f"up_{i}")(x)
        return _conv(config.out_ch, 3, self.dtype, "conv_out")(nn.swish(_norm(self.dtype, "norm_out")(x)))


class OpenMagvit2(nn.Module):
    """Encoder and decoder. Parameters are float32; `dtype` is what the network computes in."""

    ENCODER_PARTS: ClassVar[tuple[str, ...]] = ("encoder",)

    config: OpenMagvit2Config
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode_continuous(self, pixels: jax.Array) -> jax.Array:
        """Channels (B, h, w, D) whose signs are the bits, of pixels (B, H, W, 3); 0 is black and 1 is white."""
        return self.encoder((2 * pixels - 1).astype(self.dtype))

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Bits (B, h, w, D) of -1 and 1, and tokens (B, L) int32, of pixels (B, H, W, 3) float."""
        is_set = self.encode_continuous(pixels) > 0
        tokens = (is_set << jnp.arange(self.config.z_channels)).sum(axis=-1, dtype=jnp.int32)
        return 2.0 * is_set - 1, tokens.reshape(len(pixels), -1)

    def decode(self, bits: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) float32, not clipped, of bits (B, h, w, D) of -1 and 1; 0 is black and 1 is white."""
        return (self.decoder(bits.astype(self.dtype)).astype(jnp.float32) + 1) / 2

    def decode_code(self, tokens: jax.Array) -> jax.Array:
        """Decode tokens.

        Args:
            tokens: (B, L) int with L a square, or grids of them (B, h, w).

        Returns:
            Pixels (B, H, W, 3) float32, not clipped; 0 is black and 1 is white.
        """
        bits = (token_grid(tokens)[..., None] >> jnp.arange(self.config.z_channels)) & 1
        return self.decode(2.0 * bits - 1)

    @staticmethod
    def example_inputs(config: OpenMagvit2Config) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_images(config.image_size)]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The reconstruction of pixels (B, H, W, 3); touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(pixels)[0])
