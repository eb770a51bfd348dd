"""DalleBart: a prompt's token ids to the logits of image tokens, an encoder-decoder transformer.

Parameter names and arithmetic are those of borisdayma/dalle-mini (`src/dalle_mini/model/modeling.py`), so
its checkpoints load without renaming; DALL-E mini, mega and the embedded model are configurations of it.
Left out: sampling, tokenizing, reading files, and the options of dalle-mini that no published model uses.

B: batch   T: text tokens   L: image tokens (row-major over the grid)   d: model width   V: image_vocab_size
H: heads   N: layers
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dm_generations.models.base import example_ids
from dm_generations.models.dalle_mini.config import DalleBartConfig, unscan
from dm_generations.models.dalle_mini.layers import (
    FlaxBartDecoderLayer,
    FlaxBartEncoderLayer,
    LayerCache,
    dense,
    norm,
    norm_before_dense,
)

MASKED = -1e30  # finite, unlike -inf: a row whose keys are all masked (padding of a batch) stays finite


class Text(NamedTuple):
    """All that generation reads of B prompts."""

    layers: tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each decoder layer's cross-attention
    cross_bias: jax.Array  # (B, 1, 1, T) float32, 0 or MASKED


class Cache(NamedTuple):
    """State of a generation."""

    layers: tuple[LayerCache, ...]
    text: Text


def mask_bias(attention_mask: jax.Array) -> jax.Array:
    """(B, T) 1 or 0 -> (B, 1, 1, T) float32 to add to attention logits."""
    return jnp.where(attention_mask > 0, 0.0, MASKED).astype(jnp.float32)[:, None, None, :]


def causal_bias(length: int) -> jax.Array:
    """(1, 1, L, L) float32 that hides later positions (columns) from each position (rows)."""
    visible = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[None, None]


def _scanned(layer: type[nn.Module], layer_count: int, **method_axes: Any) -> type[nn.Module]:
    """`layer` with a leading layer axis on its parameters; `method_axes`: axes of each method's inputs."""
    shared = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": layer_count,
    }
    return nn.scan(layer, methods={name: {**shared, "in_axes": axes} for name, axes in method_axes.items()})


class _EncoderLayers(nn.Module):
    config: DalleBartConfig
    dtype: Any

    def setup(self):
        config = self.config
        if config.use_scan:
            layers = _scanned(FlaxBartEncoderLayer, config.encoder_layers, __call__=nn.broadcast)
            self.FlaxBartEncoderLayers = layers(config, self.dtype)
        else:
            layers = [FlaxBartEncoderLayer(config, self.dtype) for _ in range(config.encoder_layers)]
            self.FlaxBartEncoderLayer = layers

    def __call__(self, x, bias, deterministic: bool):
        """X (B, T, d), bias (B, 1, 1, T) -> (B, T, d)."""
        layers = [self.FlaxBartEncoderLayers] if self.config.use_scan else self.FlaxBartEncoderLayer
        for layer in layers:
            x, _ = layer(x, bias, deterministic)
        return x


class _DecoderLayers(nn.Module):
    config: DalleBartConfig
    dtype: Any

    def setup(self):
        config = self.config
        if config.use_scan:
            layers = _scanned(
                FlaxBartDecoderLayer,
                config.decoder_layers,
                __call__=nn.broadcast,
            )
            self.FlaxBartDecoderLayers = layers(config, self.dtype)
        else:
            layers = [FlaxBartDecoderLayer(config, self.dtype) for _ in range(config.decoder_layers)]
            self.FlaxBartDecoderLayer = layers

    def __call__(self, x, encoder_state, bias, cross_bias, deterministic: bool):
        """X (B, L, d), encoder_state (B, T, d) -> (B, L, d)."""
        layers = [self.FlaxBartDecoderLayers] if self.config.use_scan else self.FlaxBartDecoderLayer
        for layer in layers:
            x, _ = layer(x, encoder_state, bias, cross_bias, deterministic)
        return x

    def cross_keys_values(self, encoder_state) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Cross-attention keys and values of encoder_state (B, T, d), each (B, H, T, D)."""
        return tuple(layer.cross_keys_values(encoder_state) for layer in self._unscanned())

    def decode_step(self, x, cache: Cache, step, bias):
        """One position: x (B, 1, d) -> (B, 1, d) and the layers' caches with this step's keys and values."""
        updated = []
        for layer, layer_cache, cross in zip(self._unscanned(), cache.layers, cache.text.layers, strict=True):
            x, layer_cache = layer.decode_step(x, layer_cache, cross, step, bias, cache.text.cross_bias)
            updated.append(layer_cache)
        return x, tuple(updated)

    def _unscanned(self) -> list[nn.Module]:
        """A loop that updates one stacked cache copies it; layers apart update theirs in place."""
        if self.config.use_scan:
            raise ValueError("scanned layers cannot generate: take the config and parameters of `prepare_params`")
        return self.FlaxBartDecoderLayer


class _Stack(nn.Module):
    """What encoder and decoder share: embeddings before the layers, a norm after them."""

    config: DalleBartConfig
    dtype: Any

    def _build(self, vocab_size: int, length: int, layers: nn.Module, use_final_ln: bool) -> None:
        """Create the submodules; called from `setup`."""
        config = self.config
        embed = functools.partial(
            nn.Embed, features=config.d_model, embedding_init=nn.initializers.normal(config.init_std)
        )
        # Summed in the dtype of the parameters, as in dalle-mini; the norm after the sum casts.
        self.embed_tokens = embed(vocab_size)
        self.embed_positions = embed(length)
        self.layernorm_embedding = norm(config, self.dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = layers
        self.final_ln = norm_before_dense(config, self.dtype) if use_final_ln else None

    def _embed(self, ids, positions, deterministic: bool):
        """Token ids (B, L) and their positions (L,) -> (B, L, d)."""
        tokens = self.embed_tokens(ids)
        if self.config.scale_embedding:
            tokens = tokens * math.sqrt(self.config.d_model)
        x = self.layernorm_embedding(tokens + self.embed_positions(positions[None]))
        return self.dropout(x, deterministic=deterministic)

    def _finish(self, x):
        return x if self.final_ln is None else self.final_ln(x)


class _Encoder(_Stack):
    def setup(self):
        config = self.config
        layers = _EncoderLayers(config, self.dtype)
        self._build(config.encoder_vocab_size, config.max_text_length, layers, config.use_final_ln_encoder)

    def __call__(self, input_ids, bias, deterministic: bool):
        x = self._embed(input_ids, jnp.arange(input_ids.shape[1]), deterministic)
        return self._finish(self.layers(x, bias, deterministic))


class _Decoder(_Stack):
    def setup(self):
        config = self.config
        layers = _DecoderLayers(config, self.dtype)
        # one row more than there are image tokens, for the start token
        self._build(config.image_vocab_size + 1, config.image_length, layers, config.use_final_ln_decoder)

    def __call__(self, input_ids, encoder_state, cross_bias, deterministic: bool):
        length = input_ids.shape[1]
        x = self._embed(input_ids, jnp.arange(length), deterministic)
        x = self.layers(x, encoder_state, causal_bias(length), cross_bias, deterministic)
        return self._finish(x)

    def cross_keys_values(self, encoder_state):
        return self.layers.cross_keys_values(encoder_state)

    def decode_step(self, token, cache: Cache, step):
        """Token (B,) at position `step` -> (B, 1, d) and the layers' updated caches."""
        x = self._embed(token[:, None], step[None], deterministic=True)
        visible = jnp.arange(self.config.image_length) <= step
        bias = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[None, None, None]
        x, layers = self.layers.decode_step(x, cache, step, bias)
        return self._finish(x), layers


class _Model(nn.Module):
    """Holds encoder and decoder, for the `model/` in parameter names."""

    config: DalleBartConfig
    dtype: Any

    def setup(self):
        self.encoder = _Encoder(self.config, self.dtype)
        self.decoder = _Decoder(self.config, self.dtype)


class DalleBart(nn.Module):
    """The network. Activations are in `dtype`; attention weights and logits are computed in float32.

    With `deterministic=False` the dropouts of the config are active and need a "dropout" rng. Ids must be in
    range; nothing checks that here.

    Training: `model.apply(variables, input_ids, attention_mask, decoder_input_ids)`.
    Generation: `encode_prompt`, `init_cache`, then `decode_step` for step 0, 1, ..., image_length - 1, starting with
    `config.start_token`; each is a method for `model.apply(..., method=...)`. Scanned layers cannot generate:
    `prepare_params` gives config and parameters of the same network that can.
    """

    config: DalleBartConfig
    dtype: Any = jnp.float32

    def setup(self):
        self.model = _Model(self.config, self.dtype)
        self.lm_head = dense(
            self.config,
            self.dtype,
            self.config.image_vocab_size + 1,
            use_bias=False,
            preferred_element_type=jnp.float32,
        )

    @staticmethod
    def example_inputs(config: DalleBartConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [
            example_ids(config.max_text_length),
            example_ids(config.max_text_length),
            example_ids(config.image_length),
        ]

    @staticmethod
    def prepare_params(config: DalleBartConfig, params: dict) -> tuple[DalleBartConfig, dict]:
        """Config and parameters for generation: those of the same network with its layers apart."""
        return unscan(config, params)

    def __call__(self, input_ids, attention_mask, decoder_input_ids, deterministic: bool = True):
        """Teacher-forced logits (B, L, V + 1) float32; see `encode` and `decode`."""
        encoder_state = self.encode(input_ids, attention_mask, deterministic)
        return self.decode(decoder_input_ids, encoder_state, attention_mask, deterministic)

    def encode(self, input_ids, attention_mask, deterministic: bool = True):
        """Token ids (B, T <= max_text_length) int32, mask (B, T) 1 for text, 0 for padding -> (B, T, d)."""
        return self.model.encoder(input_ids, mask_bias(attention_mask), deterministic)

    def decode(self, decoder_input_ids, encoder_state, attention_mask, deterministic: bool = True):
        """Logits (B, L, V + 1) float32 of the token after each of `decoder_input_ids`.

        Args:
            decoder_input_ids: (B, L <= image_length) int32: the start token, then all image tokens except the last.
            encoder_state: from `encode`.
            attention_mask: (B, T), the prompts'.
            deterministic: whether dropouts are off.
        """
        x = self.model.decoder(decoder_input_ids, encoder_state, mask_bias(attention_mask), deterministic)
        return self.lm_head(x)

    def encode_prompt(self, input_ids, attention_mask) -> Text:
        """What generation reads of prompts; ids and mask as in `encode`. Axis 0 of every array is B."""
        encoder_state = self.encode(input_ids, attention_mask)
        return Text(self.model.decoder.cross_keys_values(encoder_state), mask_bias(attention_mask))

    def init_cache(self, text: Text) -> Cache:
        """Cache for B generations, each of its row of `text`."""
        config = self.config
        heads = config.decoder_attention_heads
        shape = (len(text.cross_bias), heads, config.image_length, config.d_model // heads)
        empty = LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        return Cache((empty,) * config.decoder_layers, text)

    def decode_step(self, cache: Cache, token, step) -> tuple[jax.Array, Cache]:
        """Logits (B, V + 1) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: from `init_cache` or the step before.
            token: (B,) int32, the token before it (the start token at step 0).
            step: int32 scalar, may be traced.
        """
        step = jnp.asarray(step, jnp.int32)
        x, layers = self.model.decoder.decode_step(token, cache, step)
        return self.lm_head(x)[:, 0], Cache(layers, cache.text)
