"""Layers of DalleBart, with the parameter names that dalle-mini's layers have.

B: batch   Q, K: query and key positions   T: text tokens   L: image tokens   d: model width
H: heads   D: head width, d / H

Submodules kept in a list attribute `X` are named X_0, X_1, ...: the names that dalle-mini's layers got from
Flax's automatic numbering, in the order in which they are called.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dm_generations.models.dalle_mini.config import NORM_PLACEMENTS, DalleBartConfig

NORM_EPSILON = 1e-5

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class LayerCache(NamedTuple):
    """What one decoder layer remembers of the image tokens so far."""

    keys: jax.Array  # (B, H, L, D) compute dtype; positions after the current step are zero
    values: jax.Array  # (B, H, L, D)


def norm(config: DalleBartConfig, dtype: Any, use_scale: bool = True) -> nn.Module:
    return NORMS[config.ln_type](epsilon=NORM_EPSILON, dtype=dtype, use_scale=use_scale)


def norm_before_dense(config: DalleBartConfig, dtype: Any) -> nn.Module:
    """A norm without scale, which the dense layer after it can absorb, unless the config forces one."""
    return norm(config, dtype, use_scale=config.force_ln_scale)


def _matrix_product(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """`lax.dot_general` of x (..., features) with a kernel, as one matrix product over all rows.

    On CPU, XLA computes the gradient of the kernel from two-dimensional operands in 0.6 of the time.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = lax.dot(rows, kernel, precision=precision, preferred_element_type=preferred_element_type)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(config: DalleBartConfig, dtype: Any, features: int, use_bias: bool | None = None, **options: Any):
    """A dense layer, with the initial standard deviation that the config asks for."""
    return nn.Dense(
        features,
        use_bias=config.use_bias if use_bias is None else use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.normal(config.init_std),
        dot_general=functools.partial(_matrix_product, **options),
    )


class FlaxBartAttention(nn.Module):
    """Multi-head attention, with keys and values projected apart so that they can be kept."""

    config: DalleBartConfig
    heads: int
    dtype: Any

    def setup(self):
        projection = functools.partial(dense, self.config, self.dtype, self.config.d_model)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (projection() for _ in range(4))
        if self.config.use_head_scale:
            self.head_scale = self.param("head_scale", nn.initializers.ones, (1, 1, self.heads, 1))
        # One mask for the whole batch and all heads, as in dalle-mini: random bits cost more than they gain.
        self.dropout = nn.Dropout(self.config.attention_dropout, broadcast_dims=(0, 1))

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)  # (B, H, K, D)

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x (B, K, d), each (B, H, K, D)."""
        return self._split_heads(self.k_proj(x)), self._split_heads(self.v_proj(x))

    def __call__(self, x, keys, values, bias, deterministic: bool):
        """X (B, Q, d), keys and values (B, H, K, D), bias broadcastable to (B, H, Q, K) -> (B, Q, d)."""
        queries = self._split_heads(self.q_proj(x))
        queries = queries * (1.0 / math.sqrt(queries.shape[-1]))
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias).astype(self.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        if self.config.use_head_scale:
            out = out * self.head_scale.astype(self.dtype).swapaxes(1, 2)
        return self.out_proj(out.swapaxes(1, 2).reshape(*x.shape))


class GLU(nn.Module):
    """Gated feed-forward block (arXiv 2002.05202) with its norms."""

    config: DalleBartConfig
    ffn_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x, deterministic: bool):
        config, dtype = self.config, self.dtype
        x = norm_before_dense(config, dtype)(x)
        gate = ACTIVATIONS[config.activation_function](dense(config, dtype, self.ffn_dim)(x))
        x = gate * dense(config, dtype, self.ffn_dim)(x)
        return _end_of_ffn(config, dtype, x, deterministic)


class FFN(nn.Module):
    """Plain feed-forward block with its norms."""

    config: DalleBartConfig
    ffn_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x, deterministic: bool):
        config, dtype = self.config, self.dtype
        x = norm_before_dense(config, dtype)(x)
        x = ACTIVATIONS[config.activation_function](dense(config, dtype, self.ffn_dim)(x))
        return _end_of_ffn(config, dtype, x, deterministic)


def _end_of_ffn(config: DalleBartConfig, dtype: Any, x: jax.Array, deterministic: bool) -> jax.Array:
    """From the hidden units (B, L, ffn_dim) to (B, L, d); creates the calling module's submodules."""
    placement = NORM_PLACEMENTS[config.ln_positions]
    if placement.inside_ffn:
        x = norm_before_dense(config, dtype)(x)
    x = nn.Dropout(config.activation_dropout)(x, deterministic=deterministic)
    x = dense(config, dtype, config.d_model)(x)
    if placement.after_ffn:
        x = norm(config, dtype)(x)
    return nn.Dropout(config.dropout)(x, deterministic=deterministic)


class _Layer(nn.Module):
    """What encoder and decoder layers share: norms around attention blocks, then a feed-forward block."""

    config: DalleBartConfig
    dtype: Any

    def _build(self, heads: int, attention_count: int, ffn_dim: int) -> None:
        """Create the submodules; called from `setup`."""
        config, dtype = self.config, self.dtype
        norms = []
        for _ in range(attention_count):
            norms.append(norm_before_dense(config, dtype))
            if NORM_PLACEMENTS[config.ln_positions].after_attention:
                norms.append(norm(config, dtype))
        setattr(self, NORMS[config.ln_type].__name__, norms)
        self.FlaxBartAttention = [FlaxBartAttention(config, heads, dtype) for _ in range(attention_count)]
        if config.use_glu:
            self.GLU = [GLU(config, ffn_dim, dtype)]
        else:
            self.FFN = [FFN(config, ffn_dim, dtype)]
        self.dropout = nn.Dropout(config.dropout)

    def _norms(self, block: int) -> tuple[nn.Module, nn.Module | None]:
        """The norms before and after attention block number `block`."""
        norms = getattr(self, NORMS[self.config.ln_type].__name__)
        if not NORM_PLACEMENTS[self.config.ln_positions].after_attention:
            return norms[block], None
        return norms[2 * block], norms[2 * block + 1]

    def _attention_block(self, block: int, x, keys_values, bias, deterministic: bool):
        """X + norm(attention(norm(x))); `keys_values` maps the normed x to what is attended to."""
        norm_before, norm_after = self._norms(block)
        hidden = norm_before(x)
        keys, values = keys_values(hidden)
        hidden = self.FlaxBartAttention[block](hidden, keys, values, bias, deterministic)
        if norm_after is not None:
            hidden = norm_after(hidden)
        return x + self.dropout(hidden, deterministic=deterministic)

    def _ffn_block(self, x, deterministic: bool):
        block = self.GLU[0] if self.config.use_glu else self.FFN[0]
        return x + block(x, deterministic)


class FlaxBartEncoderLayer(_Layer):
    """Self-attention over the prompt, then feed-forward."""

    def setup(self):
        self._build(self.config.encoder_attention_heads, 1, self.config.encoder_ffn_dim)

    def __call__(self, x, bias, deterministic: bool):
        """X (B, T, d), bias (B, 1, 1, T) -> (B, T, d), None; the pair is what a scan over layers needs."""
        x = self._attention_block(0, x, self.FlaxBartAttention[0].keys_values, bias, deterministic)
        return self._ffn_block(x, deterministic), None


class FlaxBartDecoderLayer(_Layer):
    """Causal self-attention over image tokens, cross-attention to the prompt, then feed-forward."""

    def setup(self):
        self._build(self.config.decoder_attention_heads, 2, self.config.decoder_ffn_dim)

    def __call__(self, x, encoder_state, bias, cross_bias, deterministic: bool):
        """All positions at once: x (B, L, d), encoder_state (B, T, d) -> (B, L, d), None."""
        cross = self.FlaxBartAttention[1].keys_values(encoder_state)
        x = self._attention_block(0, x, self.FlaxBartAttention[0].keys_values, bias, deterministic)
        x = self._attention_block(1, x, lambda _: cross, cross_bias, deterministic)
        return self._ffn_block(x, deterministic), None

    def cross_keys_values(self, encoder_state):
        """Cross-attention keys and values of encoder_state (B, T, d), each (B, H, T, D)."""
        return self.FlaxBartAttention[1].keys_values(encoder_state)

    def decode_step(self, x, cache: LayerCache, cross: tuple[jax.Array, jax.Array], step, bias, cross_bias):
        """One position: x (B, 1, d) -> (B, 1, d) and the cache with its self-attention keys and values."""
        updated = []

        def keys_values(hidden):
            new = self.FlaxBartAttention[0].keys_values(hidden)
            stored = (lax.dynamic_update_slice_in_dim(old, x, step, axis=2) for old, x in zip(cache, new, strict=True))
            updated.extend(stored)
            return updated

        x = self._attention_block(0, x, keys_values, bias, True)
        x = self._attention_block(1, x, lambda _: cross, cross_bias, True)
        return self._ffn_block(x, True), LayerCache(*updated)
