"""Masked parallel decoding: every step samples all masked tokens, keeps the surest, and masks the others again.

R: rows   L: tokens of an image   V: columns of the logits

As aMUSEd's scheduler does it (`AmusedScheduler` of diffusers). The noise is this program's own, of the row's key, so a
row gives the same tokens alone and in any batch; `schema/sampling.md` specifies it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.sampling import logits
from dm_generations.sampling.batching import RowInputs
from dm_generations.sampling.methods import Replayed, RowState
from dm_generations.sampling.params import MAX_STEPS
from dm_generations.sampling.prng import threefry2x32

_PLACE_BITS = 16  # of the counter's second word: the token below the place
_CHOICE = 0x80000000  # in the counter's first word: noise of the choice of places
_LEAST_PROBABILITY = 1e-20
_KNOWN = math.log(np.finfo(np.float32).max)  # confidence in what was not masked, before noise


class Sampled(NamedTuple):
    """What a step sampled, also at the places that it masked again."""

    tokens: jax.Array  # (R, L) int32
    log_probs: jax.Array  # (R, L) float32


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
        """See `Sampler`; the noise is `Sampled`."""
        count = len(rows.top_k)
        tokens = jnp.where(self._is_init(rows), rows.init_tokens, start_token)
        zeros = jnp.zeros((count, self.length), jnp.float32)
        return RowState(tokens, zeros[:, 0], jnp.ones(count, bool), Sampled(tokens, zeros))

    def advance(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: RowState) -> RowState:
        """See `Sampler`."""
        return self.advance_with_noise(guided, step, rows, last, *self._noise(step, rows))

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
        sampled = jnp.where(is_masked, self._sample(guided, noise, rows), tokens)
        log_prob = self._at_places(logits.log_prob, guided, sampled)
        log_probs = jnp.where(is_masked, log_prob, last.noise.log_probs)
        confidence = _confidence(log_prob, is_masked, choice_noise, step, rows)
        is_left = (confidence < self._least_confidence(confidence, is_masked, step, rows)) & ~self._is_init(rows)
        kept = jnp.where(is_left, self.mask_token, sampled)
        can_sample = (self._at_places(logits.can_sample, guided) | ~is_masked).all(axis=1)
        is_active, is_known = step < _step_count(rows), kept != self.mask_token
        return RowState(
            jnp.where(is_active[:, None], kept, tokens),
            jnp.where(is_active, jnp.where(is_known, log_probs, 0.0).sum(axis=1), last.log_prob),
            last.can_sample & (~is_active | can_sample),
            Sampled(
                jnp.where(is_active[:, None], sampled, last.noise.tokens),
                jnp.where(is_active[:, None], log_probs, last.noise.log_probs),
            ),
        )

    def place(self, tokens: jax.Array, step: jax.Array, last: RowState) -> jax.Array:
        """See `Sampler`; also those that the step masked again, so an unfinished image is whole."""
        return last.noise.tokens

    def measure(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: Replayed) -> Replayed:
        """See `ReplayingSampler`. At each step as many tokens stay as when sampling: those of the least margins.

        A margin is that of the token (`logits.margin`) or, if it is more, what its confidence lacks to the least one
        with which a token stays when sampling. The margin of a place is its least one over the steps.
        """
        tokens, stored, is_masked = last.token, rows.init_tokens, last.token == self.mask_token
        noise, choice_noise = self._noise(step, rows)
        confidence, own = (
            _confidence(self._at_places(logits.log_prob, guided, each), is_masked, choice_noise, step, rows)
            for each in (jnp.where(is_masked, self._sample(guided, noise, rows), tokens), stored)
        )
        least = self._least_confidence(confidence, is_masked, step, rows)
        inputs = guided, stored, noise, *self._settings(rows)
        margin = self._at_places(logits.margin_with_noise, *inputs, order=self.order)
        margin = jnp.maximum(margin, least - own)
        margin = jnp.where(self._at_places(logits.can_sample, guided), margin, jnp.nan)
        is_measured = is_masked & (step < _step_count(rows))[:, None]
        count = (is_measured & (confidence >= least)).sum(axis=1)
        rank = jnp.argsort(jnp.argsort(jnp.where(is_measured, margin, jnp.inf), axis=1), axis=1)
        return Replayed(
            jnp.where(is_measured & (rank < count[:, None]), stored, tokens),
            jnp.where(is_measured, jnp.minimum(last.margins, margin), last.margins),
        )

    def _noise(self, step: jax.Array, rows: RowInputs) -> tuple[jax.Array, jax.Array]:
        return gumbel(rows.keys, step, self.length, self.columns), choice_gumbel(rows.keys, step, self.length)

    def _sample(self, guided: jax.Array, noise: jax.Array, rows: RowInputs) -> jax.Array:
        return self._at_places(logits.sample_with_noise, guided, noise, *self._settings(rows), order=self.order)

    def _settings(self, rows: RowInputs) -> tuple[jax.Array, ...]:
        """Return top_k, top_p and temperature of each place."""
        settings = rows.top_k, rows.top_p, rows.temperature
        return tuple(jnp.broadcast_to(each[:, None], (len(each), self.length)) for each in settings)

    def _at_places(self, function: Callable[..., jax.Array], *arrays: jax.Array, **options: str) -> jax.Array:
        """Return what a function of `logits` makes of arrays (R, L, ...), each place as a row: (R, L)."""
        flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
        return function(*flat, codebook_size=self.columns, **options).reshape(-1, self.length)

    def _least_confidence(
        self, confidence: jax.Array, is_masked: jax.Array, step: jax.Array, rows: RowInputs
    ) -> jax.Array:
        """Return the least confidence of a place that stays, (R, 1): as many stay as the schedule says, at last all."""
        steps = _step_count(rows)
        counts = jnp.asarray(mask_counts(self.length, self.schedule))[steps, jnp.minimum(step, MAX_STEPS - 1)]
        counts = jnp.maximum(jnp.minimum(is_masked.sum(axis=1) - 1, counts), 1)
        counts = jnp.minimum(counts, self.length - 1)[:, None]
        least = jnp.take_along_axis(jnp.sort(confidence, axis=1), counts, axis=1)
        return jnp.where((step == steps - 1)[:, None], -jnp.inf, least)

    def _is_init(self, rows: RowInputs) -> jax.Array:
        return jnp.arange(self.length) < rows.init_count[:, None]


def _step_count(rows: RowInputs) -> jax.Array:
    return jnp.maximum(rows.extra[:, 0].astype(jnp.int32), 1)


def _confidence(
    log_prob: jax.Array, is_masked: jax.Array, choice_noise: jax.Array, step: jax.Array, rows: RowInputs
) -> jax.Array:
    """Return the confidence in tokens of these log-probabilities, (R, L) float32."""
    first, end = rows.extra[:, 1], rows.extra[:, 2]
    temperature = first + (end - first) * (step / jnp.maximum(_step_count(rows) - 1, 1))
    sure = jnp.maximum(log_prob, math.log(_LEAST_PROBABILITY))
    return jnp.where(is_masked, sure, _KNOWN) + temperature[:, None] * choice_noise


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
