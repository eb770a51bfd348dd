"""Janus and Janus-Pro: a prompt to the logits of image tokens, a LLaMA that also reads and writes these.

Chen et al., "Janus-Pro: Unified Multimodal Understanding and Generation with Data and Model Scaling", 2025,
https://arxiv.org/abs/2501.17811. Only what makes images of text. An image token is read through a table and an MLP,
and written by a head of its own. The first one is sampled at the prompt's last position.

B: batch   T: positions of the prompt, which is at their end   L: image tokens, row-major over the grid   d: width
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dm_generations.errors import UserError
from dm_generations.models.base import LAYERS, POSITIONS, VOCABULARY, WIDTH, check_config, example_ids, select_fields
from dm_generations.models.layers import (
    PrefixCache,
    Rotary,
    Transformer,
    TransformerSizes,
    extend,
    prefix_visible,
    step_visible,
)
from dm_generations.sampling.params import SamplingParams

_BOUNDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "num_key_value_heads": WIDTH,
    "head_dim": WIDTH,
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "image_vocab_size": VOCABULARY,
    "image_embed_dim": WIDTH,
    "aligner_dim": WIDTH,
    "head_hidden": WIDTH,
    "block_size": POSITIONS,
    "max_text_length": (16, 1 << 14),
}


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """Sizes of the language model under the names of transformers, and those around it; the values are LLaMA's."""

    decodes_own_grid: ClassVar[bool] = True

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: the width divided by the heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    image_vocab_size: int = 16384
    image_embed_dim: int = 8
    aligner_dim: int = 4096  # inside the MLP that an image token is read through
    head_hidden: int = 4096  # inside the head that writes one
    block_size: int = 576  # image tokens
    max_text_length: int = 192  # tokens of a prompt with what is put around it, which the original does not limit

    def __post_init__(self) -> None:
        check_config("Janus", self, _BOUNDS)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"Janus config: hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
            )
        if self.sizes.heads % self.sizes.kv_heads or self.sizes.head_width % 2:
            raise UserError(
                f"Janus config: {self.sizes.heads} heads of {self.sizes.head_width} cannot share "
                f"{self.sizes.kv_heads} heads of keys"
            )
        if math.isqrt(self.block_size) ** 2 != self.block_size:
            raise UserError(f"Janus config: {self.block_size} image tokens do not fill a square grid")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "JanusConfig":
        """Return the config of these values; keys it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        return cls(**select_fields(cls, values))

    @property
    def sizes(self) -> TransformerSizes:
        """Sizes of the language model."""
        heads = self.num_attention_heads
        return TransformerSizes(
            *(self.hidden_size, self.num_hidden_layers, heads, self.num_key_value_heads or heads),
            *(self.head_dim or self.hidden_size // heads, self.intermediate_size, self.rms_norm_eps),
            is_interleaved=False,
            is_fused=False,
        )

    @property
    def image_length(self) -> int:
        """Tokens an image."""
        return self.block_size

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.image_vocab_size

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that a prompt's ids index."""
        return self.vocab_size

    @property
    def start_token(self) -> int:
        """Not used: the prompt's last position takes its place."""
        return 0

    @property
    def sampling_order(self) -> str:
        """See `sampling.filter_logits`."""
        return "temperature_first"

    @property
    def default_params(self) -> SamplingParams:
        """Settings of the original's program; that of transformers also has a top_k of 50, its library's default."""
        return SamplingParams(cond_scale=5.0)


class Janus(nn.Module):
    """The network. Activations are in `dtype`; norms, rotary positions, attention weights and logits in float32.

    Generation: `encode_prompt`, `init_cache`, then `decode_step` for step 0, 1, ..., L - 1, each by `model.apply(...,
    method=...)`. Ids must be in range; nothing checks that here.
    """

    config: JanusConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        self.text = nn.Embed(config.vocab_size, config.hidden_size)
        self.tokens = nn.Embed(config.image_vocab_size, config.image_embed_dim)
        self.aligner_in = nn.Dense(config.aligner_dim, dtype=self.dtype)
        self.aligner_out = nn.Dense(config.hidden_size, dtype=self.dtype)
        self.transformer = Transformer(config.sizes, self.dtype)
        self.head_in = nn.Dense(config.head_hidden, dtype=self.dtype)
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        self.head_out = nn.Dense(config.image_vocab_size, dtype=self.dtype, dot_general=product)

    @staticmethod
    def example_inputs(config: JanusConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        lengths = (config.max_text_length, config.max_text_length, config.image_length)
        return [example_ids(length) for length in lengths]

    @staticmethod
    def prepare_params(config: JanusConfig, params: dict, platform: str) -> tuple[JanusConfig, dict]:
        """Config and parameters for generation: those of the checkpoint, as they are."""
        return config, params

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array) -> jax.Array:
        """Teacher-forced logits (B, L, V) float32 of tokens (B, L); other arguments are those of `encode_prompt`."""
        x = jnp.concatenate([self._embed_text(input_ids), self._embed_tokens(tokens[:, :-1])], axis=1)
        x, _ = self.transformer(x, self._rotary(jnp.arange(x.shape[1])), prefix_visible(attention_mask, x.shape[1]))
        return self._head(x[:, input_ids.shape[1] - 1 :])

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> PrefixCache:
        """What generation reads of prompts. Axis 0 of every array is B.

        Args:
            input_ids: (B, T) int32, padding first.
            attention_mask: (B, T) int32, 0 for padding, then 1.
        """
        x, count = self._embed_text(input_ids), input_ids.shape[1] - 1
        _, layers = self.transformer(x[:, :-1], self._rotary(jnp.arange(count)), prefix_visible(attention_mask, count))
        return PrefixCache(layers, attention_mask > 0, x[:, -1:])

    def init_cache(self, text: PrefixCache) -> PrefixCache:
        """Cache for B generations, each of its row of `text`, with room for T + L - 1 positions."""
        return extend(text, self.config.image_length)

    def decode_step(self, cache: PrefixCache, token: jax.Array, step: jax.Array) -> tuple[jax.Array, PrefixCache]:
        """Logits (B, V) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: From `init_cache` or the step before.
            token: (B,) int32, the token before it; not read at step 0.
            step: int32 scalar, may be traced.
        """
        position = cache.visible.shape[1] - 1 + jnp.asarray(step, jnp.int32)
        x = jnp.where(step == 0, cache.last, self._embed_tokens(token[:, None]))
        visible = step_visible(cache, position)
        x, layers = self.transformer.decode_step(x, self._rotary(position[None]), cache.layers, position, visible)
        return self._head(x)[:, 0], cache._replace(layers=layers)

    def _embed_text(self, input_ids: jax.Array) -> jax.Array:
        return self.text(input_ids).astype(self.dtype)

    def _embed_tokens(self, tokens: jax.Array) -> jax.Array:
        x = self.aligner_in(self.tokens(tokens).astype(self.dtype))
        return self.aligner_out(nn.gelu(x, approximate=False))

    def _head(self, x: jax.Array) -> jax.Array:
        return self.head_out(nn.gelu(self.head_in(x), approximate=False))

    def _rotary(self, positions: jax.Array) -> Rotary:
        """Factors of positions (Q,)."""
        width = self.config.sizes.head_width
        frequency = self.config.rope_theta ** -(np.arange(0, width, 2) / width)
        angles = positions[:, None].astype(jnp.float32) * frequency.astype(np.float32)
        return Rotary(jnp.cos(angles), jnp.sin(angles))
