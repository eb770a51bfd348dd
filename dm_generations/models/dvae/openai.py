"""OpenAI's discrete VAE: an image to a grid of tokens, 8 pixels a side each, and back.

Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, https://arxiv.org/abs/2102.12092, appendix A; layers as in
openai/DALL-E. Names are those of its modules, without the levels `blocks`, `res_path` and `output.conv` of which each
holds one thing.

B: batch   H, W: pixels   h, w: token grid   L: tokens, h * w, row-major   C: channels   V: codebook size
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dm_generations.errors import UserError
from dm_generations.models.base import (
    POSITIONS,
    VOCABULARY,
    WIDTH,
    check_config,
    example_images,
    select_fields,
    token_grid,
)

GROUPS = 4  # of blocks; the resolution changes between them
LOGIT_LAPLACE_EPS = 0.1  # pixels are mapped from [0, 1] to [eps, 1 - eps]: its distribution is over the open interval

_BOUNDS = {
    "n_hid": WIDTH,
    "n_init": WIDTH,
    "n_blk_per_group": (1, 64),
    "vocab_size": VOCABULARY,
    "image_size": POSITIONS,
}


@dataclasses.dataclass(frozen=True)
class OpenAIVAEConfig:
    """Sizes, under the names of the attributes of OpenAI's `Encoder` and `Decoder`."""

    n_hid: int = 256  # channels at full resolution; doubled from group to group
    n_init: int = 128  # width of what a token becomes first
    n_blk_per_group: int = 2
    vocab_size: int = 8192  # V
    image_size: int = 256  # pixels a side

    def __post_init__(self) -> None:
        """Raise UserError for sizes that no network can have."""
        check_config("OpenAI VAE", self, _BOUNDS)
        if self.n_hid % 4 or self.image_size % 2 ** (GROUPS - 1):
            raise UserError(
                f"OpenAI VAE config: n_hid {self.n_hid} must be a multiple of 4, and image_size {self.image_size} of 8"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "OpenAIVAEConfig":
        """Return the config in a `config.json`; keys that it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        return cls(**select_fields(cls, values))

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.image_size // 2 ** (GROUPS - 1)

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.vocab_size


def _conv(features: int, size: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


class Block(nn.Module):
    """x + gain * four convolutions of relu(x), three of them a quarter as wide."""

    features: int
    kernel_sizes: tuple[int, int, int, int]
    gain: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, features)."""
        h = x
        for i, size in enumerate(self.kernel_sizes):
            features = self.features if i == 3 else self.features // 4
            h = _conv(features, size, self.dtype, f"conv_{i + 1}")(nn.relu(h))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "id_path")(x)
        return x + self.gain * h


class Group(nn.Module):
    """The blocks of one resolution."""

    config: OpenAIVAEConfig
    features: int
    kernel_sizes: tuple[int, int, int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, H, W, C) to (B, H, W, features)."""
        count = self.config.n_blk_per_group
        gain = 1 / (GROUPS * count) ** 2
        for i in range(count):
            x = Block(self.features, self.kernel_sizes, gain, self.dtype, name=f"block_{i + 1}")(x)
        return x


class Encoder(nn.Module):
    """Pixels to the logits of tokens."""

    config: OpenAIVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, 3) to logits (B, h, w, V) float32."""
        config = self.config
        x = _conv(config.n_hid, 7, self.dtype, "input")(x)
        for i in range(GROUPS):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = Group(config, config.n_hid * 2**i, (3, 3, 3, 1), self.dtype, name=f"group_{i + 1}")(x)
        return _conv(config.vocab_size, 1, jnp.float32, "output")(nn.relu(x).astype(jnp.float32))


class OneHotConv(nn.Module):
    """A 1x1 convolution of one-hot vectors: a row of its kernel, plus its bias."""

    config: OpenAIVAEConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map (B, h, w) int to (B, h, w, n_init) float32; NaN outside the codebook."""
        config = self.config
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, config.vocab_size, config.n_init))
        bias = self.param("bias", nn.initializers.zeros, (config.n_init,))
        return jnp.take(kernel[0, 0], tokens, axis=0, mode="fill") + bias.reshape(1, 1, 1, -1)


class Decoder(nn.Module):
    """What tokens stand for to pixels."""

    config: OpenAIVAEConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        self.input = OneHotConv(config)
        for i in range(GROUPS):
            features = config.n_hid * 2 ** (GROUPS - 1 - i)
            setattr(self, f"group_{i + 1}", Group(config, features, (1, 3, 3, 3), self.dtype))
        self.output = nn.Conv(6, (1, 1), dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, h, w, n_init) to (B, H, W, 6): logits of the means, then the log scales."""
        x = x.astype(self.dtype)
        for i in range(GROUPS):
            if i:
                batch, height, width, channels = x.shape
                x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
                x = x.reshape(batch, 2 * height, 2 * width, channels)  # nearest neighbour
            x = getattr(self, f"group_{i + 1}")(x)
        return self.output(nn.relu(x))


class OpenAIVAE(nn.Module):
    """Encoder and decoder. Parameters are float32; `dtype` is what the network computes in."""

    ENCODER_PARTS: ClassVar[tuple[str, ...]] = ("encoder",)

    config: OpenAIVAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode pixels (B, H, W, 3) in [0, 1].

        Returns:
            What the decoder makes of the tokens first (B, h, w, n_init), and the tokens (B, L) int32: the indices of
            the largest logits, the first on ties.
        """
        pixels = (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS
        indices = jnp.argmax(self.encoder(pixels.astype(self.dtype)), axis=-1).astype(jnp.int32)
        return self.decoder.input(indices), indices.reshape(len(pixels), -1)

    def decode(self, quant_states: jax.Array) -> jax.Array:
        """Pixels (B, H, W, 3) float32, not clipped, of what `encode` returns (B, h, w, n_init); 0 is black, 1 is white.

        The image is the mean of the logit-Laplace distribution's argument: sigmoid of the first three channels.
        """
        means = jax.nn.sigmoid(self.decoder(quant_states)[..., :3].astype(jnp.float32))
        return (means - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)

    def decode_code(self, tokens: jax.Array) -> jax.Array:
        """Decode tokens.

        Args:
            tokens: (B, L) int with L a square, or grids of them (B, h, w). A token outside the codebook gives NaN in
                its image; callers check on the host.

        Returns:
            Pixels (B, H, W, 3) float32, not clipped; 0 is black and 1 is white.
        """
        return self.decode(self.decoder.input(token_grid(tokens)))

    @staticmethod
    def example_inputs(config: OpenAIVAEConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_images(config.image_size)]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The reconstruction of pixels (B, H, W, 3); touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(pixels)[0])
