"""Masked parallel decoding: every step samples all masked tokens, keeps the surest, and masks the others again.

R: rows   L: tokens of an image   V: columns of the logits

As aMUSEd's scheduler does it (`AmusedScheduler` of diffusers). The noise is this program's own, of the row's key, so a
row gives the same tokens alone and in any batch; `schema/sampling.md` specifies it.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.sampling import logits
from dm_generations.sampling.batching import RowInputs
from dm_generations.sampling.methods import RowState
from dm_generations.sampling.params import MAX_STEPS
from dm_generations.sampling.prng import threefry2x32

_PLACE_BITS = 16  # of the counter's second word: the token below the place
_CHOICE = 0x80000000  # in the counter's first word: noise of the choice of places
_LEAST_PROBABILITY = 1e-20
_KNOWN = math.log(np.finfo(np.float32).max)  # confidence in what was not masked, before noise


@dataclass(frozen=True)
class MaskedSampler:
    """Samples images of which all tokens but the initial ones are masked at first.

    It reads the first three of a row's extra settings: the number of steps, and the temperature of the choice at the
    first and at the last one. A row that has made its steps waits for the others.
    """

    columns: int
    order: str
    length: int  # L
    mask_token: int
    schedule: str  # "cosine" or "linear"

    def init_rows(self, rows: RowInputs, start_token: int) -> RowState:
        """See `Sampler`; the noise is the log-probability of each token, (R, L) float32."""
        count = len(rows.top_k)
        tokens = jnp.where(self._is_init(rows), rows.init_tokens, start_token)
        zeros = jnp.zeros((count, self.length), jnp.float32)
        return RowState(tokens, zeros[:, 0], jnp.ones(count, bool), zeros)

    def advance(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: RowState) -> RowState:
        """See `Sampler`."""
        noise = gumbel(rows.keys, step, self.length, self.columns), choice_gumbel(rows.keys, step, self.length)
        return self.advance_with_noise(guided, step, rows, last, *noise)

    def advance_with_noise(
        self,
        guided: jax.Array,
        step: jax.Array,
        rows: RowInputs,
        last: RowState,
        noise: jax.Array,
        choice_noise: jax.Array,
    ) -> RowState:
        """Advance as `advance` does, with Gumbel noise from the caller: of tokens (R, L, V), and of places (R, L)."""
        tokens, is_masked = last.token, last.token == self.mask_token
        flat, flat_noise = guided.reshape(-1, guided.shape[-1]), noise.reshape(-1, self.columns)
        top_k, top_p, heat = (jnp.repeat(each, self.length) for each in (rows.top_k, rows.top_p, rows.temperature))
        sampled = logits.sample_with_noise(flat, flat_noise, top_k, top_p, heat, self.columns, self.order)
        sampled = jnp.where(is_masked, sampled.reshape(tokens.shape), tokens)
        can_sample = logits.can_sample(flat, self.columns).reshape(tokens.shape)
        log_prob = logits.log_prob(flat, sampled.reshape(-1), self.columns).reshape(tokens.shape)
        log_probs = jnp.where(is_masked, log_prob, last.noise)

        steps = jnp.maximum(rows.extra[:, 0].astype(jnp.int32), 1)
        first, end = rows.extra[:, 1], rows.extra[:, 2]
        temperature = first + (end - first) * (step / jnp.maximum(steps - 1, 1))
        sure = jnp.maximum(log_prob, math.log(_LEAST_PROBABILITY))
        confidence = jnp.where(is_masked, sure, _KNOWN) + temperature[:, None] * choice_noise
        is_left = self._choose_masked(confidence, is_masked, steps, step) & ~self._is_init(rows)

        is_last, is_active = step == steps - 1, step < steps
        kept = jnp.where(is_left & ~is_last[:, None], self.mask_token, sampled)
        is_known = kept != self.mask_token
        return RowState(
            jnp.where(is_active[:, None], kept, tokens),
            jnp.where(is_active, jnp.where(is_known, log_probs, 0.0).sum(axis=1), last.log_prob),
            last.can_sample & (~is_active | (can_sample | ~is_masked).all(axis=1)),
            jnp.where(is_active[:, None], log_probs, last.noise),
        )

    def place(self, tokens: jax.Array, step: jax.Array, token: jax.Array) -> jax.Array:
        """See `Sampler`."""
        return token

    def _choose_masked(
        self, confidence: jax.Array, is_masked: jax.Array, steps: jax.Array, step: jax.Array
    ) -> jax.Array:
        """Return the places to mask again, (R, L) bool: those of least confidence, as many as the schedule says."""
        counts = jnp.asarray(mask_counts(self.length, self.schedule))[steps, jnp.minimum(step, MAX_STEPS - 1)]
        counts = jnp.maximum(jnp.minimum(is_masked.sum(axis=1) - 1, counts), 1)
        cut = jnp.take_along_axis(jnp.sort(confidence, axis=1), jnp.minimum(counts, self.length - 1)[:, None], axis=1)
        return confidence < cut

    def _is_init(self, rows: RowInputs) -> jax.Array:
        return jnp.arange(self.length) < rows.init_count[:, None]


@functools.cache
def mask_counts(length: int, schedule: str) -> np.ndarray:
    """Return how many of L tokens are masked after each step, (MAX_STEPS + 1, MAX_STEPS) int32, by steps and step.

    A table, because the share has to be rounded as the original does it, in float32: 8 of 12 steps leave 0.49999997.
    """
    steps = np.arange(1, MAX_STEPS + 1, dtype=np.float32)[:, None]
    ratio = np.minimum(np.arange(1, MAX_STEPS + 1, dtype=np.float32) / steps, np.float32(1))
    if schedule == "cosine":
        angle = ratio * np.float32(math.pi) / np.float32(2)
        share = np.cos(angle.astype(np.float64)).astype(np.float32)  # rounded once
    else:
        share = np.float32(1) - ratio
    counts = np.floor(np.float32(length) * np.maximum(share, 0)).astype(np.int32)
    return np.concatenate([np.zeros((1, MAX_STEPS), np.int32), counts])


def gumbel(keys: jax.Array, step: jax.Array, length: int, codebook_size: int) -> jax.Array:
    """Return noise for the tokens of a step, (R, L, codebook_size) float32, a pure function of key, step and place."""
    places = jnp.arange(length, dtype=jnp.uint32)[None, :, None] << _PLACE_BITS
    counters = places | jnp.arange(codebook_size, dtype=jnp.uint32)[None, None]
    return _gumbel(keys[:, :, None, None], jnp.asarray(step).astype(jnp.uint32), counters)


def choice_gumbel(keys: jax.Array, step: jax.Array, length: int) -> jax.Array:
    """Return noise for the choice of places at a step, (R, L) float32."""
    step = jnp.asarray(step).astype(jnp.uint32) | jnp.uint32(_CHOICE)
    return _gumbel(keys[:, :, None], step, jnp.arange(length, dtype=jnp.uint32)[None])


def _gumbel(keys: jax.Array, counter0: jax.Array, counter1: jax.Array) -> jax.Array:
    bits, _ = threefry2x32(keys[:, 0], keys[:, 1], counter0, counter1)
    return logits.gumbel_from_bits(bits)
