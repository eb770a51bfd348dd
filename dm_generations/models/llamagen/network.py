"""LlamaGen: a class or a caption to the logits of image tokens, a decoder-only transformer after it.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024,
https://arxiv.org/abs/2406.06525. A class is one position. A caption is `cls_token_num` of them: features of T5, moved
to the end, where an MLP makes them the transformer's.

- Rotary positions are those of the grid's rows and columns. Positions of the condition are multiplied by 0: their
  queries and keys vanish, so they attend to everything visible alike, as does every token to them.
- The unconditional caption is a table of learnt features, of which as many rows are visible as the prompt has tokens.

B: batch   T: positions of the condition   L: image tokens, row-major over the grid   d: width   D: channels of a head
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
from dm_generations.models.base import (
    LAYERS,
    MAX_POSITIONS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    TrainingLogits,
    check_config,
    example_ids,
    select_fields,
)
from dm_generations.models.layers import (
    PrefixCache,
    Rotary,
    Transformer,
    TransformerSizes,
    extend,
    prefix_visible,
    step_visible,
)
from dm_generations.models.llamagen.t5 import T5Config, T5Encoder
from dm_generations.sampling.params import ExtraSetting, SamplingParams

_BOUNDS = {
    "dim": WIDTH,
    "n_layer": LAYERS,
    "n_head": WIDTH,
    "kv_dim": WIDTH,
    "hidden_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "block_size": POSITIONS,
    "num_classes": (0, VOCABULARY[1]),
    "cls_token_num": (1, MAX_POSITIONS),
    "rope_base": (1.0, 1e12),
    "norm_eps": (0.0, 1.0),
}
# Heads of the sizes that LlamaGen defines whose heads are not 64 wide, by width: GPT-3B and GPT-7B.
_KNOWN_HEADS = {3200: 32, 4096: 32}
_HEAD_WIDTH = 64
_DROPOUT = 0.1  # of the original's training: inputs, and what each half of a block adds


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes, most of them under the names of LlamaGen's `ModelArgs`; the values are those of GPT-B for classes."""

    decodes_own_grid: ClassVar[bool] = True
    # The number of the last step that is guided, where step 0 makes the second token; -1 guides all.
    extra_settings: ClassVar[Mapping[str, ExtraSetting]] = {"cfg_interval": ExtraSetting(-1, -1, MAX_POSITIONS)}

    dim: int = 768
    n_layer: int = 12
    n_head: int | None = None  # which no file says; None: 64 wide, unless the size is one that is known
    kv_dim: int | None = None  # width of all keys, less than `dim` with grouped queries
    hidden_dim: int = 2048  # of the feed-forward blocks
    vocab_size: int = 16384
    block_size: int = 256  # image tokens
    num_classes: int = 1000  # 0: it reads captions
    cls_token_num: int = 1
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    t5: T5Config | None = None

    def __post_init__(self) -> None:
        check_config("LlamaGen", self, _BOUNDS)
        if math.isqrt(self.block_size) ** 2 != self.block_size:
            raise UserError(f"LlamaGen config: block_size {self.block_size} is not that of a square grid")
        if (self.num_classes > 0) == (self.t5 is not None):
            raise UserError("LlamaGen config: a model of classes has no t5, one of captions needs it")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaGenConfig":
        """Return the config of these values; keys it does not know are ignored.

        Raises:
            UserError: A value is bad.
        """
        known = select_fields(cls, values)
        if isinstance(known.get("t5"), Mapping):
            known["t5"] = T5Config.from_dict(known["t5"])
        return cls(**known)

    @property
    def sizes(self) -> TransformerSizes:
        """Sizes of the transformer.

        Raises:
            UserError: The number of heads is unknown, or does not divide the width.
        """
        heads = self.n_head or _KNOWN_HEADS.get(self.dim) or self.dim // _HEAD_WIDTH
        width = self.dim // heads if heads else 0
        kv_dim = self.kv_dim or self.dim
        if not width or self.dim % heads or width % 4 or kv_dim % width or heads % (kv_dim // width):
            what = "which its file does not say" if self.n_head is None else f"not {self.n_head}"
            raise UserError(
                f"layers.0.attention.wqkv.weight, {self.dim + 2 * kv_dim} x {self.dim}: give the model's number of "
                f"heads with --heads, {what}"
            )
        return TransformerSizes(
            *(self.dim, self.n_layer, heads, kv_dim // width, width, self.hidden_dim, self.norm_eps),
            is_interleaved=True,
            is_fused=True,
            dropout=_DROPOUT,
        )

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return math.isqrt(self.block_size)

    @property
    def image_length(self) -> int:
        """Tokens an image."""
        return self.block_size

    @property
    def codebook_size(self) -> int:
        """Tokens are below it."""
        return self.vocab_size

    @property
    def max_text_length(self) -> int:
        """Positions of the condition."""
        return self.cls_token_num

    @property
    def text_vocab_size(self) -> int:
        """Rows of the table that a prompt's ids index; the last class is the unconditional one."""
        return self.num_classes + 1 if self.t5 is None else self.t5.vocab_size

    @property
    def start_token(self) -> int:
        """Not used: the last position of the condition takes its place."""
        return 0

    @property
    def sampling_order(self) -> str:
        """See `sampling.filter_logits`."""
        return "temperature_first"

    @property
    def default_params(self) -> SamplingParams:
        """Settings of LlamaGen's own sampling programs."""
        return SamplingParams(top_k=2000, cond_scale=4.0) if self.num_classes else SamplingParams(1000, cond_scale=7.5)


class _CaptionEmbedding(nn.Module):
    """Features of captions to the transformer's width."""

    config: LlamaGenConfig
    dtype: Any

    @nn.compact
    def __call__(self, features: jax.Array, is_uncond: jax.Array) -> jax.Array:
        """Map features (B, T, d of T5) to (B, T, d); the learnt ones stand for those where is_uncond (B,)."""
        shape = (self.config.cls_token_num, features.shape[-1])
        learnt = self.param("uncond_embedding", nn.initializers.normal(1.0), shape).astype(self.dtype)
        x = jnp.where(is_uncond[:, None, None], learnt[None], features)
        for name in ("fc1", "fc2"):
            x = nn.Dense(self.config.dim, use_bias=False, dtype=self.dtype, name=name)(x)
            x = nn.gelu(x, approximate=True) if name == "fc1" else x
        return x


class LlamaGen(nn.Module):
    """The network. Activations are in `dtype`; norms, rotary positions, attention weights and logits in float32.

    Generation: `encode_prompt`, `init_cache`, then `decode_step` for step 0, 1, ..., L - 1, each by `model.apply(...,
    method=...)`. Ids must be in range; nothing checks that here.
    """

    config: LlamaGenConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Make the submodules."""
        config = self.config
        if config.t5 is None:
            self.classes = nn.Embed(config.num_classes + 1, config.dim)
        else:
            self.t5 = T5Encoder(config.t5, self.dtype)
            self.captions = _CaptionEmbedding(config, self.dtype)
        self.tokens = nn.Embed(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(_DROPOUT)
        self.transformer = Transformer(config.sizes, self.dtype)
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        self.output = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype, dot_general=product)

    @staticmethod
    def example_inputs(config: LlamaGenConfig) -> list[jax.ShapeDtypeStruct]:
        """What `__call__` takes, so that `init` makes all parameters."""
        lengths = (config.max_text_length, config.max_text_length, config.image_length)
        return [example_ids(length) for length in lengths]

    @staticmethod
    def prepare_params(config: LlamaGenConfig, params: dict, platform: str) -> tuple[LlamaGenConfig, dict]:
        """Config and parameters for generation: those of the checkpoint, as they are."""
        return config, params

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array) -> jax.Array:
        """Teacher-forced logits (B, L, V) float32 of tokens (B, L); other arguments are those of `encode_prompt`."""
        return self.training_logits(input_ids, attention_mask, tokens).image

    def training_logits(
        self, input_ids: jax.Array, attention_mask: jax.Array, tokens: jax.Array, deterministic: bool = True
    ) -> TrainingLogits:
        """Logits of the tokens; see `TrainableModel`. T5 is not trained, as by the original."""
        condition, mask = self._condition(input_ids, attention_mask)
        x = jnp.concatenate([condition, self.tokens(tokens[:, :-1]).astype(self.dtype)], axis=1)
        x = self.dropout(x, deterministic)
        x, _ = self.transformer(x, self._rotary(0, x.shape[1]), prefix_visible(mask, x.shape[1]), deterministic)
        return TrainingLogits(self.output(x[:, condition.shape[1] - 1 :]))

    def encode_prompt(self, input_ids: jax.Array, attention_mask: jax.Array) -> PrefixCache:
        """What generation reads of conditions. Axis 0 of every array is B.

        Args:
            input_ids: (B, T) int32: the class; or a caption's ids, -1 for the unconditional caption.
            attention_mask: (B, T) int32, 1 where the caption has tokens; as many of the unconditional one are read.
        """
        condition, mask = self._condition(input_ids, attention_mask)
        count = condition.shape[1] - 1
        _, layers = self.transformer(condition[:, :-1], self._rotary(0, count), prefix_visible(mask, count))
        return PrefixCache(layers, mask, condition[:, -1:])

    def init_cache(self, text: PrefixCache, extra: jax.Array | None = None) -> PrefixCache:
        """Cache for B generations, each of its row of `text`, with room for T + L - 1 positions; reads no `extra`."""
        return extend(text, self.config.image_length)

    def decode_step(self, cache: PrefixCache, token: jax.Array, step: jax.Array) -> tuple[jax.Array, PrefixCache]:
        """Logits (B, V) float32 of image token `step`, and the cache for the next step.

        Args:
            cache: From `init_cache` or the step before.
            token: (B,) int32, the token before it; not read at step 0.
            step: int32 scalar, may be traced.
        """
        position = self.config.cls_token_num - 1 + jnp.asarray(step, jnp.int32)
        x = jnp.where(step == 0, cache.last, self.tokens(token[:, None]).astype(self.dtype))
        visible = step_visible(cache, position)
        x, layers = self.transformer.decode_step(x, self._rotary(position, 1), cache.layers, position, visible)
        return self.output(x)[:, 0], cache._replace(layers=layers)

    def _condition(self, input_ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs (B, T, d) of the condition's positions, and which of them are visible, (B, T) bool."""
        if self.config.t5 is None:
            return self.classes(input_ids).astype(self.dtype), jnp.ones(input_ids.shape, bool)
        length = input_ids.shape[1]
        is_uncond = input_ids[:, 0] < 0
        features = lax.stop_gradient(self.t5(jnp.maximum(input_ids, 0), attention_mask))
        count = attention_mask.sum(axis=1, keepdims=True)
        source = (jnp.arange(length)[None] + count) % length  # the caption goes to the end, in order
        mask = jnp.arange(length)[None] >= length - count
        features = jnp.take_along_axis(features, source[..., None], axis=1) * mask[..., None].astype(self.dtype)
        return self.captions(features, is_uncond), mask

    def _rotary(self, start: jax.Array | int, count: int) -> Rotary:
        """Factors of `count` positions from `start` on."""
        table = rotary_table(self.config)
        return Rotary(*(lax.dynamic_slice_in_dim(jnp.asarray(part), start, count) for part in table))


@functools.lru_cache(maxsize=8)
def rotary_table(config: LlamaGenConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of all T + L positions, each (T + L, D / 2) float32; 0 for the condition's."""
    half = config.sizes.head_width // 2
    frequency = 1 / config.rope_base ** (np.arange(0, half, 2)[: half // 2] / half)
    cells = np.divmod(np.arange(config.image_length), config.grid)
    angles = np.concatenate([axis[:, None] * frequency for axis in cells], axis=1)
    zeros = np.zeros((config.cls_token_num, half))
    cos, sin = (np.concatenate([zeros, part]).astype(np.float32) for part in (np.cos(angles), np.sin(angles)))
    return cos, sin
