"""VQGAN: an image to a grid of codebook indices, and back.

Module and parameter names are those of vqgan-jax (`VQModel`), so its checkpoints load without renaming. The VQGANs of
taming-transformers (`VQModel`, `GumbelVQ`) and of its descendants (Chameleon, IBQ, diffusers' `VQModel` of aMUSEd) are
the same network under other options.
Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, https://arxiv.org/abs/2012.09841

B: batch   H, W: pixels   h, w: token grid   L: tokens, h * w, row-major   C: channels   D: codebook width
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.models.base import (
    MAX_LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Bounds,
    check_config,
    check_levels,
    example_images,
    layer_class,
    select_fields,
    token_grid,
)

_SHORTEST = 1e-12  # length that a vector is divided by at least, as PyTorch's normalize
_BOUNDS: Bounds = {
    "ch": WIDTH,
    "conv_in_ch": WIDTH,
    "ch_mult": (1, 1024),
    "num_res_blocks": (1, MAX_LAYERS),
    "attn_resolutions": POSITIONS,
    "resolution": POSITIONS,
    "z_channels": WIDTH,
    "n_embed": VOCABULARY,
    "embed_dim": WIDTH,
    "in_channels": (3, 3),  # RGB
    "out_ch": (3, 3),
    "num_groups": WIDTH,
    "group_norm_eps": (0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN, under the names of vqgan-jax's `config.json`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # one entry a resolution level, full resolution first
    num_res_blocks: int = 2  # a level of the encoder; the decoder has one more
    attn_resolutions: tuple[int, ...] = (16,)  # nominal side lengths, in pixels, of levels with attention
    resolution: int = 256  # pixels a side
    z_channels: int = 256
    n_embed: int = 16384
    embed_dim: int = 256
    in_channels: int = 3
    out_ch: int = 3
    resamp_with_conv: bool = True
    num_groups: int = 32  # of every group norm; vqgan-jax fixes it
    group_norm_eps: float = 1e-6
    is_signed: bool = False  # inside, pixels are in [-1, 1]: taming's; vqgan-jax keeps them in [0, 1]
    is_gumbel: bool = False  # tokens are the argmax of logits, not the nearest codebook row
    is_dot_product: bool = False  # the row with the largest dot product, not the nearest one: IBQ's
    conv_in_ch: int | None = None  # channels of the encoder's first convolution; None is `ch`
    has_mid_attention: bool = True
    rounds_pixels: bool = False  # to the nearest of 256 levels; others cut off
    is_normalized: bool = False  # codebook rows and vectors get length 1 wherever they are used: LlamaGen's

    def __post_init__(self) -> None:
        """Raise UserError for sizes that no network can have."""
        check_config("VQGAN", self, _BOUNDS)
        check_levels("VQGAN", len(self.ch_mult), self.num_res_blocks, self.resolution)

    @classmethod
    def from_dict(cls, values: dict) -> "VQGANConfig":
        """Return the config in a `config.json`; keys that do not change the network are ignored.

        Raises:
            UserError: A value is of a wrong type, or no network can have this size.
        """
        return cls(**select_fields(cls, values))

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.n_embed

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.resolution


def _conv(features: int, size: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


def _norm(config: VQGANConfig, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(config.num_groups, epsilon=config.group_norm_eps, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """Two convolutions, each after a norm and swish, with a shortcut around them."""

    config: VQGANConfig
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, features)."""
        h = nn.swish(_norm(self.config, self.dtype, "norm1")(x))
        h = _conv(self.features, 3, self.dtype, "conv1")(h)
        h = nn.swish(_norm(self.config, self.dtype, "norm2")(h))
        h = _conv(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    config: VQGANConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the same shape."""
        batch, height, width, channels = x.shape
        normed = _norm(self.config, self.dtype, "norm")(x)
        q, k, v = (
            _conv(channels, 1, self.dtype, name)(normed).reshape(batch, height * width, channels)
            for name in ("q", "k", "v")
        )
        logits = jnp.einsum("bqc,bkc->bqk", q, k).astype(jnp.float32) * channels**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(batch, height, width, channels)
        return x + _conv(channels, 1, self.dtype, "proj_out")(mixed)


class Resample(nn.Module):
    """Halves (`down`) or doubles the resolution."""

    config: VQGANConfig
    down: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H / 2, W / 2, C) or (B, 2 H, 2 W, C)."""
        batch, height, width, channels = x.shape
        if not self.down:
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
            x = x.reshape(batch, 2 * height, 2 * width, channels)  # nearest neighbour
            return _conv(channels, 3, self.dtype, "conv")(x) if self.config.resamp_with_conv else x
        if not self.config.resamp_with_conv:
            return nn.avg_pool(x, (2, 2), (2, 2))
        padding = ((0, 1), (0, 1))  # bottom and right alone, as the original pads
        return nn.Conv(channels, (3, 3), (2, 2), padding=padding, dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next one."""

    config: VQGANConfig
    features: int
    blocks: int
    has_attention: bool
    resample: str | None  # "downsample", "upsample" or none
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the next level's (B, H', W', features)."""
        block = layer_class(ResBlock)
        for j in range(self.blocks):
            x = block(self.config, self.features, self.dtype, name=f"block_{j}")(x)
            if self.has_attention:
                x = AttnBlock(self.config, self.dtype, name=f"attn_{j}")(x)
        if self.resample:
            x = Resample(self.config, self.resample == "downsample", self.dtype, name=self.resample)(x)
        return x


class Mid(nn.Module):
    """The blocks at the lowest resolution."""

    config: VQGANConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to the same shape."""
        x = ResBlock(self.config, x.shape[-1], self.dtype, name="block_1")(x)
        if self.config.has_mid_attention:
            x = AttnBlock(self.config, self.dtype, name="attn_1")(x)
        return ResBlock(self.config, x.shape[-1], self.dtype, name="block_2")(x)


def _has_attention(config: VQGANConfig, level: int) -> bool:
    # By the level's nominal resolution: a larger grid decodes through the same modules.
    return config.resolution // 2**level in config.attn_resolutions


class Encoder(nn.Module):
    """Pixels to vectors, one for each token."""

    config: VQGANConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) to (B, h, w, z_channels)."""
        config, last = self.config, len(self.config.ch_mult) - 1
        x = _conv(config.conv_in_ch or config.ch, 3, self.dtype, "conv_in")(pixels)
        for i, mult in enumerate(config.ch_mult):
            resample = "downsample" if i != last else None
            attention = _has_attention(config, i)
            x = Level(
                config,
                config.ch * mult,
                config.num_res_blocks,
                attention,
                resample,
                self.dtype,
                name=f"down_{i}",
            )(x)
        x = Mid(config, self.dtype, name="mid")(x)
        x = nn.swish(_norm(config, self.dtype, "norm_out")(x))
        return _conv(config.z_channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Vectors of tokens to pixels."""

    config: VQGANConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (B, h, w, z_channels) to (B, H, W, 3)."""
        config = self.config
        x = _conv(config.ch * config.ch_mult[-1], 3, self.dtype, "conv_in")(z)
        x = Mid(config, self.dtype, name="mid")(x)
        for i in reversed(range(len(config.ch_mult))):  # up_0 is full resolution and runs last
            resample = "upsample" if i else None
            features, blocks = config.ch * config.ch_mult[i], config.num_res_blocks + 1
            attention = _has_attention(config, i)
            x = Level(config, features, blocks, attention, resample, self.dtype, name=f"up_{i}")(x)
        x = nn.swish(_norm(config, self.dtype, "norm_out")(x))
        return _conv(config.out_ch, 3, self.dtype, "conv_out")(x)


def normalized(rows: jax.Array) -> jax.Array:
    """Vectors (..., D) divided by their length."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), _SHORTEST)


class Quantize(nn.Module):
    """The codebook: a vector to the index of its nearest row, or of the largest dot product, and back.

    The first of equals counts.
    """

    config: VQGANConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Make the submodules."""
        self.embedding = nn.Embed(self.config.n_embed, self.config.embed_dim, dtype=self.dtype, param_dtype=jnp.float32)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (..., D) to indices (...), int32."""
        codebook, z = self.embedding.embedding, z.astype(jnp.float32)
        if self.config.is_normalized:
            codebook, z = normalized(codebook), normalized(z)
        products = jnp.einsum("...d,nd->...n", z, codebook)
        if self.config.is_dot_product:
            return jnp.argmax(products, axis=-1).astype(jnp.int32)
        distances = jnp.sum(z**2, -1, keepdims=True) + jnp.sum(codebook**2, -1) - 2 * products
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codebook rows (..., D) of indices (...)."""
        rows = self.embedding(indices)
        return normalized(rows) if self.config.is_normalized else rows


class GumbelQuantize(nn.Module):
    """The codebook of taming's GumbelVQ: a vector to the index of its largest logit (first on ties), and back.

    The original adds Gumbel noise to the logits, in evaluation too; without it the tokens are the likeliest ones.
    """

    config: VQGANConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Make the submodules."""
        self.embed = nn.Embed(self.config.n_embed, self.config.embed_dim, dtype=self.dtype, param_dtype=jnp.float32)
        self.proj = nn.Conv(self.config.n_embed, (1, 1), dtype=jnp.float32)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Map (B, h, w, D) to indices (B, h, w), int32."""
        return jnp.argmax(self.proj(z.astype(jnp.float32)), axis=-1).astype(jnp.int32)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codebook rows (..., D) of indices (...)."""
        return self.embed(indices)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Parameters are float32; `dtype` is what the network computes in."""

    ENCODER_PARTS: ClassVar[tuple[str, ...]] = ("encoder", "quant_conv")

    config: VQGANConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        self.quantize = (GumbelQuantize if config.is_gumbel else Quantize)(config, self.dtype)
        self.quant_conv = nn.Conv(config.embed_dim, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(config.z_channels, (1, 1), dtype=self.dtype)

    def encode_continuous(self, pixels: jax.Array) -> jax.Array:
        """Vectors (B, h, w, D) before quantisation, of pixels (B, H, W, 3); 0 is black and 1 is white."""
        if self.config.is_signed:
            pixels = 2 * pixels - 1
        return self.quant_conv(self.encoder(pixels.astype(self.dtype)))

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codebook rows (B, h, w, D) and tokens (B, L) int32 of pixels (B, H, W, 3) float."""
        indices = self.quantize(self.encode_continuous(pixels))
        return self.quantize.lookup(indices), indices.reshape(len(pixels), -1)

    def decode(self, quant_states: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) float32, not clipped, of codebook rows (B, h, w, D); 0 is black and 1 is white."""
        pixels = self.decoder(self.post_quant_conv(quant_states.astype(self.dtype))).astype(jnp.float32)
        return (pixels + 1) / 2 if self.config.is_signed else pixels

    def decode_code(self, tokens: jax.Array) -> jax.Array:
        """Decode tokens.

        Args:
            tokens: (B, L) int with L a square, or grids of them (B, h, w). A token outside the codebook gives NaN in
                its image; callers check on the host.

        Returns:
            Pixels (B, H, W, 3) float32, not clipped; 0 is black and 1 is white.
        """
        return self.decode(self.quantize.lookup(token_grid(tokens)))

    @staticmethod
    def example_inputs(config: VQGANConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_images(config.image_size)]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The reconstruction of pixels (B, H, W, 3); touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(pixels)[0])
