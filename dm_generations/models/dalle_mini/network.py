"""DalleBart: a prompt's token ids to the logits of image tokens, an encoder-decoder transformer.

Parameter names and arithmetic are those of borisdayma/dalle-mini (`src/dalle_mini/model/modeling.py`), so
its checkpoints load without renaming; DALL-E mini, mega and the embedded model are configurations of it.
Left out: sampling, tokenizing, reading files, and the options of dalle-mini that no published model uses.

B: batch   T: text tokens   L: image tokens (row-major over the grid)   d: model width   V: image_vocab_size
H: heads   N: layers
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dm_generations.models.base import TrainingLogits, example_ids, layer_class
from dm_generations.models.dalle_mini.config import NORM_PLACEMENTS, DalleBartConfig, unscan
from dm_generations.models.dense import Dense, split_kernels

NORM_EPSILON = 1e-5
MASKED = -1e30  # finite, unlike -inf: a row whose keys are all masked (padding of a batch) stays finite
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

KeysValues = tuple[Array, Array]  # (B, H, K, D) both


class LayerCache(NamedTuple):
    """What one decoder layer remembers of the image tokens so far."""

    keys: Array  # (B, H, L, D) compute dtype; positions after the current step are zero
    values: Array  # (B, H, L, D)


def norm(config: DalleBartConfig, dtype: Any, use_scale: bool = True) -> nn.Module:
    """Make a norm of the kind that the config asks for."""
    return NORMS[config.ln_type](epsilon=NORM_EPSILON, dtype=dtype, use_scale=use_scale)


def norm_before_dense(config: DalleBartConfig, dtype: Any) -> nn.Module:
    """Make a norm without scale, which the dense layer after it can absorb, unless the config forces one."""
    return norm(config, dtype, use_scale=config.force_ln_scale)


def dense(config: DalleBartConfig, dtype: Any, features: int, use_bias: bool | None = None, **options: Any) -> Dense:
    """Make a dense layer with the initial standard deviation that the config asks for."""
    return Dense(
        features,
        use_bias=config.use_bias if use_bias is None else use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.normal(config.init_std),
        **options,
    )


class FlaxBartAttention(nn.Module):
    """Multi-head attention, with keys and values projected apart so that a cache can hold them."""

    config: DalleBartConfig
    heads: int
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        projection = functools.partial(dense, self.config, self.dtype, self.config.d_model)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (projection() for _ in range(4))
        if self.config.use_head_scale:
            self.head_scale = self.param("head_scale", nn.initializers.ones, (1, 1, self.heads, 1))
        # One mask for the whole batch and all heads, as in dalle-mini: random bits cost more than they gain.
        self.dropout = nn.Dropout(self.config.attention_dropout, broadcast_dims=(0, 1))

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)  # (B, H, K, D)

    def keys_values(self, x: Array) -> KeysValues:
        """Project x (B, K, d) to keys and values, (B, H, K, D) both."""
        return self._split_heads(self.k_proj(x)), self._split_heads(self.v_proj(x))

    def __call__(self, x: Array, keys: Array, values: Array, bias: Array, deterministic: bool) -> Array:
        """Attend from x (B, Q, d) to keys and values (B, H, K, D); bias broadcasts to (B, H, Q, K). Gives (B, Q, d)."""
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
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Map x (B, L, d) to (B, L, d)."""
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
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Map x (B, L, d) to (B, L, d)."""
        config, dtype = self.config, self.dtype
        x = norm_before_dense(config, dtype)(x)
        x = ACTIVATIONS[config.activation_function](dense(config, dtype, self.ffn_dim)(x))
        return _end_of_ffn(config, dtype, x, deterministic)


def _end_of_ffn(config: DalleBartConfig, dtype: Any, x: Array, deterministic: bool) -> Array:
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

    def _attention_block(
        self, block: int, x: Array, keys_values: Callable[[Array], Any], bias: Array, deterministic: bool
    ) -> Array:
        """Return x + norm(attention(norm(x))); `keys_values` maps the normed x to what is attended to."""
        norm_before, norm_after = self._norms(block)
        hidden = norm_before(x)
        keys, values = keys_values(hidden)
        hidden = self.FlaxBartAttention[block](hidden, keys, values, bias, deterministic)
        if norm_after is not None:
            hidden = norm_after(hidden)
        return x + self.dropout(hidden, deterministic=deterministic)

    def _ffn_block(self, x: Array, deterministic: bool) -> Array:
        block = self.GLU[0] if self.config.use_glu else self.FFN[0]
        return x + block(x, deterministic)


class FlaxBartEncoderLayer(_Layer):
    """Self-attention over the prompt, then feed-forward."""

    def setup(self) -> None:
        """Make the submodules."""
        self._build(self.config.encoder_attention_heads, 1, self.config.encoder_ffn_dim)

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> tuple[Array, None]:
        """Map x (B, T, d), with bias (B, 1, 1, T), to (B, T, d) and None: the pair that a scan over layers needs."""
        x = self._attention_block(0, x, self.FlaxBartAttention[0].keys_values, bias, deterministic)
        return self._ffn_block(x, deterministic), None


class FlaxBartDecoderLayer(_Layer):
    """Causal self-attention over image tokens, cross-attention to the prompt, then feed-forward."""

    def setup(self) -> None:
        """Make the submodules."""
        self._build(self.config.decoder_attention_heads, 2, self.config.decoder_ffn_dim)

    def __call__(
        self, x: Array, encoder_state: Array, bias: Array, cross_bias: Array, deterministic: bool
    ) -> tuple[Array, None]:
        """Compute all positions: x (B, L, d) and encoder_state (B, T, d) to (B, L, d) and None."""
        cross = self.FlaxBartAttention[1].keys_values(encoder_state)
        x = self._attention_block(0, x, self.FlaxBartAttention[0].keys_values, bias, deterministic)
        x = self._attention_block(1, x, lambda _: cross, cross_bias, deterministic)
        return self._ffn_block(x, deterministic), None

    def cross_keys_values(self, encoder_state: Array) -> KeysValues:
        """Project encoder_state (B, T, d) to keys and values of cross-attention, (B, H, T, D) both."""
        return self.FlaxBartAttention[1].keys_values(encoder_state)

    def decode_step(
        self, x: Array, cache: LayerCache, cross: KeysValues, step: Array, bias: Array, cross_bias: Array
    ) -> tuple[Array, LayerCache]:
        """Compute one position: x (B, 1, d) -> (B, 1, d), and the cache with its self-attention keys and values."""
        updated: list[Array] = []

        def keys_values(hidden: Array) -> list[Array]:
            new = self.FlaxBartAttention[0].keys_values(hidden)
            stored = (lax.dynamic_update_slice_in_dim(old, x, step, axis=2) for old, x in zip(cache, new, strict=True))
            updated.extend(stored)
            return updated

        x = self._attention_block(0, x, keys_values, bias, True)
        x = self._attention_block(1, x, lambda _: cross, cross_bias, True)
        return self._ffn_block(x, True), LayerCache(*updated)


class Text(NamedTuple):
    """All that generation reads of B prompts."""

    layers: tuple[KeysValues, ...]  # keys and values of each decoder layer's cross-attention
    cross_bias: Array  # (B, 1, 1, T) float32, 0 or MASKED


class Cache(NamedTuple):
    """State of a generation."""

    layers: tuple[LayerCache, ...]
    text: Text


def mask_bias(attention_mask: Array) -> Array:
    """Turn a mask (B, T) of 1 and 0 into (B, 1, 1, T) float32 to add to attention logits."""
    return jnp.where(attention_mask > 0, 0.0, MASKED).astype(jnp.float32)[:, None, None, :]


def causal_bias(length: int) -> Array:
    """Return (1, 1, L, L) float32 that hides later positions (columns) from each position (rows)."""
    visible = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[None, None]


class _Layers(nn.Module):
    """The layers of encoder or decoder, each with a subtree of its own or all in one stacked subtree."""

    config: DalleBartConfig
    dtype: Any
    layer: type[nn.Module]
    count: int

    def setup(self) -> None:
        """Make the layers, under the names that dalle-mini gives them."""
        name, is_decoder = self.layer.__name__, self.layer is FlaxBartDecoderLayer
        layer = layer_class(self.layer, 4 if is_decoder else 2)  # the place of `deterministic`
        if self.config.use_scan:
            options: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
            stacked = nn.scan(layer, in_axes=nn.broadcast, length=self.count, **options)
            setattr(self, f"{name}s", stacked(self.config, self.dtype))
        else:
            setattr(self, name, [layer(self.config, self.dtype) for _ in range(self.count)])

    def __call__(self, x: Array, *inputs: Any) -> Array:
        """Run x (B, L, d) through all layers; `inputs` go to each."""
        name = self.layer.__name__
        for layer in [getattr(self, f"{name}s")] if self.config.use_scan else getattr(self, name):
            x, _ = layer(x, *inputs)
        return x

    def cross_keys_values(self, encoder_state: Array) -> tuple[KeysValues, ...]:
        """Project encoder_state (B, T, d) to each layer's cross-attention keys and values, (B, H, T, D)."""
        return tuple(layer.cross_keys_values(encoder_state) for layer in self._separate_layers())

    def decode_step(self, x: Array, cache: Cache, step: Array, bias: Array) -> tuple[Array, tuple[LayerCache, ...]]:
        """Compute one position: x (B, 1, d) -> (B, 1, d), and the layers' caches with its keys and values."""
        updated = []
        for layer, layer_cache, cross in zip(self._separate_layers(), cache.layers, cache.text.layers, strict=True):
            x, layer_cache = layer.decode_step(x, layer_cache, cross, step, bias, cache.text.cross_bias)
            updated.append(layer_cache)
        return x, tuple(updated)

    def _separate_layers(self) -> list[Any]:
        """A loop that updates one stacked cache copies it; separate layers update theirs in place."""
        if self.config.use_scan:
            raise ValueError("scanned layers cannot generate: take the config and parameters of `prepare_params`")
        return getattr(self, self.layer.__name__)


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

    def _embed(self, ids: Array, positions: Array, deterministic: bool) -> Array:
        """Token ids (B, L) and their positions (L,) -> (B, L, d)."""
        tokens = self.embed_tokens(ids)
        if self.config.scale_embedding:
            tokens = tokens * math.sqrt(self.config.d_model)
        x = self.layernorm_embedding(tokens + self.embed_positions(positions[None]))
        return self.dropout(x, deterministic=deterministic)

    def _finish(self, x: Array) -> Array:
        return x if self.final_ln is None else self.final_ln(x)


class _Encoder(_Stack):
    def setup(self) -> None:
        config = self.config
        layers = _Layers(config, self.dtype, FlaxBartEncoderLayer, config.encoder_layers)
        self._build(config.encoder_vocab_size, config.max_text_length, layers, config.use_final_ln_encoder)

    def __call__(self, input_ids: Array, bias: Array, deterministic: bool) -> Array:
        x = self._embed(input_ids, jnp.arange(input_ids.shape[1]), deterministic)
        return self._finish(self.layers(x, bias, deterministic))


class _Decoder(_Stack):
    def setup(self) -> None:
        config = self.config
        layers = _Layers(config, self.dtype, FlaxBartDecoderLayer, config.decoder_layers)
        # one row more than there are image tokens, for the start token
        self._build(config.image_vocab_size + 1, config.image_length, layers, config.use_final_ln_decoder)

    def __call__(self, input_ids: Array, encoder_state: Array, cross_bias: Array, deterministic: bool) -> Array:
        length = input_ids.shape[1]
        x = self._embed(input_ids, jnp.arange(length), deterministic)
        x = self.layers(x, encoder_state, causal_bias(length), cross_bias, deterministic)
        return self._finish(x)

    def cross_keys_values(self, encoder_state: Array) -> tuple[KeysValues, ...]:
        return self.layers.cross_keys_values(encoder_state)

    def decode_step(self, token: Array, cache: Cache, step: Array) -> tuple[Array, tuple[LayerCache, ...]]:
        """Compute position `step`: token (B,) -> (B, 1, d), and the layers' updated caches."""
        x = self._embed(token[:, None], step[None], deterministic=True)
        visible = jnp.arange(self.config.image_length) <= step
        bias = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[None, None, None]
        x, layers = self.layers.decode_step(x, cache, step, bias)
        return self._finish(x), layers


class _Model(nn.Module):
    """Holds encoder and decoder, for the `model/` in parameter names."""

    config: DalleBartConfig
    dtype: Any

    def setup(self) -> None:
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

    def setup(self) -> None:
        """Make the submodules."""
        self.model = _Model(self.config, self.dtype)
        columns = self.config.image_vocab_size + 1
        self.lm_head = dense(self.config, self.dtype, columns, use_bias=False, product_dtype=jnp.float32)

    @staticmethod
    def example_inputs(config: DalleBartConfig) -> list[jax.ShapeDtypeStruct]:
        """Return what `__call__` takes, so that `init` makes all parameters."""
        return [example_ids(n) for n in (config.max_text_length, config.max_text_length, config.image_length)]

    @staticmethod
    def prepare_params(config: DalleBartConfig, params: dict, platform: str) -> tuple[DalleBartConfig, dict]:
        """Return config and parameters for generation: those of the same network with its layers apart."""
        config, params = unscan(config, params)
        if platform == "cpu":  # the encoder reads many rows, once
            model = params["model"] | {"decoder": split_kernels(params["model"]["decoder"])}
            params = params | {"model": model, "lm_head": split_kernels(params["lm_head"])}
        return config, params

    def __call__(
        self, input_ids: Array, attention_mask: Array, decoder_input_ids: Array, deterministic: bool = True
    ) -> Array:
        """Return teacher-forced logits (B, L, V + 1) float32; see `encode` and `decode`."""
        encoder_state = self.encode(input_ids, attention_mask, deterministic)
        return self.decode(decoder_input_ids, encoder_state, attention_mask, deterministic)

    def training_logits(
        self, input_ids: Array, attention_mask: Array, tokens: Array, deterministic: bool = True
    ) -> TrainingLogits:
        """Return the logits of tokens (B, L), each given those before it; see `TrainableModel`."""
        inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.config.start_token)
        return TrainingLogits(self(input_ids, attention_mask, inputs, deterministic))

    def encode(self, input_ids: Array, attention_mask: Array, deterministic: bool = True) -> Array:
        """Map ids (B, T <= max_text_length) int32 and mask (B, T), 1 for text and 0 for padding, to (B, T, d)."""
        return self.model.encoder(input_ids, mask_bias(attention_mask), deterministic)

    def decode(
        self, decoder_input_ids: Array, encoder_state: Array, attention_mask: Array, deterministic: bool = True
    ) -> Array:
        """Return logits (B, L, V + 1) float32 of the token after each of `decoder_input_ids`.

        Args:
            decoder_input_ids: (B, L <= image_length) int32: the start token, then all image tokens except the last.
            encoder_state: From `encode`.
            attention_mask: (B, T), the prompts'.
            deterministic: Whether dropouts are off.
        """
        x = self.model.decoder(decoder_input_ids, encoder_state, mask_bias(attention_mask), deterministic)
        return self.lm_head(x)

    def encode_prompt(self, input_ids: Array, attention_mask: Array) -> Text:
        """Return what generation reads of prompts; ids and mask as in `encode`. Axis 0 of every array is B."""
        encoder_state = self.encode(input_ids, attention_mask)
        return Text(self.model.decoder.cross_keys_values(encoder_state), mask_bias(attention_mask))

    def init_cache(self, text: Text) -> Cache:
        """Return the cache for B generations, each of its row of `text`."""
        config = self.config
        heads = config.decoder_attention_heads
        shape = (len(text.cross_bias), heads, config.image_length, config.d_model // heads)
        empty = LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        return Cache((empty,) * config.decoder_layers, text)

    def decode_step(self, cache: Cache, token: Array, step: Array) -> tuple[Array, Cache]:
        """Return logits (B, V + 1) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: From `init_cache` or the step before.
            token: (B,) int32, the token before it (the start token at step 0).
            step: int32 scalar, may be traced.
        """
        step = jnp.asarray(step, jnp.int32)
        x, layers = self.model.decoder.decode_step(token, cache, step)
        return self.lm_head(x)[:, 0], Cache(layers, cache.text)
