"""T5's encoder: ids of a caption to features.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020; version 1.1,
with a gated feed-forward block. Parameter names are ours; `checkpoint` has those of transformers.

B: batch   T: tokens   d: width   H: heads   D: channels of a head
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dm_generations.models.base import LAYERS, VOCABULARY, WIDTH, check_config, select_fields
from dm_generations.models.layers import MASKED, RMSNorm

_BOUNDS = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH,
    "d_ff": WIDTH,
    "num_layers": LAYERS,
    "num_heads": WIDTH,
    "relative_attention_num_buckets": (4, 1 << 16),
    "relative_attention_max_distance": (2, 1 << 20),
    "layer_norm_epsilon": (0.0, 1.0),
}
_CHOICES = {"feed_forward_proj": ("gated-gelu",)}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes under the names of transformers' config.json, with the values of flan-t5-xl."""

    vocab_size: int = 32128
    d_model: int = 2048
    d_kv: int = 64
    d_ff: int = 5120
    num_layers: int = 24
    num_heads: int = 32
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        check_config("T5", self, _BOUNDS, _CHOICES)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "T5Config":
        """Return the config of these values; keys it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        return cls(**select_fields(cls, values))


class _Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + gated feed-forward of norm(x). No biases; attention is not scaled."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Map x (B, T, d) to the same shape; bias (B, H, T, T) float32 is added to the attention's logits."""
        config, width = self.config, self.config.num_heads * self.config.d_kv

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        normed = RMSNorm(config.layer_norm_epsilon, self.dtype, name="attn_norm")(x)
        q, k, v = (dense(width, n)(normed).reshape(*x.shape[:2], config.num_heads, -1) for n in ("q", "k", "v"))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(logits).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], width)
        x = x + dense(config.d_model, "o")(mixed)
        normed = RMSNorm(config.layer_norm_epsilon, self.dtype, name="mlp_norm")(x)
        hidden = nn.gelu(dense(config.d_ff, "wi_0")(normed), approximate=True) * dense(config.d_ff, "wi_1")(normed)
        return x + dense(config.d_model, "wo")(hidden)


class T5Encoder(nn.Module):
    """The network."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Features (B, T, d) of ids (B, T) int32, where attention_mask (B, T) is 1 for text and 0 for padding."""
        config = self.config
        x = nn.Embed(config.vocab_size, config.d_model, name="shared")(input_ids).astype(self.dtype)
        table = nn.Embed(config.relative_attention_num_buckets, config.num_heads, name="relative_attention_bias")
        bias = table(self._buckets(input_ids.shape[1])).astype(jnp.float32).transpose(2, 0, 1)[None]
        bias = jnp.where(attention_mask[:, None, None] > 0, bias, MASKED)
        for number in range(config.num_layers):
            x = _Block(config, self.dtype, name=f"block_{number}")(x, bias)
        return RMSNorm(config.layer_norm_epsilon, self.dtype, name="norm")(x)

    def _buckets(self, length: int) -> np.ndarray:
        """(T, T) int32, for each query and key the row of the table: by direction and distance, the far ones shared."""
        half = self.config.relative_attention_num_buckets // 2
        exact = half // 2
        offset = np.arange(length)[None, :] - np.arange(length)[:, None]
        distance = np.abs(offset)
        ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)  # in float32 and in this order, as there
        largest = np.float32(math.log(self.config.relative_attention_max_distance / exact))
        far = exact + (np.log(ratio) / largest * np.float32(half - exact)).astype(np.int32)
        bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
        return (bucket + half * (offset > 0)).astype(np.int32)
