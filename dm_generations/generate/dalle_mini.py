"""Sampling as dalle-mini's own `generate` does it, with its noise: the same tokens for the same checkpoint and key.

Of its behaviour (borisdayma/dalle-mini 0.1.5 on transformers 4.25.1) this repeats:

- filters run over all V columns; ids from the codebook's size on, the end token among them, can be sampled
- at every step the key is split; the next noise has the second half
- after the end token a row is padding, starting with the end token itself, and the loop runs to the end
- a temperature of 1, a top_k of V or more and a top_p of 1 or more change nothing

One program serves any mix of settings, where dalle-mini compiled anew for each.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dm_generations import sampling
from dm_generations.dalle_mini_rng import call_gumbel, row_gumbel, split
from dm_generations.generate.row_inputs import RowInputs


class Noise(NamedTuple):
    """State of the sampler."""

    keys: jax.Array  # (R, 2) uint32, each row a call of its own with one prompt; or (2,), one call with R prompts
    has_ended: jax.Array  # (R,) bool


@dataclass(frozen=True)
class DalleMiniSampler:
    """A sampler for the loop.

    A row with a key of its own does not depend on the others; a row of one call does, through the shape of the noise.
    """

    columns: int  # all of the logits: V
    end_token: int  # `eos_token_id` of config.json
    pad_token: int  # `pad_token_id`

    def init_noise(self, rows: RowInputs) -> Noise:
        return Noise(rows.keys, jnp.zeros(len(rows.top_k), bool))

    def sample(self, guided, step, rows, noise):
        keys, next_keys = split(noise.keys)
        is_one_call = keys.ndim == 1
        gumbel = call_gumbel(keys, len(guided), self.columns) if is_one_call else row_gumbel(keys, self.columns)
        token = sampling.draw(guided, gumbel, rows.top_k, rows.top_p, rows.temperature, self.columns)
        is_drawable = noise.has_ended | sampling.is_drawable(guided, self.columns)
        has_ended = noise.has_ended | (token == self.end_token)
        token = jnp.where(has_ended, self.pad_token, token)  # the end token itself too
        return token, is_drawable, Noise(next_keys, has_ended)
