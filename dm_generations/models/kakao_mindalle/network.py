"""minDALL-E: a prompt's token ids to the logits of image tokens, one decoder-only transformer over both.

Parameter names are those of kakaobrain/minDALL-E (`dalle/models/stage2/transformer.py`, `Transformer1d`), dots as
slashes and list indices with an underscore: `blocks_0/attn/key/kernel`. Blocks are those of minGPT.

B: batch   N: text tokens (ctx_len_txt)   L: image tokens (ctx_len_img), row-major over the grid   d: width
S: positions, N + L - 1: nothing follows the last token   Q: positions computed at once   H: heads   D: d / H
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dm_generations.errors import UserError
from dm_generations.models.base import (
    LAYERS,
    MAX_POSITIONS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    TrainingLogits,
    check_config,
    example_ids,
    layer_class,
    select_fields,
)
from dm_generations.models.dense import Dense, split_kernels

NORM_EPSILON = 1e-5
MASKED = -1e30
_BOUNDS = {
    "vocab_size_txt": VOCABULARY,
    "vocab_size_img": VOCABULARY,
    "embed_dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": WIDTH,
    "ctx_len_img": POSITIONS,
    # the last text token is read together with the first image token's step, the others before
    "ctx_len_txt": (2, MAX_POSITIONS),
}


@dataclasses.dataclass(frozen=True)
class KakaoMinDalleConfig:
    """Sizes and options under the names of config.yaml's `stage2` and its `hparams`, with the 1.3B model's values."""

    decodes_own_grid: ClassVar[bool] = False

    vocab_size_txt: int = 16384
    vocab_size_img: int = 16384
    embed_dim: int = 1536
    n_layers: int = 42
    n_heads: int = 24
    ctx_len_img: int = 256
    ctx_len_txt: int = 64
    mlp_bias: bool = True
    attn_bias: bool = True
    gelu_use_approx: bool = False  # x * sigmoid(1.702 x) for the exact gelu

    def __post_init__(self) -> None:
        check_config("minDALL-E", self, _BOUNDS)
        if self.embed_dim % self.n_heads:
            raise UserError(f"minDALL-E config: embed_dim {self.embed_dim} is not divisible by n_heads {self.n_heads}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KakaoMinDalleConfig":
        """Return the config of these values; keys it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        return cls(**select_fields(cls, values))

    @property
    def image_length(self) -> int:
        """Tokens an image."""
        return self.ctx_len_img

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.vocab_size_img

    @property
    def max_text_length(self) -> int:
        """Text tokens that the network reads."""
        return self.ctx_len_txt

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that the prompt's ids index."""
        return self.vocab_size_txt

    @property
    def start_token(self) -> int:
        """Not used: the last text token takes its place."""
        return 0

    @property
    def sampling_order(self) -> str:
        """See `sampling.filter_logits`."""
        return "temperature_first"


class LayerCache(NamedTuple):
    """Keys and values of one block; positions that are not computed yet are zero."""

    keys: jax.Array  # (B, H, S, D) compute dtype
    values: jax.Array  # (B, H, S, D)


class Cache(NamedTuple):
    """State of a generation; before it begins, keys and values of the text alone, (B, H, N - 1, D)."""

    layers: tuple[LayerCache, ...]
    last_text: jax.Array  # (B,) int32, the last text token, fed at step 0


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: KakaoMinDalleConfig
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        projection = functools.partial(Dense, config.embed_dim, config.attn_bias, self.dtype)
        self.key, self.query, self.value, self.proj = (projection() for _ in range(4))

    def keys_values(self, x: jax.Array) -> LayerCache:
        """Keys and values of x (B, Q, d), each (B, H, Q, D)."""
        return LayerCache(self._split_heads(self.key(x)), self._split_heads(self.value(x)))

    def attend(self, x: jax.Array, layer: LayerCache, visible: jax.Array) -> jax.Array:
        """Attend from x (B, Q, d) to keys and values (B, H, K, D); visible is bool and broadcasts to (B, H, Q, K)."""
        queries = self._split_heads(self.query(x))
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, layer.keys, preferred_element_type=jnp.float32)
        logits = jnp.where(visible, logits / math.sqrt(queries.shape[-1]), MASKED)
        weights = jax.nn.softmax(logits).astype(self.dtype)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, layer.values)
        return self.proj(out.swapaxes(1, 2).reshape(*x.shape))

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.n_heads, -1).swapaxes(1, 2)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: KakaoMinDalleConfig
    dtype: Any

    def setup(self) -> None:
        """Make the submodules."""
        config, dtype = self.config, self.dtype
        self.ln1, self.ln2 = (nn.LayerNorm(NORM_EPSILON, dtype=dtype, use_fast_variance=False) for _ in range(2))
        self.attn = Attention(config, dtype)
        self.mlp_0 = Dense(4 * config.embed_dim, config.mlp_bias, dtype)
        self.mlp_2 = Dense(config.embed_dim, config.mlp_bias, dtype)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, LayerCache]:
        """The first Q positions: x (B, Q, d) -> (B, Q, d), and their keys and values (B, H, Q, D)."""
        normed = self.ln1(x)
        layer = self.attn.keys_values(normed)
        x = x + self.attn.attend(normed, layer, jnp.tri(x.shape[1], dtype=bool)[None, None])
        return self._mlp(x), layer

    def decode_step(self, x: jax.Array, layer: LayerCache, position: jax.Array) -> tuple[jax.Array, LayerCache]:
        """One position: x (B, 1, d) -> (B, 1, d), and the cache (B, H, S, D) with its keys and values."""
        normed = self.ln1(x)
        layer = LayerCache(
            *(
                lax.dynamic_update_slice_in_dim(stored, new, position, axis=2)
                for stored, new in zip(layer, self.attn.keys_values(normed), strict=True)
            )
        )
        visible = jnp.arange(layer.keys.shape[2]) <= position
        x = x + self.attn.attend(normed, layer, visible[None, None, None])
        return self._mlp(x), layer

    def _mlp(self, x: jax.Array) -> jax.Array:
        hidden = self.mlp_0(self.ln2(x))
        if self.config.gelu_use_approx:
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        else:
            hidden = jax.nn.gelu(hidden, approximate=False)
        return x + self.mlp_2(hidden)


class KakaoMinDalle(nn.Module):
    """The network. Activations are in `dtype`; attention weights and logits are computed in float32.

    Ids must be in range; nothing checks that here. Padding of a text is attended to like its words, as the model was
    trained, so nothing reads an attention mask.

    Training: `model.apply(variables, input_ids, tokens)`.
    Generation: `encode_prompt`, `init_cache`, then `decode_step` for step 0, 1, ..., L - 1, each by `model.apply(...,
    method=...)`.
    """

    config: KakaoMinDalleConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config, dtype = self.config, self.dtype
        width = config.embed_dim
        self.tok_emb_txt, self.pos_emb_txt = (
            nn.Embed(rows, width) for rows in (config.vocab_size_txt, config.ctx_len_txt)
        )
        self.tok_emb_img, self.pos_emb_img = (
            nn.Embed(rows, width) for rows in (config.vocab_size_img, config.ctx_len_img)
        )
        self.blocks = [layer_class(Block)(config, dtype) for _ in range(config.n_layers)]
        self.ln_f = nn.LayerNorm(NORM_EPSILON, dtype=dtype, use_fast_variance=False)
        self.head_txt, self.head_img = (
            Dense(rows, use_bias=False, dtype=dtype, product_dtype=jnp.float32)
            for rows in (config.vocab_size_txt, config.vocab_size_img)
        )

    @staticmethod
    def example_inputs(config: KakaoMinDalleConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        return [example_ids(config.ctx_len_txt), example_ids(config.ctx_len_img)]

    @staticmethod
    def prepare_params(config: KakaoMinDalleConfig, params: dict, platform: str) -> tuple[KakaoMinDalleConfig, dict]:
        """Config and parameters for generation: those of the checkpoint."""
        return config, split_kernels(params) if platform == "cpu" else params

    def __call__(self, input_ids: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Teacher-forced logits, float32, of the image and of the text after its first token.

        Args:
            input_ids: (B, N) int32.
            tokens: (B, L) int32.

        Returns:
            (B, L, V_img) and (B, N - 1, V_txt), float32.
        """
        text_length, token_count = input_ids.shape[1], tokens.shape[1]
        text = self._embed_text(input_ids, jnp.arange(text_length))
        image = self._embed_image(tokens[:, :-1], jnp.arange(token_count - 1))
        x = jnp.concatenate([text, image], axis=1)  # (B, S, d)
        for block in self.blocks:
            x, _ = block(x)
        x = self.ln_f(x)
        return self.head_img(x[:, text_length - 1 :]), self.head_txt(x[:, : text_length - 1])

    def training_logits(
        self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array, deterministic: bool = True
    ) -> TrainingLogits:
        """Logits of image and text; see `TrainableModel`. Padding is predicted like words, as it is read."""
        image, text = self(input_ids, tokens)
        return TrainingLogits(image, text, input_ids[:, 1:])

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> Cache:
        """What generation reads of prompts (B, N) int32; attention_mask is not read. Axis 0 of every array is B."""
        x = self._embed_text(input_ids[:, :-1], jnp.arange(input_ids.shape[1] - 1))
        layers = []
        for block in self.blocks:
            x, layer = block(x)
            layers.append(layer)
        return Cache(tuple(layers), input_ids[:, -1])

    def init_cache(self, text: Cache) -> Cache:
        """Cache for B generations, each of its row of `text`, with room for S positions."""
        room = ((0, 0), (0, 0), (0, self.config.ctx_len_img), (0, 0))
        return Cache(jax.tree.map(lambda array: jnp.pad(array, room), text.layers), text.last_text)

    def decode_step(self, cache: Cache, token: jax.Array, step: jax.Array) -> tuple[jax.Array, Cache]:
        """Logits (B, V_img) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: from `init_cache` or the step before.
            token: (B,) int32, the token before it; not read at step 0.
            step: int32 scalar, may be traced.
        """
        step = jnp.asarray(step, jnp.int32)
        position = self.config.ctx_len_txt - 1 + step
        text = self._embed_text(cache.last_text[:, None], jnp.full(1, self.config.ctx_len_txt - 1))
        image = self._embed_image(token[:, None], jnp.maximum(step - 1, 0)[None])
        x = jnp.where(step == 0, text, image)  # (B, 1, d)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block.decode_step(x, layer, position)
            layers.append(layer)
        return self.head_img(self.ln_f(x))[:, 0], cache._replace(layers=tuple(layers))

    def _embed_text(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Map ids (B, Q) at positions (Q,) of the text to (B, Q, d)."""
        return self._sum(self.tok_emb_txt(ids), self.pos_emb_txt(positions))

    def _embed_image(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Tokens (B, Q) at positions (Q,) of the image -> (B, Q, d)."""
        return self._sum(self.tok_emb_img(tokens), self.pos_emb_img(positions))

    def _sum(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # Rows are cast, not tables: a table of another dtype would be cast anew at each step.
        return tokens.astype(self.dtype) + positions.astype(self.dtype)[None]
