"""DALLE-pytorch's own discrete VAE: an image to a grid of tokens by stride-2 convolutions, and back.

Facts from lucidrains/DALLE-pytorch (`DiscreteVAE`). Module names count the layers as its `Sequential`s do, so that
`encoder.0.0.weight` is `encoder/0_0/kernel` and `decoder.1.net.2.weight` is `decoder/1/net_2/kernel`.

B: batch   H, W: pixels   h, w: token grid   L: tokens, h * w, row-major   C: channels   D: codebook width
V: codebook size
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.errors import short_repr
from dm_generations.models.base import example_images, token_grid


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

    def __post_init__(self):
        """Raises ValueError for sizes that no network can have."""
        for field in dataclasses.fields(self):
            if field.type is int:
                value, least = getattr(self, field.name), int(field.name != "num_resnet_blocks")
                if type(value) is not int or not least <= value < 2**31:
                    raise ValueError(f"{field.name} must be a whole number from {least} on, not {short_repr(value)}")
        # Bounds on how long the network takes to build, far above any that exists.
        if self.num_layers > 16 or self.num_resnet_blocks > 256:
            raise ValueError(f"{self.num_layers} layers, {self.num_resnet_blocks} blocks: at most 16, 256 can be built")
        if self.image_size % 2**self.num_layers:
            raise ValueError(f"image_size {self.image_size} cannot be halved {self.num_layers} times")
        if self.normalization is not None:
            mean, deviation = self.normalization
            if len(mean) != 3 or len(deviation) != 3 or 0 in deviation:
                raise ValueError(
                    f"normalization must be 3 means and 3 deviations, not {short_repr(self.normalization)}"
                )

    @classmethod
    def from_dict(cls, values: dict) -> "DiscreteVAEConfig":
        """The config in a `vae_params`; keys that do not change the network are ignored.

        Raises:
            TypeError: for values of a wrong type.
            ValueError: for images that are not RGB, and for bad values.
        """
        if values.get("channels", 3) != 3:
            raise ValueError(f"images of {short_repr(values['channels'])} channels; only RGB is supported")
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        if kept.get("normalization") is not None:
            # Later versions list a fourth channel, for transparency.
            kept["normalization"] = tuple(tuple(float(n) for n in part)[:3] for part in kept["normalization"])
        return cls(**kept)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // 2**self.num_layers

    @property
    def codebook_size(self) -> int:
        return self.num_tokens


def _conv(features: int, size: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


class ResBlock(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, h, w, C) -> the same
        features = x.shape[-1]
        h = nn.relu(_conv(features, 3, self.dtype, "net_0")(x))
        h = nn.relu(_conv(features, 3, self.dtype, "net_2")(h))
        return x + _conv(features, 1, self.dtype, "net_4")(h)


class Encoder(nn.Module):
    config: DiscreteVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, H, W, 3) -> logits (B, h, w, V)
        config, number = self.config, 0
        for _ in range(config.num_layers):
            down = nn.Conv(config.hidden_dim, (4, 4), (2, 2), padding=1, dtype=self.dtype, name=f"{number}_0")
            x, number = nn.relu(down(x)), number + 1
        for _ in range(config.num_resnet_blocks):
            x, number = ResBlock(self.dtype, name=str(number))(x), number + 1
        return _conv(config.num_tokens, 1, self.dtype, str(number))(x)


class Decoder(nn.Module):
    config: DiscreteVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):  # (B, h, w, D) -> (B, H, W, 3)
        config, number = self.config, 0
        if config.num_resnet_blocks:
            x, number = _conv(config.hidden_dim, 1, self.dtype, "0")(x), 1
        for _ in range(config.num_resnet_blocks):
            x, number = ResBlock(self.dtype, name=str(number))(x), number + 1
        for _ in range(config.num_layers):
            up = nn.ConvTranspose(
                config.hidden_dim,
                (4, 4),
                (2, 2),
                padding=((2, 2), (2, 2)),  # of the spread-out input; torch's padding 1 crops the output
                transpose_kernel=True,
                dtype=self.dtype,
                name=f"{number}_0",
            )
            x, number = nn.relu(up(x)), number + 1
        return _conv(3, 1, self.dtype, str(number))(x)


class DiscreteVAE(nn.Module):
    """Encoder, codebook and decoder. Parameters are float32; `dtype` is what the network computes in."""

    ENCODER_PARTS: ClassVar[tuple[str, ...]] = ("encoder",)

    config: DiscreteVAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.codebook = nn.Embed(config.num_tokens, config.codebook_dim, dtype=self.dtype, param_dtype=jnp.float32)
        self.decoder = Decoder(config, self.dtype)

    def encode(self, pixels):
        """Codebook rows (B, h, w, D) and tokens (B, L) int32 of pixels (B, H, W, 3) in [0, 1].

        A token is the index of the largest logit, the first on ties.
        """
        if self.config.normalization is not None:
            mean, deviation = (jnp.asarray(part, jnp.float32) for part in self.config.normalization)
            pixels = (pixels - mean.reshape(1, 1, 1, 3)) / deviation.reshape(1, 1, 1, 3)
        logits = self.encoder(pixels.astype(self.dtype)).astype(jnp.float32)
        indices = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return self.codebook(indices), indices.reshape(len(pixels), -1)

    def decode(self, quant_states):
        """Pixels (B, H, W, 3) float32, not clipped, of codebook rows (B, h, w, D); 0 is black and 1 is white.

        The network was trained to reproduce its normalised input. The original's `decode` returns that as it is, and
        its images lose what is darker than grey; here the normalisation is undone.
        """
        pixels = self.decoder(quant_states).astype(jnp.float32)
        if self.config.normalization is None:
            return pixels
        mean, deviation = (jnp.asarray(part, jnp.float32) for part in self.config.normalization)
        return pixels * deviation.reshape(1, 1, 1, 3) + mean.reshape(1, 1, 1, 3)

    def decode_code(self, tokens):
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

    def __call__(self, pixels):
        """The reconstruction of pixels (B, H, W, 3); touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(pixels)[0])
