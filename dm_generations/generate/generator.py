"""The sampling loop of every text model, compiled whole: prompts, settings and keys of a batch of rows to their tokens.

N: rows asked for   B: rows of the compiled batch   T: text tokens   V: columns of the logits
L: tokens of a picture, row-major over its grid

Prompts, settings and keys are arrays over rows, so one program serves every mix of them. A batch always has B
rows, short ones are padded, and no row reads another: with one B, on one kind of device, a row gives the same
tokens alone, at any position and in any company.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dm_generations import sampling
from dm_generations.errors import UserError
from dm_generations.generate.dalle_mini import draw_tokens_dalle_mini
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
        batches = [
            self._generate_batch(
                prompts[start : start + self.batch_size],
                sc_prompts[start : start + self.batch_size],
                RowSettings(*(column[start : start + self.batch_size] for column in _columns(settings))),
                keys[start : start + self.batch_size],
            )
            for start in range(0, len(prompts), self.batch_size)
        ]
        return np.concatenate([np.empty((0, self.token_count), batches[0].dtype if batches else np.uint16), *batches])

    def _generate_batch(self, prompts, sc_prompts, settings: RowSettings, keys) -> np.ndarray:
        count = len(prompts)
        padding = self.batch_size - count
        texts = [*prompts, *[None] * padding, *(text or None for text in sc_prompts), *[None] * padding]
        arguments = (
            *self._tokenizer.encode(texts, self._text_length),
            _padded(keys, np.uint32, self.batch_size),
            _padded(np.minimum(settings.top_k, _INT32_MAX), np.int32, self.batch_size),
            *(
                _padded(column, np.float32, self.batch_size)
                for column in (settings.top_p, settings.temperature, settings.cond_scale)
            ),
        )
        if self.rng == "dalle-mini":
            config = self._model.config
            ends = np.int32(config.eos_token_id), np.int32(config.pad_token_id)
            drawn = draw_tokens_dalle_mini(self._model, self._params, *jax.device_put((*arguments, *ends)))
        else:
            drawn = draw_tokens(self._model, self.codebook_size, self._params, *jax.device_put(arguments))
        tokens, is_drawable = jax.device_get(drawn)
        if not is_drawable[:count].all():
            raise UserError(f"model {self._name!r} gives no numbers for some rows: its weights are damaged")
        return tokens[:count]


# The model is static, so generators of one configuration share their compiled programs.
@functools.partial(jax.jit, static_argnums=(0, 1))
def draw_tokens(
    model: nn.Module,
    codebook_size: int,
    params: dict,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    keys: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    cond_scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens uint16 (B, L), and for each row whether every step had a code to draw, bool (B,).

    input_ids, attention_mask: (2B, T) int32, the B prompts, then the B unconditional prompts
    keys: (B, 2) uint32   top_k: (B,) int32   the other settings: (B,) float32
    """
    apply = functools.partial(model.apply, {"params": computable(params, model.dtype)})
    cache = apply(input_ids, attention_mask, method="begin")
    start_token = jnp.full(len(keys), model.config.start_token, jnp.int32)

    def draw_one(state, step):
        cache, token, is_drawable = state
        # Both halves read the code that was drawn: they share one picture.
        logits, cache = apply(cache, jnp.concatenate([token, token]), step, method="decode_step")  # (2B, V)
        cond, uncond = jnp.split(logits, 2)
        guided = sampling.guide(cond, uncond, cond_scale)
        if getattr(model.config, "guides_first_code_alone", False):
            guided = jnp.where(((step > 0) & (cond_scale != 1))[:, None], uncond, guided)
        token = sampling.sample(
            guided, step, keys, top_k, top_p, temperature, codebook_size, model.config.sampling_order
        )
        return (cache, token, is_drawable & sampling.is_drawable(guided, codebook_size)), token

    state = (cache, start_token, jnp.ones(len(keys), bool))
    steps = jnp.arange(model.config.image_length, dtype=jnp.int32)
    (_, _, is_drawable), tokens = jax.lax.scan(draw_one, state, steps)  # tokens (L, B)
    return tokens.T.astype(jnp.uint16), is_drawable


def _columns(settings: RowSettings) -> list[np.ndarray]:
    return [getattr(settings, field.name) for field in dataclasses.fields(settings)]


def _padded(rows: np.ndarray, dtype: type, count: int) -> np.ndarray:
    """`rows` as `dtype`, followed by zeros up to `count` rows. A row of zeros draws greedily."""
    rows = np.asarray(rows, dtype)
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
