"""What decoder-only transformers of the LLaMA kind share: RMSNorm, rotary positions, SwiGLU, attention with a cache.

B: batch   S: positions of a cache   Q: positions computed at once   d: width   H: heads   K: heads of keys and values
D: channels of a head, even
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dm_generations.models.base import layer_class

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class TransformerSizes:
    """Sizes and options of a stack of blocks."""

    width: int
    layers: int
    heads: int
    kv_heads: int  # grouped-query attention: each serves heads / kv_heads heads
    head_width: int
    hidden: int  # width inside the feed-forward block
    epsilon: float  # of the norms
    is_interleaved: bool  # rotary positions turn channels 2i and 2i + 1; otherwise i and i + D/2
    is_fused: bool  # queries, keys and values come of one matrix, in this order
    dropout: float = 0.0  # in training, of what each half of a block adds


class LayerCache(NamedTuple):
    """Keys and values of one block; positions that are not computed yet are zero."""

    keys: jax.Array  # (B, K, S, D) compute dtype
    values: jax.Array  # (B, K, S, D)


class Rotary(NamedTuple):
    """By how much positions turn, as factors."""

    cos: jax.Array  # (Q, D / 2) float32
    sin: jax.Array


class RMSNorm(nn.Module):
    """x divided by its root mean square over channels, computed in float32, times a factor for each channel."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (..., d) to the same shape."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


def rotate(x: jax.Array, rotary: Rotary, is_interleaved: bool) -> jax.Array:
    """Turn pairs of channels of x (B, Q, H, D), in float32; see `TransformerSizes.is_interleaved`."""
    wide = x.astype(jnp.float32)
    cos, sin = (factor[None, :, None, :] for factor in rotary)
    if is_interleaved:
        pairs = wide.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    joined = jnp.stack(turned, axis=-1).reshape(x.shape) if is_interleaved else jnp.concatenate(turned, axis=-1)
    return joined.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without biases."""

    sizes: TransformerSizes
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        sizes = self.sizes
        q_width, kv_width = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
        if sizes.is_fused:
            self.qkv = nn.Dense(q_width + 2 * kv_width, use_bias=False, dtype=self.dtype)
        else:
            self.q = nn.Dense(q_width, use_bias=False, dtype=self.dtype)
            self.k, self.v = (nn.Dense(kv_width, use_bias=False, dtype=self.dtype) for _ in range(2))
        self.out = nn.Dense(sizes.width, use_bias=False, dtype=self.dtype)

    def project(self, x: jax.Array, rotary: Rotary) -> tuple[jax.Array, LayerCache]:
        """Queries (B, Q, H, D), and keys and values (B, K, Q, D) each, of x (B, Q, d)."""
        sizes = self.sizes
        if sizes.is_fused:
            q_width, kv_width = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
            q, k, v = jnp.split(self.qkv(x), (q_width, q_width + kv_width), axis=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.reshape(*x.shape[:2], sizes.heads, sizes.head_width)
        k, v = (part.reshape(*x.shape[:2], sizes.kv_heads, sizes.head_width) for part in (k, v))
        q, k = (rotate(part, rotary, sizes.is_interleaved) for part in (q, k))
        return q, LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def attend(self, queries: jax.Array, layer: LayerCache, visible: jax.Array) -> jax.Array:
        """Attend from queries (B, Q, H, D) to a cache; visible is bool (B, Q, S), or broadcasts to it."""
        batch, count, heads, channels = queries.shape
        groups = self.sizes.kv_heads
        grouped = queries.reshape(batch, count, groups, heads // groups, channels)
        logits = jnp.einsum("bqkgd,bksd->bkgqs", grouped, layer.keys, preferred_element_type=jnp.float32)
        logits = jnp.where(visible[:, None, None], logits / math.sqrt(channels), MASKED)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        mixed = jnp.einsum("bkgqs,bksd->bqkgd", weights, layer.values)
        return self.out(mixed.reshape(batch, count, heads * channels))


class SwiGLU(nn.Module):
    """A feed-forward block: down(silu(gate(x)) * up(x)), without biases."""

    sizes: TransformerSizes
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (..., d) to the same shape."""
        gate, up = (nn.Dense(self.sizes.hidden, use_bias=False, dtype=self.dtype, name=n)(x) for n in ("gate", "up"))
        return nn.Dense(self.sizes.width, use_bias=False, dtype=self.dtype, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    sizes: TransformerSizes
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        self.attn_norm, self.mlp_norm = (RMSNorm(self.sizes.epsilon, self.dtype) for _ in range(2))
        self.attn = Attention(self.sizes, self.dtype)
        self.mlp = SwiGLU(self.sizes, self.dtype)
        self.dropout = nn.Dropout(self.sizes.dropout)

    def __call__(
        self, x: jax.Array, rotary: Rotary, visible: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, LayerCache]:
        """The first Q positions: x (B, Q, d) -> (B, Q, d), and their keys and values."""
        queries, layer = self.attn.project(self.attn_norm(x), rotary)
        x = x + self.dropout(self.attn.attend(queries, layer, visible), deterministic)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic), layer

    def decode_step(
        self, x: jax.Array, rotary: Rotary, layer: LayerCache, position: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """One position: x (B, 1, d) -> (B, 1, d), and the cache with its keys and values."""
        queries, new = self.attn.project(self.attn_norm(x), rotary)
        layer = LayerCache(
            *(
                lax.dynamic_update_slice_in_dim(old, part, position, axis=2)
                for old, part in zip(layer, new, strict=True)
            )
        )
        x = x + self.attn.attend(queries, layer, visible)
        return x + self.mlp(self.mlp_norm(x)), layer


class Transformer(nn.Module):
    """A stack of blocks with a norm behind it."""

    sizes: TransformerSizes
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        block = layer_class(Block, 3)
        self.layers = [block(self.sizes, self.dtype) for _ in range(self.sizes.layers)]
        self.norm = RMSNorm(self.sizes.epsilon, self.dtype)

    def __call__(
        self, x: jax.Array, rotary: Rotary, visible: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """The first Q positions: x (B, Q, d) -> (B, Q, d), and the caches of the layers.

        Args:
            x: (B, Q, d).
            rotary: Of the Q positions.
            visible: bool (B, Q, Q), or broadcasts to it: which positions each one attends to.
            deterministic: Whether dropouts are off.
        """
        caches = []
        for layer in self.layers:
            x, cache = layer(x, rotary, visible, deterministic)
            caches.append(cache)
        return self.norm(x), tuple(caches)

    def decode_step(
        self, x: jax.Array, rotary: Rotary, caches: tuple[LayerCache, ...], position: jax.Array, visible: jax.Array
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """One position: x (B, 1, d) -> (B, 1, d), and the caches (B, K, S, D) with it.

        Args:
            x: (B, 1, d).
            rotary: Of this position.
            caches: Of the layers.
            position: int32 scalar.
            visible: bool (B, 1, S).
        """
        new = []
        for layer, old in zip(self.layers, caches, strict=True):
            x, cache = layer.decode_step(x, rotary, old, position, visible)
            new.append(cache)
        return self.norm(x), tuple(new)


class PrefixCache(NamedTuple):
    """State of a generation that follows a prompt; before it begins, of all but the prompt's last position."""

    layers: tuple[LayerCache, ...]
    visible: jax.Array  # (B, T) bool, which positions of the prompt are attended to
    last: jax.Array  # (B, 1, d), what the prompt's last position reads, at step 0


def prefix_visible(mask: jax.Array, count: int) -> jax.Array:
    """Return bool (B, Q, Q): which positions each of the first Q attends to, itself always.

    Args:
        mask: (B, T) bool or 0 and 1, of the prompt's positions.
        count: Q.
    """
    length = mask.shape[1]
    mask = jnp.pad(mask.astype(bool), ((0, 0), (0, max(0, count - length))), constant_values=True)[:, :count]
    return jnp.tri(count, dtype=bool)[None] & mask[:, None] | jnp.eye(count, dtype=bool)[None]


def extend(cache: PrefixCache, count: int) -> PrefixCache:
    """Return a cache with room for `count` positions more."""
    room = ((0, 0), (0, 0), (0, count), (0, 0))
    return cache._replace(layers=jax.tree.map(lambda array: jnp.pad(array, room), cache.layers))


def step_visible(cache: PrefixCache, position: jax.Array) -> jax.Array:
    """Return bool (B, 1, S): which positions `position`, the last of the prompt or one after it, attends to."""
    size = cache.layers[0].keys.shape[2]
    visible = jnp.pad(cache.visible, ((0, 0), (0, size - cache.visible.shape[1])), constant_values=True)
    return (visible & (jnp.arange(size) <= position))[:, None]
