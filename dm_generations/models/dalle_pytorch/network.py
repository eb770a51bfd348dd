"""DALLE-pytorch: a prompt's token ids to the logits of image tokens, one transformer over text and image.

The arithmetic is that of lucidrains/DALLE-pytorch 1.6.6 (`dalle_pytorch/dalle_pytorch.py`, `transformer.py`,
`attention.py`) and of Jack000's fork of it. Left out: gMLP layers, sampling, and reading files.

The sequence is <bos>, the text, the image tokens; the last token is never fed. Padding (0) at text position p is the
id num_text_tokens + p, so a prompt of zeros is the unconditional one, and no attention mask is needed. Full
sequences and cached steps use the same masks of the attention types, so they agree by construction.

B: batch   T: text_seq_len   L: image_length   S: positions, T + L   n: positions of this call   d: dim   H: heads
D: dim_head   F: image_fmap_size   R: rotary_width   V: text and image columns of the logits
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dm_generations.models.base import TrainingLogits, example_ids, layer_class
from dm_generations.models.dalle_pytorch.config import SPARSE_BLOCK, DallePytorchConfig
from dm_generations.models.dense import Dense, split_kernels

MASKED = jnp.finfo(jnp.float32).min  # as in DALLE-pytorch, for attention and for logits of the other kind of token
_CONV_KERNEL = 5


class LayerCache(NamedTuple):
    """What one layer remembers of the positions before."""

    keys: jax.Array  # (B, H, S, D) compute dtype; zero from the current position on
    values: jax.Array  # (B, H, S, D)
    attn_shift: jax.Array | None  # (B, F, channels that token shift moves): position p in slot p % F
    ff_shift: jax.Array | None


class Cache(NamedTuple):
    """State of a generation; before it begins, keys and values of the text alone, (B, H, T, D)."""

    layers: tuple[LayerCache, ...]
    last_text: jax.Array  # (B, d) embedding of the last text token, which step 0 feeds


@functools.lru_cache(maxsize=16)
def make_mask(config: DallePytorchConfig, attn_type: str) -> np.ndarray:
    """The mask of an attention type: (S, S) bool, true if the query (row) sees the key (column); read-only."""
    position = np.arange(config.sequence_length, dtype=np.int32)
    query, key = position[:, None], position[None, :]
    mask = key <= query
    if attn_type == "sparse":
        assert config.sparse_layout is not None  # the config checks that
        layout = np.array([[block == "1" for block in row] for row in config.sparse_layout])
        mask = mask & layout[query // SPARSE_BLOCK, key // SPARSE_BLOCK]
    elif attn_type != "full":
        text_length = config.text_seq_len + 1  # <bos> belongs to the text, which every later position sees
        query_row, query_column = np.divmod(query - text_length, config.image_fmap_size)
        key_row, key_column = np.divmod(key - text_length, config.image_fmap_size)
        rows_up, columns_left = query_row - key_row, query_column - key_column
        near = _is_near(config, attn_type, rows_up, columns_left)
        mask = mask & ((key < text_length) | near)
    mask.flags.writeable = False
    return mask


def _is_near(config: DallePytorchConfig, attn_type: str, rows_up: np.ndarray, columns_left: np.ndarray) -> np.ndarray:
    """Whether a token is in reach of another one, by their distances; later tokens are hidden elsewhere."""
    if attn_type == "axial_row":
        return rows_up == 0
    if attn_type == "axial_col":
        return columns_left == 0
    first = 0 if config.conv_like == "causal" else -(_CONV_KERNEL // 2)
    last = first + _CONV_KERNEL - 1
    return (rows_up >= first) & (rows_up <= last) & (columns_left >= first) & (columns_left <= last)


def _norm(dtype: Any) -> nn.Module:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first R channels of x (B, H, n, D), in pairs (0, 1), (2, 3), ...; cos and sin (1, 1, n, R)."""
    width = cos.shape[-1]
    head = x[..., :width].astype(jnp.float32)
    pairs = head.reshape(*head.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(head.shape)
    return jnp.concatenate([(head * cos + turned * sin).astype(x.dtype), x[..., width:]], axis=-1)


def _shift_widths(dim: int) -> tuple[int, int]:
    """Channels in a half and in a quarter, rounded up as `torch.chunk` does."""
    return -(-dim // 2), -(-dim // 4)


def _shifted(
    config: DallePytorchConfig, x: jax.Array, previous: jax.Array, above: jax.Array, position: jax.Array
) -> jax.Array:
    """Token shift: part of the channels of x (B, n, d) taken from earlier positions.

    position (n,). previous and above: the positions 1 and F before, (B, n, at least the channels that move).
    Text takes its first half from the token before; image its first quarter from the row above and the second
    from the left, zeros at the borders.
    """
    half, quarter = _shift_widths(config.dim)
    index = (position - config.text_seq_len - 1)[None, :, None]  # of the image token; negative in the text
    text = jnp.concatenate([previous[..., :half], x[..., half:]], axis=-1)
    from_above = jnp.where(index >= config.image_fmap_size, above[..., :quarter], 0)
    from_left = jnp.where(index % config.image_fmap_size > 0, previous[..., quarter : 2 * quarter], 0)
    image = jnp.concatenate([from_above, from_left, x[..., 2 * quarter :]], axis=-1)
    return jnp.where(index < 0, text, image)


def _delayed(x: jax.Array, by: int) -> jax.Array:
    """Move each position of x (B, n, d) `by` later, zeros first."""
    return jnp.pad(x, ((0, 0), (by, 0), (0, 0)))[:, : x.shape[1]]


class _Attention(nn.Module):
    """Projections of multi-head attention."""

    config: DallePytorchConfig
    dtype: Any

    def setup(self) -> None:
        self.to_qkv = Dense(3 * self.config.heads * self.config.dim_head, use_bias=False, dtype=self.dtype)
        self.to_out = Dense(self.config.dim, dtype=self.dtype)

    def queries_keys_values(self, x: jax.Array) -> list[jax.Array]:
        """Project x (B, n, d) to queries, keys and values, each (B, H, n, D)."""
        split = self.to_qkv(x).reshape(*x.shape[:2], 3, self.config.heads, self.config.dim_head)
        return [split[:, :, part].swapaxes(1, 2) for part in range(3)]

    def attend(self, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        """Attend from queries (B, H, n, D) to keys and values (B, H, K, D), where mask (n, K) is true, to (B, n, d)."""
        queries = queries * self.config.dim_head**-0.5
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask[None, None], logits, MASKED)).astype(self.dtype)
        out = jnp.einsum("bhqk,bhkd->bqhd", weights, values)
        return self.to_out(out.reshape(*out.shape[:2], -1))


class _FeedForward(nn.Module):
    """Gated feed-forward block (arXiv 2002.05202), four times as wide as the model."""

    config: DallePytorchConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, gate = jnp.split(Dense(8 * self.config.dim, dtype=self.dtype, name="net_0")(x), 2, axis=-1)
        return Dense(self.config.dim, dtype=self.dtype, name="net_3")(x * nn.gelu(gate, approximate=False))


class _Wrapping(nn.Module):
    """What each layer has of its own around an attention or feed-forward block that it may share."""

    config: DallePytorchConfig
    dtype: Any

    def setup(self) -> None:
        self.norm = _norm(self.dtype)
        if self.config.sandwich_norm:
            self.norm_out = _norm(self.dtype)
        if self.config.layer_scale:
            self.scale = self.param("scale", nn.initializers.ones, (self.config.dim,))

    def before(self, x: jax.Array) -> jax.Array:
        return self.norm(x)

    def after(self, x: jax.Array) -> jax.Array:
        if self.config.sandwich_norm:
            x = self.norm_out(x)
        return x * self.scale.astype(self.dtype)[None, None] if self.config.layer_scale else x


class _Transformer(nn.Module):
    config: DallePytorchConfig
    dtype: Any

    def setup(self) -> None:
        config = self.config
        self.attn = {str(i): _Attention(config, self.dtype) for i in sorted(set(config.attn_sources))}
        self.ff = {str(i): layer_class(_FeedForward)(config, self.dtype) for i in sorted(set(config.ff_sources))}
        self.attn_wrapping = [_Wrapping(config, self.dtype) for _ in range(config.depth)]
        self.ff_wrapping = [_Wrapping(config, self.dtype) for _ in range(config.depth)]
        if config.rotary_emb:
            # cosines and sines of the file's angles: half precision keeps them, it would not keep angles of 8192
            shape = (config.sequence_length, config.rotary_width)
            self.rotary_cos = self.param("rotary_cos", nn.initializers.ones, shape)
            self.rotary_sin = self.param("rotary_sin", nn.initializers.zeros, shape)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """The first n positions at once: x (B, n, d) -> (B, n, d) and what steps after them need."""
        length = x.shape[1]
        position = jnp.arange(length)
        remembered: list[dict[str, jax.Array]] = [{} for _ in range(self.config.depth)]

        def shift(layer: int, block: str, x: jax.Array) -> jax.Array:
            if not self.config.shift_tokens:
                return x
            remembered[layer][block] = self._new_shift_cache(x)
            return _shifted(self.config, x, _delayed(x, 1), _delayed(x, self.config.image_fmap_size), position)

        def attend(layer: int, x: jax.Array) -> jax.Array:
            attention = self._attention(layer)
            queries, keys, values = self._rotate(attention.queries_keys_values(x), 0, length)
            remembered[layer] |= {"keys": keys, "values": values}
            mask = make_mask(self.config, self.config.attn_type(layer))[:length, :length]
            return attention.attend(queries, keys, values, jnp.asarray(mask))

        x = self._through_layers(x, shift, attend)
        return x, self._caches(remembered)

    def decode_step(
        self, x: jax.Array, caches: tuple[LayerCache, ...], position: jax.Array
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """One position: x (B, 1, d), position () int32 -> (B, 1, d) and the caches with it."""
        remembered: list[dict[str, jax.Array]] = [{} for _ in range(self.config.depth)]

        def shift(layer: int, block: str, x: jax.Array) -> jax.Array:
            if not self.config.shift_tokens:
                return x
            ring = getattr(caches[layer], block)
            slots = ring.shape[1]
            above = lax.dynamic_slice_in_dim(ring, position % slots, 1, axis=1)
            previous = lax.dynamic_slice_in_dim(ring, (position - 1) % slots, 1, axis=1)
            moving = x[..., : ring.shape[2]]
            remembered[layer][block] = lax.dynamic_update_slice_in_dim(ring, moving, position % slots, axis=1)
            return _shifted(self.config, x, previous, above, position[None])

        def attend(layer: int, x: jax.Array) -> jax.Array:
            attention = self._attention(layer)
            queries, keys, values = self._rotate(attention.queries_keys_values(x), position, 1)
            keys = lax.dynamic_update_slice_in_dim(caches[layer].keys, keys, position, axis=2)
            values = lax.dynamic_update_slice_in_dim(caches[layer].values, values, position, axis=2)
            remembered[layer] |= {"keys": keys, "values": values}
            mask = jnp.asarray(make_mask(self.config, self.config.attn_type(layer)))
            return attention.attend(queries, keys, values, lax.dynamic_slice_in_dim(mask, position, 1))

        x = self._through_layers(x, shift, attend)
        return x, self._caches(remembered)

    def _through_layers(
        self, x: jax.Array, shift: Callable[..., jax.Array], attend: Callable[..., jax.Array]
    ) -> jax.Array:
        """Map x (B, n, d) to (B, n, d); `shift(layer, block, x)` and `attend(layer, x)` see earlier positions."""
        first = second = x  # one stream, or the two of a reversible network
        for layer in range(self.config.depth):
            wrapping = self.attn_wrapping[layer]
            first = first + wrapping.after(attend(layer, shift(layer, "attn_shift", wrapping.before(second))))
            if not self.config.reversible:
                second = first
            wrapping = self.ff_wrapping[layer]
            feed_forward = self.ff[str(self.config.ff_sources[layer])]
            second = second + wrapping.after(feed_forward(shift(layer, "ff_shift", wrapping.before(first))))
            if not self.config.reversible:
                first = second
        return (first + second) / 2

    def _attention(self, layer: int) -> _Attention:
        return self.attn[str(self.config.attn_sources[layer])]

    def _rotate(self, tensors: list[jax.Array], start: Any, length: int) -> list[jax.Array]:
        """Queries, keys and, in this model, values (B, H, n, D) with rotary embedding, if it has one."""
        if not self.config.rotary_emb:
            return tensors
        cos, sin = (
            lax.dynamic_slice_in_dim(table, start, length).astype(jnp.float32)[None, None]
            for table in (self.rotary_cos, self.rotary_sin)
        )
        return [_rotated(tensor, cos, sin) for tensor in tensors]

    def _new_shift_cache(self, x: jax.Array) -> jax.Array:
        """Ring (B, F, channels) with the last position of x (B, n, d): steps never look further back into the text."""
        slots = self.config.image_fmap_size
        half, quarter = _shift_widths(self.config.dim)
        last = x[:, -1:, : max(half, 2 * quarter)]
        slot = (jnp.arange(slots) == (x.shape[1] - 1) % slots)[None, :, None]
        return jnp.where(slot, last, 0)

    @staticmethod
    def _caches(remembered: list[dict[str, jax.Array]]) -> tuple[LayerCache, ...]:
        return tuple(
            LayerCache(parts["keys"], parts["values"], parts.get("attn_shift"), parts.get("ff_shift"))
            for parts in remembered
        )


class _Columns(nn.Module):
    """A linear layer to float32, whose kernel can also be the table of the ids that its columns stand for."""

    config: DallePytorchConfig
    features: int
    dtype: Any

    def setup(self) -> None:
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.config.dim, self.features))
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, n, d) to (B, n, features) float32."""
        logits = jnp.einsum("bnd,dv->bnv", x, self.kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits + self.bias.astype(jnp.float32)[None, None]

    def embed(self, ids: jax.Array) -> jax.Array:
        """Map ids (B, n) to (B, n, d)."""
        return jnp.moveaxis(jnp.take(self.kernel, ids, axis=1), 0, -1)


class _ToLogits(nn.Module):
    """The head: text and image columns apart, as generation needs the latter alone."""

    config: DallePytorchConfig
    dtype: Any

    def setup(self) -> None:
        self.norm = _norm(self.dtype)
        self.text = _Columns(self.config, self.config.text_rows, self.dtype)
        self.image = _Columns(self.config, self.config.num_image_tokens, self.dtype)

    def hidden(self, x: jax.Array) -> jax.Array:
        """Map x (B, n, d) to what the columns' projections take."""
        if self.config.stable:
            x = x / x.max(axis=-1, keepdims=True)
        return self.norm(x)

    def image_logits(self, x: jax.Array) -> jax.Array:
        """Map x (B, n, d) to logits of image tokens, (B, n, num_image_tokens) float32."""
        return self.image(self.hidden(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, n, d) from position 0 on to (B, n, V) float32, MASKED for tokens of the other kind."""
        hidden = self.hidden(x)
        predicts_image = (jnp.arange(x.shape[1]) >= self.config.text_seq_len)[None, :, None]
        text = jnp.where(predicts_image, MASKED, self.text(hidden))
        image = jnp.where(predicts_image, self.image(hidden), MASKED)
        return jnp.concatenate([text, image], axis=-1)


class DallePytorch(nn.Module):
    """The network. Activations are in `dtype`; attention weights and logits are computed in float32.

    Generation: `encode_prompt`, `init_cache`, then `decode_step` for step 0, 1, ..., image_length - 1; each is a method
    for `model.apply(..., method=...)`. Ids must be in range; nothing checks that here.
    """

    config: DallePytorchConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        self.transformer = _Transformer(config, self.dtype)
        self.to_logits = _ToLogits(config, self.dtype)
        if not config.share_input_output_emb:
            self.text_emb = nn.Embed(config.text_rows, config.dim)
            self.image_emb = nn.Embed(config.num_image_tokens, config.dim)
        if not config.rotary_emb:
            normal = nn.initializers.normal(1.0)
            self.text_pos_emb = nn.Embed(config.text_seq_len + 1, config.dim)
            side = (config.image_fmap_size, config.dim)
            self.image_pos_emb_rows = self.param("image_pos_emb_rows", normal, side)
            self.image_pos_emb_columns = self.param("image_pos_emb_columns", normal, side)

    @staticmethod
    def example_inputs(config: DallePytorchConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_ids(config.text_seq_len), example_ids(config.image_length)]

    @staticmethod
    def prepare_params(config: DallePytorchConfig, params: dict, platform: str) -> tuple[DallePytorchConfig, dict]:
        """Config and parameters for generation: those of the checkpoint."""
        if platform == "cpu":
            params = params | {"transformer": split_kernels(params["transformer"])}
        return config, params

    def __call__(self, input_ids: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """Logits of the token after each of <bos>, text and image tokens.

        Args:
            input_ids: (B, T) int32, 0 for padding.
            image_tokens: (B, n <= L) int32.

        Returns:
            (B, min(T + 1 + n, S), V) float32. Columns are text (padding ids too), then image tokens; each position has
            MASKED for tokens of the other kind.
        """
        text, image = self._embed_text(input_ids), self._embed_image(image_tokens, jnp.arange(image_tokens.shape[1]))
        x = jnp.concatenate([text, image], axis=1)[:, : self.config.sequence_length]
        x, _ = self.transformer(x)
        return self.to_logits(x)

    def training_logits(
        self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array, deterministic: bool = True
    ) -> TrainingLogits:
        """Logits of image and text; see `TrainableModel`. Padding is predicted too, by its own ids."""
        logits, length = self(input_ids, tokens), self.config.text_seq_len
        text, image = logits[:, :length, : self.config.text_rows], logits[:, length:, self.config.text_rows :]
        return TrainingLogits(image, text, self._padded_ids(input_ids))

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> Cache:
        """What generation reads of prompts.

        Args:
            input_ids: (B, T) int32, 0 for padding.
            attention_mask: not used; padding is read like text.

        Returns:
            A cache whose arrays have B as axis 0.
        """
        text = self._embed_text(input_ids)
        _, layers = self.transformer(text[:, :-1])
        return Cache(layers, text[:, -1])

    def init_cache(self, text: Cache) -> Cache:
        """Cache for B generations, each of its row of `text`, with room for S positions."""
        room = ((0, 0), (0, 0), (0, self.config.sequence_length - self.config.text_seq_len), (0, 0))
        layers = (
            layer._replace(keys=jnp.pad(layer.keys, room), values=jnp.pad(layer.values, room)) for layer in text.layers
        )
        return Cache(tuple(layers), text.last_text)

    def decode_step(self, cache: Cache, token: jax.Array, step: jax.Array) -> tuple[jax.Array, Cache]:
        """Logits (B, num_image_tokens) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: from `init_cache` or the step before.
            token: (B,) int32, the token before it (any at step 0).
            step: int32 scalar, may be traced.
        """
        step = jnp.asarray(step, jnp.int32)
        image = self._embed_image(token[:, None], jnp.maximum(step - 1, 0)[None])
        x = jnp.where(step == 0, cache.last_text[:, None], image)
        x, layers = self.transformer.decode_step(x, cache.layers, step + self.config.text_seq_len)
        return self.to_logits.image_logits(x)[:, 0], Cache(layers, cache.last_text)

    def _embed_text(self, input_ids: jax.Array) -> jax.Array:
        """Ids (B, T) -> (B, T + 1, d): <bos> (id 0) first, then the text with padding ids."""
        ids = jnp.pad(self._padded_ids(input_ids), ((0, 0), (1, 0)))
        x = self.to_logits.text.embed(ids) if self.config.share_input_output_emb else self.text_emb(ids)
        if not self.config.rotary_emb:
            x = x + self.text_pos_emb.embedding[None]
        return x.astype(self.dtype)

    def _padded_ids(self, input_ids: jax.Array) -> jax.Array:
        """Ids (B, T) with an id of its own for each position's padding."""
        padding = self.config.num_text_tokens + jnp.arange(self.config.text_seq_len, dtype=input_ids.dtype)
        return jnp.where(input_ids == 0, padding[None], input_ids)

    def _embed_image(self, tokens: jax.Array, index: jax.Array) -> jax.Array:
        """Tokens (B, n) at positions index (n,) of the image -> (B, n, d)."""
        x = self.to_logits.image.embed(tokens) if self.config.share_input_output_emb else self.image_emb(tokens)
        if not self.config.rotary_emb:
            row, column = jnp.divmod(index, self.config.image_fmap_size)
            x = x + (self.image_pos_emb_rows[row] + self.image_pos_emb_columns[column])[None]
        return x.astype(self.dtype)
