"""dalle-mini's own `generate`, compiled whole: the tokens that it draws from a checkpoint and a JAX key.

B: rows   T: text tokens   L: tokens of a picture   V: columns of the logits, image_vocab_size + 1

Unlike our own sampling it draws from all V columns, also those that are no code of the codebook (rows above the
codebook, the start token), and it has an end: once a row draws the end token, the rest of it is padding. DALL-E mini's
end token lies above its columns; mega's can be drawn. An archive holds codes alone, so the caller says what becomes of
a row with other ids.

Source: borisdayma/dalle-mini f0be4de, `src/dalle_mini/model/modeling.py` (`generate`, `_sample`), and transformers
4.25.1, `generation/flax_utils.py` and `flax_logits_process.py`.
"""

import functools

import jax
import jax.numpy as jnp

from dm_generations import sampling
from dm_generations.dalle_mini_rng import call_gumbel, row_gumbel, split
from dm_generations.generate.row_inputs import RowInputs
from dm_generations.models.dalle_bart import DalleBart
from dm_generations.models.placement import computable


# The model is static, so all calls with one configuration share their compiled programs.
@functools.partial(jax.jit, static_argnums=0)
def draw_tokens_dalle_mini(
    model: DalleBart,
    params: dict,
    rows: RowInputs,
    end_token: jax.Array,
    pad_token: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Ids int32 (B, L) from 0 to V - 1 or `pad_token`, and for each row whether every step had one to draw, bool (B,).

    rows.keys: (B, 2) uint32, each row a call of its own with one prompt; or (2,), one call with B prompts
    end_token, pad_token: () int32, `eos_token_id` and `pad_token_id` of config.json
    A row of (B, 2) keys does not depend on the others; a row of one call does, through the shape of the noise.
    """
    apply = functools.partial(model.apply, {"params": computable(params, model.dtype)})
    cache = apply(rows.input_ids, rows.attention_mask, method="begin")
    count = len(rows.top_k)

    def draw_one(state, step):
        cache, token, keys, has_ended, is_drawable = state
        logits, cache = apply(cache, jnp.concatenate([token, token]), step, method="decode_step")  # (2B, V)
        guided = sampling.guide(*jnp.split(logits, 2), rows.cond_scale)
        columns = guided.shape[1]
        keys, next_keys = split(keys)
        noise = call_gumbel(keys, count, columns) if keys.ndim == 1 else row_gumbel(keys, columns)
        token = sampling.draw(guided, noise, rows.top_k, rows.top_p, rows.temperature, columns)
        is_drawable &= has_ended | sampling.is_drawable(guided, columns)
        has_ended |= token == end_token
        token = jnp.where(has_ended, pad_token, token)  # the end token itself too
        return (cache, token, next_keys, has_ended, is_drawable), token

    start_token = jnp.full(count, model.config.start_token, jnp.int32)
    state = (cache, start_token, rows.keys, jnp.zeros(count, bool), jnp.ones(count, bool))
    steps = jnp.arange(model.config.image_length, dtype=jnp.int32)
    (*_, is_drawable), tokens = jax.lax.scan(draw_one, state, steps)  # tokens (L, B)
    return tokens.T, is_drawable
