"""How guided logits become a token: with this program's own noise, or as dalle-mini's own `generate` did it.

R: rows   V: columns of the logits   S: leading axes of keys   B: rows with a key each

`DalleMiniSampler` gives the tokens of dalle-mini for the same checkpoint and key. Of its behaviour
(borisdayma/dalle-mini 0.1.5 on transformers 4.25.1) it repeats:

- filters run over all V columns; ids from the codebook's size on, the end token among them, can be sampled
- at every step the key is split; the next noise has the second half
- after the end token a row is padding, starting with the end token itself, and the loop runs to the end
- a temperature of 1, a top_k of V or more and a top_p of 1 or more change nothing

One program serves any mix of settings, where dalle-mini compiled anew for each. dalle-mini calls
`jax.random.categorical` with one key for all prompts of a call. What a JAX of today gives for that key depends on its
version and flags (since 0.5, `jax_threefry_partitionable` is on and gives other numbers), so the numbers are made here,
from the same counters as JAX without that flag.

Source: JAX 0.3.25, `jax/_src/prng.py` (`threefry_seed`, `threefry_split`, `threefry_2x32`) and `jax/_src/random.py`
(`uniform`, `gumbel`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dm_generations.sampling import logits
from dm_generations.sampling.batching import RowInputs
from dm_generations.sampling.prng import threefry2x32

_MANTISSA_BITS = 23
_ONE = 0x3F800000  # the bits of 1.0
_TINY = 2.0**-126  # the smallest normal float32: stands for a uniform number of 0


class RowState(NamedTuple):
    """What a step makes of each row."""

    token: jax.Array  # which the next step reads: (R,) int32; of masked decoding all of them, (R, L)
    log_prob: jax.Array  # (R,) float32, summed over the tokens sampled so far
    can_sample: jax.Array  # (R,) bool, whether every step had a token to sample
    noise: Any  # state of the sampler: arrays of R rows


class Replayed(NamedTuple):
    """What a step of a replay makes of each row."""

    token: jax.Array  # as in `RowState`, of stored tokens
    margins: jax.Array  # (R, L) float32, by how much each missed being sampled; infinite if that is not known yet


class Sampler(Protocol):
    """How logits become tokens. Hashable: a program is compiled for each."""

    @property
    def columns(self) -> int:
        """Columns of the logits, among which is sampled."""

    def init_rows(self, rows: RowInputs, start_token: int) -> RowState:
        """Return the rows before the first step, which reads `start_token`."""

    def advance(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: RowState) -> RowState:
        """Return the rows after a step.

        Args:
            guided: Logits (R, V) float32 after guidance; of masked decoding (R, L, V).
            step: () int32.
            rows: Settings of the rows.
            last: The rows before.
        """

    def place(self, tokens: jax.Array, step: jax.Array, last: RowState) -> jax.Array:
        """Return the tokens so far, (R, L) int32, with those of a step."""


class ReplayingSampler(Sampler, Protocol):
    """One that can tell whether stored tokens are those that it samples."""

    def measure(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: Replayed) -> Replayed:
        """Return the rows after a step that samples the tokens `rows.init_tokens`; the arguments are as `advance`'s."""


class TokenSampler(ABC):
    """A sampler of one token a step, in order; subclasses sample it."""

    columns: int

    def init_rows(self, rows: RowInputs, start_token: int) -> RowState:
        """See `Sampler`."""
        count = len(rows.top_k)
        start = jnp.full(count, start_token, jnp.int32)
        return RowState(start, jnp.zeros(count, jnp.float32), jnp.ones(count, bool), self.init_noise(rows))

    def advance(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: RowState) -> RowState:
        """See `Sampler`."""
        token, can_sample, noise = self.sample(guided, step, rows, last.noise)
        is_init = step < rows.init_count
        token = jnp.where(is_init, rows.init_tokens[:, step], token)
        log_prob = jnp.where(is_init, 0.0, logits.log_prob(guided, token, self.columns))
        return RowState(token, last.log_prob + log_prob, last.can_sample & (can_sample | is_init), noise)

    def place(self, tokens: jax.Array, step: jax.Array, last: RowState) -> jax.Array:
        """See `Sampler`."""
        return tokens.at[:, step].set(last.token)

    @abstractmethod
    def init_noise(self, rows: RowInputs) -> Any:
        """Return its state before the first step: arrays of R rows."""

    @abstractmethod
    def sample(
        self, guided: jax.Array, step: jax.Array, rows: RowInputs, noise: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Sample one token of each row.

        Args:
            guided: Logits (R, V) float32 after guidance.
            step: () int32.
            rows: Settings of the rows.
            noise: The state of the sampler.

        Returns:
            Tokens (R,) int32, whether there was one to sample (R,) bool, and the state for the next step.
        """


@dataclass(frozen=True)
class GumbelSampler(TokenSampler):
    """Samples with this program's own noise, a function of the row's key, the step and the token; see `logits`."""

    columns: int
    order: str

    def init_noise(self, rows: RowInputs) -> tuple[()]:
        """See `TokenSampler`."""
        return ()

    def sample(
        self, guided: jax.Array, step: jax.Array, rows: RowInputs, noise: tuple[()]
    ) -> tuple[jax.Array, jax.Array, tuple[()]]:
        """See `TokenSampler`."""
        token = logits.sample(guided, step, *row_settings(rows), self.columns, self.order)
        return token, logits.can_sample(guided, self.columns), noise

    def measure(self, guided: jax.Array, step: jax.Array, rows: RowInputs, last: Replayed) -> Replayed:
        """See `ReplayingSampler`."""
        token = rows.init_tokens[:, step]
        margin = logits.margin(guided, token, step, *row_settings(rows), self.columns, self.order)
        margin = jnp.where(logits.can_sample(guided, self.columns), margin, jnp.nan)
        return Replayed(token, last.margins.at[:, step].set(margin))


def row_settings(rows: RowInputs) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return keys, top_k, top_p and temperature of the rows, as `logits.sample` takes them."""
    return rows.keys, rows.top_k, rows.top_p, rows.temperature


def make_sampler(config: Any, codebook_size: int, is_dalle_mini: bool) -> Sampler:
    """Return the sampler of a text-to-image model.

    Args:
        config: Of the model.
        codebook_size: Only tokens below it are sampled.
        is_dalle_mini: Whether to sample as dalle-mini's `generate` does.
    """
    if is_dalle_mini:
        return DalleMiniSampler(config.image_vocab_size + 1, config.eos_token_id, config.pad_token_id)
    if schedule := getattr(config, "masking_schedule", None):
        from dm_generations.sampling.masked import MaskedSampler

        places = config.image_length, config.start_token
        return MaskedSampler(codebook_size, config.sampling_order, *places, schedule)
    return GumbelSampler(codebook_size, config.sampling_order)


class Noise(NamedTuple):
    """State of the sampler."""

    keys: jax.Array  # (R, 2) uint32, each row a call of its own with one prompt; or (2,), one call with R prompts
    has_ended: jax.Array  # (R,) bool


@dataclass(frozen=True)
class DalleMiniSampler(TokenSampler):
    """A sampler for the loop.

    A row with a key of its own does not depend on the others; a row of one call does, through the shape of the noise.
    """

    columns: int  # all of the logits: V
    end_token: int  # `eos_token_id` of config.json
    pad_token: int  # `pad_token_id`

    def init_noise(self, rows: RowInputs) -> Noise:
        """See `TokenSampler`."""
        return Noise(rows.keys, jnp.zeros(len(rows.top_k), bool))

    def sample(
        self, guided: jax.Array, step: jax.Array, rows: RowInputs, noise: Noise
    ) -> tuple[jax.Array, jax.Array, Noise]:
        """See `TokenSampler`."""
        keys, next_keys = split(noise.keys)
        is_one_call = keys.ndim == 1
        gumbel = call_gumbel(keys, len(guided), self.columns) if is_one_call else row_gumbel(keys, self.columns)
        token = logits.sample_with_noise(guided, gumbel, rows.top_k, rows.top_p, rows.temperature, self.columns)
        can_sample = noise.has_ended | logits.can_sample(guided, self.columns)
        has_ended = noise.has_ended | (token == self.end_token)
        token = jnp.where(has_ended, self.pad_token, token)  # the end token itself too
        return token, can_sample, Noise(next_keys, has_ended)


def split(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both halves of `jax.random.split(key)`, each (S, 2) uint32, of keys (S, 2) uint32.

    `generate` carries a key from step to step: the first half makes the noise, the second is the next step's key.
    """
    words = _hashed(keys, 4)
    return words[..., :2], words[..., 2:]


def call_gumbel(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Noise (rows, columns) float32 of one call with several prompts: `jax.random.gumbel(key, (rows, columns))`.

    key: (2,) uint32. Every number depends on the size of the whole.
    """
    return _gumbel(_hashed(key, rows * columns)).reshape(rows, columns)


def row_gumbel(keys: jax.Array, columns: int) -> jax.Array:
    """Noise (B, columns) float32 of B calls with one prompt each, of which row i has keys[i]; keys: (B, 2) uint32."""
    return _gumbel(_hashed(keys, columns))


def _hashed(keys: jax.Array, size: int) -> jax.Array:
    """Words (S, size) uint32: Threefry of the counters 0 to size - 1, of which the halves are paired.

    With an odd size a 0 is appended to the counters, and its word is left out.
    """
    half = (size + 1) // 2
    low = jnp.arange(half, dtype=jnp.uint32)
    high = jnp.where(low + half < size, low + half, 0).astype(jnp.uint32)
    words = threefry2x32(keys[..., 0:1], keys[..., 1:2], *(_like(counters, keys) for counters in (low, high)))
    return jnp.concatenate(words, axis=-1)[..., :size]


def _like(counters: jax.Array, keys: jax.Array) -> jax.Array:
    """`counters` (n,) with as many axes as keys (S, 2)."""
    return counters.reshape(*[1] * (keys.ndim - 1), -1)


def _gumbel(bits: jax.Array) -> jax.Array:
    """Bits uint32 to standard Gumbel noise float32 of the same shape, from -4.47 to 15.94."""
    ones = (bits >> (32 - _MANTISSA_BITS)) | jnp.uint32(_ONE)
    uniform = jax.lax.bitcast_convert_type(ones, jnp.float32) - 1.0  # [0, 1)
    return -jnp.log(-jnp.log(jnp.maximum(uniform, _TINY)))
