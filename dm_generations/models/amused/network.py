"""aMUSEd: a prompt and a grid of tokens, some of them masked, to the logits of all tokens (a U-ViT).

Patil et al., "aMUSEd: An Open MUSE Reproduction", 2024, https://arxiv.org/abs/2401.01808. Parameter names are those of
diffusers' `UVit2DModel`, dots as slashes and list indices with an underscore, and of `CLIPTextModelWithProjection`.

B: batch   T: text tokens   L: image tokens, row-major   h, w: rows and columns of the grid   C: channels
N: positions of a sequence   D: width   V: codebook size

Traps: both attentions of the convolutional stages read the text. There are no positions but those that the depthwise
convolutions see. The third norm of a layer subtracts the mean, the others do not, and no name or shape tells.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dm_generations.models.amused.config import MICRO_CONDITIONS, AmusedConfig
from dm_generations.models.base import example_ids, token_grid
from dm_generations.models.clip.network import TextTransformer

GRN_EPSILON = 1e-6


class Text(NamedTuple):
    """What generation reads of prompts."""

    states: jax.Array  # (B, T, D) compute dtype, of each text token
    pooled: jax.Array  # (B, cond_embed_dim)


class Cache(NamedTuple):
    """What every step reads; no step changes it."""

    states: jax.Array  # (B, T, D) compute dtype
    condition: jax.Array  # (B, D)


def _dense(features: int, dtype: Any, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name)


def _conv(features: int, dtype: Any, name: str | None = None) -> nn.Conv:
    return nn.Conv(features, (1, 1), use_bias=False, dtype=dtype, name=name)


def _norm(config: AmusedConfig, dtype: Any, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(config.layer_norm_eps, dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head attention, without biases."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Map x (B, N, D), which looks at context (B, N', D'), to (B, N, D)."""
        width = x.shape[-1]

        def project(name: str, source: jax.Array) -> jax.Array:
            return _dense(width, self.dtype, name)(source).reshape(*source.shape[:2], self.heads, -1)

        query, key, value = project("to_q", x), project("to_k", context), project("to_v", context)
        logits = jnp.einsum("bqkd,bskd->bkqs", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5).astype(self.dtype)
        mixed = jnp.einsum("bkqs,bskd->bqkd", weights, value).reshape(x.shape)
        return _dense(width, self.dtype, "to_out_0")(mixed)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by how strong it is in the whole image, compared with the others."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, h, w, C) to the same shape."""
        shape = (1, 1, 1, x.shape[-1])
        gamma, beta = (self.param(name, nn.initializers.zeros, shape) for name in ("gamma", "beta"))
        wide = x.astype(jnp.float32)
        strength = jnp.sqrt(jnp.square(wide).sum(axis=(1, 2), keepdims=True))
        relative = strength / (strength.mean(axis=-1, keepdims=True) + GRN_EPSILON)
        return (gamma * (wide * relative) + beta + wide).astype(x.dtype)


class ConvBlock(nn.Module):
    """A ConvNeXt block, scaled and shifted by the condition."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Map x (B, h, w, C), with condition (B, D), to the same shape."""
        width, dtype = x.shape[-1], self.dtype
        grouped: dict[str, Any] = {"padding": 1, "feature_group_count": width, "use_bias": False}
        y = nn.Conv(width, (3, 3), dtype=dtype, name="depthwise", **grouped)(x)
        y = _dense(4 * width, dtype, "channelwise_linear_1")(_norm(self.config, dtype, "norm")(y))
        y = GlobalResponseNorm(name="channelwise_norm")(nn.gelu(y, approximate=False))
        x = x + _dense(width, dtype, "channelwise_linear_2")(y)
        scale, shift = jnp.split(_dense(2 * width, dtype, "cond_embeds_mapper")(nn.silu(condition)), 2, axis=-1)
        return x * (1 + scale[:, None, None]) + shift[:, None, None]


class ConvAttention(nn.Module):
    """Two attentions to the text, one after the other."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """Map x (B, h, w, C), with text (B, T, D), to the same shape."""
        batch, height, width, channels = x.shape
        if text.shape[-1] != channels:
            text = _dense(channels, self.dtype, "kv_mapper")(nn.silu(text))
        x = x.reshape(batch, height * width, channels)
        for number in (1, 2):
            normed = _norm(self.config, self.dtype, f"norm{number}")(x)
            x = x + Attention(self.config.block_num_heads, self.dtype, name=f"attn{number}")(normed, text)
        return x.reshape(batch, height, width, channels)


class Stage(nn.Module):
    """The convolutional blocks before or after the middle; it halves the grid first, or doubles it last."""

    config: AmusedConfig
    is_last: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, condition: jax.Array) -> jax.Array:
        """Map x (B, h, w, C), with text (B, T, D) and condition (B, D), to (B, h', w', C)."""
        config = self.config
        if config.downsample and not self.is_last:
            x = Resample(config, False, self.dtype, name="downsample")(x)
        for i in range(config.num_res_blocks):
            x = ConvBlock(config, self.dtype, name=f"res_blocks_{i}")(x, condition)
            x = ConvAttention(config, self.dtype, name=f"attention_blocks_{i}")(x, text)
        return Resample(config, True, self.dtype, name="upsample")(x) if config.downsample and self.is_last else x


class TransposedKernel(nn.Module):
    """The weights of a 2x2 transposed convolution of stride 2."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, h, w, C) to (B, h, 2, w, 2, C)."""
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, width, width))
        return jnp.einsum("bhwc,yxoc->bhywxo", x, kernel.astype(x.dtype))


class Resample(nn.Module):
    """A norm, then a 2x2 convolution of stride 2 that halves the grid or doubles it."""

    config: AmusedConfig
    doubles: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, h, w, C) to (B, h / 2, w / 2, C) or (B, 2 h, 2 w, C)."""
        batch, height, width, channels = x.shape
        x = _norm(self.config, self.dtype, "norm")(x)
        if self.doubles:
            return TransposedKernel(name="conv")(x).reshape(batch, 2 * height, 2 * width, channels)
        options: dict[str, Any] = {"padding": "VALID", "use_bias": False, "dtype": self.dtype}
        return nn.Conv(channels, (2, 2), (2, 2), name="conv", **options)(x)


class AdaptiveNorm(nn.Module):
    """A norm whose result is scaled and shifted by the condition."""

    config: AmusedConfig
    subtracts_mean: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Map x (B, N, D), with condition (B, D), to the same shape."""
        norm: nn.LayerNorm | nn.RMSNorm
        if self.subtracts_mean:
            options: dict[str, Any] = {"dtype": self.dtype, "use_bias": False, "use_fast_variance": False}
            norm = nn.LayerNorm(self.config.layer_norm_eps, name="norm", **options)
        else:
            norm = _norm(self.config, self.dtype, "norm")
        scale, shift = jnp.split(_dense(2 * x.shape[-1], self.dtype, "linear")(nn.silu(condition)), 2, axis=-1)
        return norm(x) * (1 + scale[:, None]) + shift[:, None]


class GatedUnit(nn.Module):
    """A dense layer of which one half gates the other."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, N, D) to (B, N, features)."""
        value, gate = jnp.split(_dense(2 * self.features, self.dtype, "proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """A gated unit and a dense layer."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, N, D) to the same shape."""
        hidden = GatedUnit(self.config.intermediate_size, self.dtype, name="net_0")(x)
        return _dense(x.shape[-1], self.dtype, "net_2")(hidden)


class Layer(nn.Module):
    """A layer of the middle: attention to the image, to the text, and a gated feed-forward net."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, condition: jax.Array) -> jax.Array:
        """Map x (B, N, D), with text (B, T, D) and condition (B, D), to the same shape."""
        config, dtype = self.config, self.dtype
        normed = AdaptiveNorm(config, False, dtype, name="norm1")(x, condition)
        x = x + Attention(config.num_attention_heads, dtype, name="attn1")(normed, normed)
        normed = AdaptiveNorm(config, False, dtype, name="norm2")(x, condition)
        x = x + Attention(config.num_attention_heads, dtype, name="attn2")(normed, text)
        normed = AdaptiveNorm(config, True, dtype, name="norm3")(x, condition)
        return x + FeedForward(config, dtype, name="ff")(normed)


class ConvEmbedding(nn.Module):
    """Tokens to channels."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens (B, h, w) int32 to (B, h, w, C)."""
        config = self.config
        x = nn.Embed(config.vocab_size, config.in_channels, name="embeddings")(tokens).astype(self.dtype)
        x = _norm(config, self.dtype, "layer_norm")(x)
        return _conv(config.block_out_channels, self.dtype, "conv")(x)


class Condition(nn.Module):
    """The pooled text and the micro-conditions to one vector."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, C) to (B, D)."""
        x = nn.silu(_dense(self.config.hidden_size, self.dtype, "linear_1")(x))
        return _dense(self.config.hidden_size, self.dtype, "linear_2")(x)


class Head(nn.Module):
    """Channels to logits."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, h, w, C) to (B, h, w, V) float32."""
        x = _norm(self.config, self.dtype, "layer_norm")(_conv(self.config.in_channels, self.dtype, "conv1")(x))
        return _conv(self.config.codebook_size, self.dtype, "conv2")(x).astype(jnp.float32)


class Transformer(nn.Module):
    """The U-ViT: a stage of convolutions, a transformer, and another stage."""

    config: AmusedConfig
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        config, dtype = self.config, self.dtype
        self.encoder_proj = _dense(config.hidden_size, dtype)
        self.encoder_proj_layer_norm = _norm(config, dtype)
        self.embed = ConvEmbedding(config, dtype)
        self.cond_embed = Condition(config, dtype)
        self.down_block, self.up_block = Stage(config, False, dtype), Stage(config, True, dtype)
        self.project_to_hidden_norm, self.project_from_hidden_norm = _norm(config, dtype), _norm(config, dtype)
        self.project_to_hidden = _dense(config.hidden_size, dtype)
        self.project_from_hidden = _dense(config.block_out_channels, dtype)
        self.transformer_layers = [Layer(config, dtype) for _ in range(config.num_hidden_layers)]
        self.mlm_layer = Head(config, dtype)

    def project_text(self, states: jax.Array) -> jax.Array:
        """Map states of the text encoder (B, T, D') to (B, T, D)."""
        return self.encoder_proj_layer_norm(self.encoder_proj(states))

    def condition(self, pooled: jax.Array, micro_conditions: jax.Array) -> jax.Array:
        """Map the pooled text (B, cond_embed_dim) and MICRO_CONDITIONS numbers (B, 5) to (B, D)."""
        half = self.config.micro_cond_encode_dim // 2
        frequencies = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))
        angles = micro_conditions.astype(jnp.float32)[..., None] * frequencies  # (B, 5, half)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).reshape(len(pooled), -1)
        return self.cond_embed(jnp.concatenate([pooled, waves.astype(self.dtype)], axis=-1))

    def __call__(self, tokens: jax.Array, text: jax.Array, condition: jax.Array) -> jax.Array:
        """Map tokens (B, h, w), with text (B, T, D) and condition (B, D), to logits (B, h, w, V) float32."""
        x = self.down_block(self.embed(tokens), text, condition)
        batch, height, width, channels = x.shape
        x = self.project_to_hidden(self.project_to_hidden_norm(x.reshape(batch, height * width, channels)))
        for layer in self.transformer_layers:
            x = layer(x, text, condition)
        x = self.project_from_hidden(self.project_from_hidden_norm(x)).reshape(batch, height, width, channels)
        return self.mlm_layer(self.up_block(x, text, condition))


class TextEncoder(nn.Module):
    """CLIP's text tower with its projection."""

    config: AmusedConfig
    dtype: Any

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map ids (B, T) to what the last layer reads (B, T, D'), and the projected end token (B, cond_embed_dim).

        Padding is read like words, as the original has no mask.
        """
        tower = TextTransformer(self.config.text_config, self.dtype, name="text_model")
        _, pooled, before_last = tower(input_ids, jnp.ones_like(input_ids))
        return before_last, _dense(self.config.cond_embed_dim, self.dtype, "text_projection")(pooled)


class Amused(nn.Module):
    """The network. Activations are in `dtype`; attention weights and logits are computed in float32.

    Ids must be in range; nothing checks that here. Generation: `encode_prompt`, `init_cache`, then `decode_step` with
    ever fewer masked tokens.
    """

    config: AmusedConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        self.text_encoder = TextEncoder(self.config, self.dtype)
        self.transformer = Transformer(self.config, self.dtype)

    @staticmethod
    def example_inputs(config: AmusedConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        numbers = jax.ShapeDtypeStruct((1, MICRO_CONDITIONS), "float32")
        return [example_ids(config.text_length), example_ids(config.image_length), numbers]

    @staticmethod
    def prepare_params(config: AmusedConfig, params: dict, platform: str) -> tuple[AmusedConfig, dict]:
        """Config and parameters for generation: those of the checkpoint, as they are."""
        return config, params

    def __call__(self, input_ids: jax.Array, tokens: jax.Array, micro_conditions: jax.Array) -> jax.Array:
        """Logits (B, h, w, V) float32.

        Args:
            input_ids: (B, T) int32.
            tokens: (B, L) with L a square, or grids (B, h, w); `mask_token_id` where they are masked.
            micro_conditions: (B, 5): width and height in pixels, two coordinates of a crop, and an aesthetic score.
        """
        text = self.encode_prompt(input_ids, jnp.ones_like(input_ids))
        condition = self.transformer.condition(text.pooled, micro_conditions)
        return self.transformer(token_grid(tokens), text.states, condition)

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> Text:
        """What generation reads of prompts (B, T) int32; attention_mask is not read."""
        states, pooled = self.text_encoder(input_ids)
        return Text(self.transformer.project_text(states), pooled)

    def init_cache(self, text: Text, extra: jax.Array) -> Cache:
        """Cache for B generations, each of its row of `text`.

        Args:
            text: From `encode_prompt`.
            extra: (B, E) float32, the values of `config.extra_settings`, in their order.
        """
        size = jnp.full((len(extra), 2), self.config.image_size, jnp.float32)
        rest = extra[:, -(MICRO_CONDITIONS - 2) :]
        return Cache(text.states, self.transformer.condition(text.pooled, jnp.concatenate([size, rest], axis=1)))

    def decode_step(self, cache: Cache, tokens: jax.Array, step: Any) -> tuple[jax.Array, Cache]:
        """Logits (B, L, V) float32 of all tokens, and the cache for the next step.

        Args:
            cache: From `init_cache`.
            tokens: (B, L) int32, `mask_token_id` where they are masked.
            step: Not read.
        """
        logits = self.transformer(token_grid(tokens), cache.states, cache.condition)
        return logits.reshape(*tokens.shape, -1), cache
