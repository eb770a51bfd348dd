"""DALLE-pytorch's own discrete VAE: an image to a grid of tokens by stride-2 convolutions, and back.

Facts from lucidrains/DALLE-pytorch (`DiscreteVAE`). Module names count the layers as its `Sequential`s do, so that
`encoder.0.0.weight` is `encoder/0_0/kernel` and `decoder.1.net.2.weight` is `decoder/1/net_2/kernel`.

B: batch   H, W: pixels   h, w: token grid   L: tokens, h * w, row-major   C: channels   D: codebook width
V: codebook size
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.errors import UserError, short_repr
from dm_generations.models.base import (
    MAX_LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    check_config,
    example_images,
    select_fields,
    token_grid,
)

_BOUNDS = {
    "image_size": POSITIONS,
    "num_tokens": VOCABULARY,
    "codebook_dim": WIDTH,
    "num_layers": (1, 16),
    "num_resnet_blocks": (0, MAX_LAYERS),
    "hidden_dim": WIDTH,
}


@dataclasses.dataclass(frozen=True)
class DiscreteVAEConfig:
    """Sizes, under the names of the `vae_params` in a `dalle.pt` and with the defaults of its class."""

    image_size: int = 256  # pixels a side
    num_tokens: int = 512  # V
    codebook_dim: int = 512  # D
    num_layers: int = 3  # each halves the resolution
    num_resnet_blocks: int = 0
    hidden_dim: int = 64
    # Mean and standard deviation of each channel; None: pixels are not normalised.
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = ((0.5,) * 3, (0.5,) * 3)

    def __post_init__(self) -> None:
        """Raise UserError for sizes that no network can have."""
        check_config("discrete VAE", self, _BOUNDS)
        if self.image_size % 2**self.num_layers:
            raise UserError(
                f"discrete VAE config: image_size {self.image_size} cannot be halved num_layers {self.num_layers} times"
            )
        if self.normalization is not None:
            mean, deviation = self.normalization
            if len(mean) != 3 or len(deviation) != 3 or 0 in deviation:
                raise UserError(_describe_normalization(self.normalization))

    @classmethod
    def from_dict(cls, values: dict) -> "DiscreteVAEConfig":
        """Return the config in a `vae_params`; keys that do not change the network are ignored.

        Raises:
            UserError: A value is bad, or images are not RGB.
        """
        if values.get("channels", 3) != 3:
            raise UserError(f"discrete VAE config: channels must be 3, for RGB, not {short_repr(values['channels'])}")
        known = select_fields(cls, values)
        if known.get("normalization") is not None:
            try:
                # Later versions list a fourth channel, for transparency.
                mean, deviation = (tuple(float(n) for n in part)[:3] for part in known["normalization"])
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(_describe_normalization(known["normalization"])) from error
            known["normalization"] = (mean, deviation)
        return cls(**known)

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.image_size // 2**self.num_layers

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.num_tokens


def _describe_normalization(value: Any) -> str:
    return f"discrete VAE config: normalization must be 3 means and 3 deviations, not {short_repr(value)}"


def _conv(features: int, size: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


class UpConv(nn.Module):
    """A transposed convolution that doubles the resolution; `nn.ConvTranspose` cannot be converted to ONNX."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, C) to (B, 2 h, 2 w, features)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 4, self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Padding is of the spread-out input; torch's padding 1 crops the output.
        layout = ("NHWC", "HWIO", "NHWC")
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        x = jax.lax.conv_transpose(x, kernel, (2, 2), ((2, 2), (2, 2)), dimension_numbers=layout, transpose_kernel=True)
        return x + bias.astype(self.dtype)


class ResBlock(nn.Module):
    """Three convolutions with a shortcut around them."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, C) to the same shape."""
        features = x.shape[-1]
        h = nn.relu(_conv(features, 3, self.dtype, "net_0")(x))
        h = nn.relu(_conv(features, 3, self.dtype, "net_2")(h))
        return x + _conv(features, 1, self.dtype, "net_4")(h)


class Encoder(nn.Module):
    """Pixels to the logits of tokens."""

    config: DiscreteVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) to logits (B, h, w, V)."""
        config, number = self.config, 0
        for _ in range(config.num_layers):
            down = nn.Conv(config.hidden_dim, (4, 4), (2, 2), padding=1, dtype=self.dtype, name=f"{number}_0")
            x, number = nn.relu(down(x)), number + 1
        for _ in range(config.num_resnet_blocks):
            x, number = ResBlock(self.dtype, name=str(number))(x), number + 1
        return _conv(config.num_tokens, 1, self.dtype, str(number))(x)


class Decoder(nn.Module):
    """What tokens stand for to pixels."""

    config: DiscreteVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, D) to (B, H, W, 3)."""
        config, number = self.config, 0
        if config.num_resnet_blocks:
            x, number = _conv(config.hidden_dim, 1, self.dtype, "0")(x), 1
        for _ in range(config.num_resnet_blocks):
            x, number = ResBlock(self.dtype, name=str(number))(x), number + 1
        for _ in range(config.num_layers):
            up = UpConv(config.hidden_dim, self.dtype, name=f"{number}_0")
            x, number = nn.relu(up(x)), number + 1
        return _conv(3, 1, self.dtype, str(number))(x)


class DiscreteVAE(nn.Module):
    """Encoder, codebook and decoder. Parameters are float32; `dtype` is what the network computes in."""

    ENCODER_PARTS: ClassVar[tuple[str, ...]] = ("encoder",)

    config: DiscreteVAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.codebook = nn.Embed(config.num_tokens, config.codebook_dim, dtype=self.dtype, param_dtype=jnp.float32)
        self.decoder = Decoder(config, self.dtype)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codebook rows (B, h, w, D) and tokens (B, L) int32 of pixels (B, H, W, 3) in [0, 1].

        A token is the index of the largest logit, the first on ties.
        """
        if self.config.normalization is not None:
            mean, deviation = (jnp.asarray(part, jnp.float32) for part in self.config.normalization)
            pixels = (pixels - mean.reshape(1, 1, 1, 3)) / deviation.reshape(1, 1, 1, 3)
        logits = self.encoder(pixels.astype(self.dtype)).astype(jnp.float32)
        indices = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return self.codebook(indices), indices.reshape(len(pixels), -1)

    def decode(self, quant_states: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) float32, not clipped, of codebook rows (B, h, w, D); 0 is black and 1 is white.

        The network was trained to reproduce its normalised input. The original's `decode` returns that as it is, and
        its images lose what is darker than grey; here the normalisation is undone.
        """
        pixels = self.decoder(quant_states).astype(jnp.float32)
        if self.config.normalization is None:
            return pixels
        mean, deviation = (jnp.asarray(part, jnp.float32) for part in self.config.normalization)
        return pixels * deviation.reshape(1, 1, 1, 3) + mean.reshape(1, 1, 1, 3)

    def decode_code(self, tokens: jax.Array) -> jax.Array:
        """Decode tokens.

        Args:
            tokens: (B, L) int with L a square, or grids of them (B, h, w). A token outside the codebook gives NaN in
                its image; callers check on the host.

        Returns:
            Pixels (B, H, W, 3) float32, not clipped; 0 is black and 1 is white.
        """
        return self.decode(self.codebook(token_grid(tokens)))

    @staticmethod
    def example_inputs(config: DiscreteVAEConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_images(config.image_size)]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The reconstruction of pixels (B, H, W, 3); touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(pixels)[0])
