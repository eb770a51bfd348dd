"""The sampling loop of every text model, compiled whole: prompts, settings and keys of a batch of rows to their tokens.

N: rows asked for   B: rows of the compiled batch   T: text tokens   V: columns of the logits
L: tokens of a picture, row-major over its grid

Prompts, settings and keys are arrays over rows, so one program serves every mix of them. A batch always has B
rows, short ones are padded, and no row reads another: with one B, on one kind of device, a row gives the same
tokens alone, at any position and in any company.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dm_generations import sampling
from dm_generations.errors import UserError
from dm_generations.generate.dalle_mini import draw_tokens_dalle_mini
from dm_generations.generate.row_inputs import RowInputs
from dm_generations.models.checkpoints import Checkpoint
from dm_generations.models.networks import network_class
from dm_generations.models.placement import computable, placed
from dm_generations.text import TextTokenizer

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Sampling settings of N rows, (N,) each, of any numeric dtype; named as the archive's columns."""

    top_k: np.ndarray  # 0: all codes
    top_p: np.ndarray  # 1: all codes
    temperature: np.ndarray  # 0: always the best code
    cond_scale: np.ndarray  # 1: no super conditioning


class Generator:
    """A text model on the device, and the program that draws batches of `batch_size` pictures with it.

    codebook_size: codes that may be drawn; by default all of the model's.
    rng: "rows" is our own noise; "dalle-mini" repeats dalle-mini's `generate`, called with one prompt and the row's
    key, and can draw ids that are no codes. Raises UserError for a model that is not DALL-E mini's kind.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: TextTokenizer,
        batch_size: int,
        codebook_size: int | None = None,
        dtype: str = "float32",
        rng: str = "rows",
    ):
        if rng == "dalle-mini" and checkpoint.kind != "dalle_bart":
            raise UserError(
                f"--rng dalle-mini repeats DALL-E mini and mega; {checkpoint.name!r} is another kind of model"
            )
        config = checkpoint.config
        self.rng = rng
        self.batch_size = batch_size
        self.token_count = config.image_length
        self.codebook_size = min(config.codebook_size, codebook_size or config.codebook_size)
        self._name = checkpoint.name
        self._tokenizer = tokenizer
        self._text_length = config.max_text_length
        self._params = placed(checkpoint.params)
        self._model = network_class(checkpoint.kind)(config, jnp.dtype(dtype))

    def check_texts(self, texts: Sequence[str | None]) -> None:
        """Raises UserError for a text with a token that the model lacks, as one of a wrong tokenizer has."""
        self._tokenizer.encode(texts, self._text_length)

    def generate(
        self,
        prompts: Sequence[str],
        sc_prompts: Sequence[str | None],
        settings: RowSettings,
        keys: np.ndarray,
    ) -> np.ndarray:
        """Tokens uint16 (N, L), each below `codebook_size`; with rng "dalle-mini" ids int32 (N, L), of which those
        that are not below it are no codes.

        prompts, sc_prompts: N each; None is the model's own empty prompt   keys: (N, 2) uint32
        Raises UserError if the model gives no logits to draw from.
        """
        rows = (prompts, sc_prompts, *_columns(settings), keys)
        batches = [self._generate_batch(*batch) for batch in _batches(rows, self.batch_size)]
        return np.concatenate([np.empty((0, self.token_count), batches[0].dtype if batches else np.uint16), *batches])

    def replay(
        self,
        prompts: Sequence[str],
        sc_prompts: Sequence[str | None],
        settings: RowSettings,
        keys: np.ndarray,
        tokens: np.ndarray,
    ) -> np.ndarray:
        """By how much each of `tokens` (N, L) missed being drawn, float32 (N, L); see `sampling.margin`.

        Every step reads the codes given, whatever would have been drawn. NaN where the model gives no numbers.
        """
        rows = (prompts, sc_prompts, *_columns(settings), keys, tokens)
        batches = [self._replay_batch(*batch) for batch in _batches(rows, self.batch_size)]
        return np.concatenate([np.empty((0, self.token_count), np.float32), *batches])

    def _generate_batch(self, prompts, sc_prompts, *columns_and_keys) -> np.ndarray:
        rows = jax.device_put(self._inputs(prompts, sc_prompts, *columns_and_keys))
        if self.rng == "dalle-mini":
            config = self._model.config
            ends = np.int32(config.eos_token_id), np.int32(config.pad_token_id)
            drawn = draw_tokens_dalle_mini(self._model, self._params, rows, *jax.device_put(ends))
        else:
            drawn = draw_tokens(self._model, self.codebook_size, self._params, rows)
        tokens, is_drawable = (array[: len(prompts)] for array in jax.device_get(drawn))
        if not is_drawable.all():
            raise UserError(f"model {self._name!r} gives no numbers for some rows: its weights are damaged")
        return tokens

    def _replay_batch(self, prompts, sc_prompts, *columns_and_keys_and_tokens) -> np.ndarray:
        *columns_and_keys, tokens = columns_and_keys_and_tokens
        rows = self._inputs(prompts, sc_prompts, *columns_and_keys)
        tokens = _padded(tokens, np.int32, self.batch_size)
        margins = replay_tokens(self._model, self.codebook_size, self._params, *jax.device_put((rows, tokens)))
        return jax.device_get(margins)[: len(prompts)]

    def _inputs(self, prompts, sc_prompts, top_k, top_p, temperature, cond_scale, keys) -> RowInputs:
        """B rows at most, padded to B, on the host."""
        padding = [None] * (self.batch_size - len(prompts))
        texts = [*prompts, *padding, *(text or None for text in sc_prompts), *padding]
        return RowInputs(
            *self._tokenizer.encode(texts, self._text_length),
            _padded(keys, np.uint32, self.batch_size),
            _padded(np.minimum(top_k, _INT32_MAX), np.int32, self.batch_size),
            *(_padded(column, np.float32, self.batch_size) for column in (top_p, temperature, cond_scale)),
        )


# The model is static, so generators of one configuration share their compiled programs.
@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_tokens(
    model: nn.Module,
    codebook_size: int,
    params: dict,
    rows: RowInputs,
) -> tuple[jax.Array, jax.Array]:
    """Tokens uint16 (B, L), and for each row whether every step had a code to draw, bool (B,)."""
    params = computable(params, model.dtype)
    cache, start_token = _begin(model, params, rows)

    def draw_one(state, step):
        cache, token, is_drawable = state
        guided, cache = _guided(model, params, cache, token, step, rows.cond_scale)
        token = sampling.sample(guided, step, *_sampled(rows), codebook_size, model.config.sampling_order)
        return (cache, token, is_drawable & sampling.is_drawable(guided, codebook_size)), token

    state = (cache, start_token, jnp.ones(len(rows.keys), bool))
    steps = jnp.arange(model.config.image_length, dtype=jnp.int32)
    (_, _, is_drawable), tokens = jax.lax.scan(draw_one, state, steps)  # tokens (L, B)
    return tokens.T.astype(jnp.uint16), is_drawable


@functools.partial(jax.jit, static_argnums=(0, 1))
def replay_tokens(
    model: nn.Module,
    codebook_size: int,
    params: dict,
    rows: RowInputs,
    tokens: jax.Array,
) -> jax.Array:
    """Margins float32 (B, L) of `tokens` (B, L) int32, each read by the step after it; the rest as `draw_tokens`."""
    params = computable(params, model.dtype)
    cache, start_token = _begin(model, params, rows)

    def replay_one(state, step_and_token):
        cache, token = state
        step, stored = step_and_token
        guided, cache = _guided(model, params, cache, token, step, rows.cond_scale)
        margin = sampling.margin(guided, stored, step, *_sampled(rows), codebook_size, model.config.sampling_order)
        return (cache, stored), jnp.where(sampling.is_drawable(guided, codebook_size), margin, jnp.nan)

    steps = jnp.arange(model.config.image_length, dtype=jnp.int32)
    _, margins = jax.lax.scan(replay_one, (cache, start_token), (steps, tokens.T))
    return margins.T


def _begin(model: nn.Module, params: dict, rows: RowInputs) -> tuple[Any, jax.Array]:
    """The cache of a generation, and the token that its first step reads, (B,) int32."""
    cache = model.apply({"params": params}, rows.input_ids, rows.attention_mask, method="begin")
    return cache, jnp.full(len(rows.keys), model.config.start_token, jnp.int32)


def _sampled(rows: RowInputs) -> tuple[jax.Array, ...]:
    """What `sampling` takes of each row."""
    return rows.keys, rows.top_k, rows.top_p, rows.temperature


def _guided(model: nn.Module, params: dict, cache, token: jax.Array, step: jax.Array, cond_scale: jax.Array):
    """Guided logits (B, V) of one step that reads `token` (B,), and the cache for the next."""
    # Both halves read the code that was drawn: they share one picture.
    logits, cache = model.apply({"params": params}, cache, jnp.concatenate([token, token]), step, method="decode_step")
    cond, uncond = jnp.split(logits, 2)
    guided = sampling.guide(cond, uncond, cond_scale)
    if getattr(model.config, "guides_first_code_alone", False):
        guided = jnp.where(((step > 0) & (cond_scale != 1))[:, None], uncond, guided)
    return guided, cache


def _columns(settings: RowSettings) -> list[np.ndarray]:
    return [getattr(settings, field.name) for field in dataclasses.fields(settings)]


def _padded(rows: np.ndarray, dtype: type, count: int) -> np.ndarray:
    """`rows` as `dtype`, followed by zeros up to `count` rows. A row of zeros draws greedily."""
    rows = np.asarray(rows, dtype)
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _batches(columns: Sequence[Sequence], size: int) -> Iterator[list[Sequence]]:
    """`columns`, of N rows each, in batches of at most `size` rows."""
    for start in range(0, len(columns[0]), size):
        yield [column[start : start + size] for column in columns]
