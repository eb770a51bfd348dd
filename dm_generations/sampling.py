"""Logits to the next code: guidance, filters and a draw, each row with settings and a key of its own.

B: rows of the batch   V: columns of the logits, of which the first `codebook_size` are real codes

Settings are arrays over rows, so one compiled function serves every mix of them. Rows do not see each other:
a row's code depends on its own logits, settings, key and step alone. The noise is `threefry2x32` of the row's
key at counter (step, code); `schema/sampling.md` writes down how its bits become a Gumbel number.

What the rare cases mean: a logit that is NaN is never drawn. Of equal logits the lower code comes first:
top_k keeps exactly k, top_p stops inside a tie, a greedy draw takes the lowest. top_k 0 and top_k of
codebook_size or more are off, top_p of 1 or more is off, and however small top_p is, the best code stays.
Temperature 0 is greedy; so is one so small that the tempered logits overflow float32. A row without a number
to draw from gives code 0: the caller tells such rows by `is_drawable`.
"""

import jax
import jax.numpy as jnp

from dm_generations.threefry import row_key, threefry2x32

__all__ = [
    "ORDERS",
    "SAMPLER_VERSION",
    "draw",
    "filter_logits",
    "guide",
    "gumbel",
    "is_drawable",
    "margin",
    "row_key",
    "sample",
]

# In which the filters are applied: temperature, top_k, top_p (DALL-E mini, minDALL-E, DALLE-pytorch), or top_p on the
# logits as they are, top_k, temperature (the DALL-3 fork).
ORDERS = ("temperature_first", "top_p_first")
SAMPLER_VERSION = 1  # stored with each row; raise it when the same key would draw other codes

_HIGHEST_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1
_SIGN = 0x80000000


def guide(cond: jax.Array, uncond: jax.Array, cond_scale: jax.Array) -> jax.Array:
    """Super conditioned logits (B, V) float32 from both halves (B, V) float32; exactly `cond` at scale 1.

    cond_scale: (B,) float32. As in dalle-mini's `generate`: uncond + scale * (cond - uncond).
    """
    scale = cond_scale[:, None]
    return jnp.where(scale == 1, cond, uncond + scale * (cond - uncond))


def gumbel(keys: jax.Array, step: jax.Array, codebook_size: int) -> jax.Array:
    """Standard Gumbel noise (B, codebook_size) float32, a pure function of key, step and code.

    keys: (B, 2) uint32   step: () int32, 0 for the first code of a picture. Finite: from -2.82 to 22.88.
    """
    codes = jnp.arange(codebook_size, dtype=jnp.uint32)[None, :]
    steps = jnp.asarray(step).astype(jnp.uint32).reshape(1, 1)
    bits, _ = threefry2x32(keys[:, 0:1], keys[:, 1:2], steps, codes)  # (B, codebook_size)
    # The uniform is fine near 0, where -log(-log1p(-w)) is large: the noise that wins is the best resolved.
    uniform = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, _HIGHEST_UNIFORM)
    return -jnp.log(-jnp.log1p(-uniform))


def sample(
    logits: jax.Array,
    step: jax.Array,
    keys: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """One code for each row, (B,) int32 in [0, codebook_size): the winner of filtered logits plus noise.

    logits: (B, V) float32, guided   step: () int32   keys: (B, 2) uint32
    top_k: (B,) int32   top_p, temperature: (B,) float32   order: one of ORDERS
    """
    noise = gumbel(keys, step, min(logits.shape[1], codebook_size))
    return draw(logits, noise, top_k, top_p, temperature, codebook_size, order)


def draw(
    logits: jax.Array,
    noise: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """`sample` with Gumbel noise (B, min(V, codebook_size)) float32 that the caller made."""
    logits = _real_codes(logits, codebook_size)
    drawn = filter_logits(logits, top_k, top_p, temperature, codebook_size, order) + noise
    scores = jnp.where(_is_greedy(logits, temperature)[:, None], logits, drawn)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def margin(
    logits: jax.Array,
    codes: jax.Array,
    step: jax.Array,
    keys: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """By how much `codes` (B,) int32 missed being drawn, (B,) float32 in units of tempered logits; 0 for the winner.

    A code that a filter removes misses by its distance to the lowest logit that is kept, if that is more. The other
    arguments as in `sample`. Rows made on other hardware differ by rounding alone, so their margins are small.
    """
    logits = _real_codes(logits, codebook_size)
    is_greedy = _is_greedy(logits, temperature)[:, None]
    filtered = filter_logits(logits, top_k, top_p, temperature, codebook_size, order)
    noise = jnp.where(is_greedy, 0.0, gumbel(keys, step, logits.shape[1]))
    tempered = logits / jnp.where(is_greedy, 1.0, temperature[:, None])
    best = (jnp.where(is_greedy, logits, filtered) + noise).max(axis=1)
    lowest_kept = jnp.where(is_greedy | jnp.isneginf(filtered), jnp.inf, filtered).min(axis=1)
    own, own_noise = (jnp.take_along_axis(x, codes[:, None], axis=1)[:, 0] for x in (tempered, noise))
    below = jnp.where(jnp.isinf(lowest_kept), 0.0, lowest_kept - own)
    return jnp.maximum(jnp.maximum(best - (own + own_noise), below), 0.0)


def filter_logits(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """Tempered logits (B, min(V, codebook_size)) float32, -inf where top_k or top_p removes a code.

    Each filter works on what the one before it left. Arguments as in `sample`; rows that draw greedily are
    tempered by 1.
    """
    logits = _real_codes(logits, codebook_size)
    divisor = jnp.where(_is_greedy(logits, temperature), 1.0, temperature)[:, None]
    if order == "temperature_first":
        logits = logits / divisor
        logits = jnp.where(_keep_top_k(logits, top_k), logits, -jnp.inf)
        return jnp.where(_keep_top_p(logits, top_p), logits, -jnp.inf)
    if order == "top_p_first":
        logits = jnp.where(_keep_top_p(logits, top_p), logits, -jnp.inf)
        logits = jnp.where(_keep_top_k(logits, top_k), logits, -jnp.inf)
        return logits / divisor
    raise ValueError(f"order is {order!r}, not one of {', '.join(ORDERS)}")


def is_drawable(logits: jax.Array, codebook_size: int) -> jax.Array:
    """(B,) bool: whether a row holds a code that can be drawn at all (a broken checkpoint gives only NaN)."""
    return (_real_codes(logits, codebook_size) > -jnp.inf).any(axis=1)


def _real_codes(logits: jax.Array, codebook_size: int) -> jax.Array:
    logits = logits[:, :codebook_size]
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _is_greedy(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """(B,) bool. Where the best logit over the temperature overflows, the limit of temperature 0 is taken."""
    return (temperature == 0) | ~jnp.isfinite(logits.max(axis=1) / temperature)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """(B, V) bool, exactly top_k true in a row; the lower code first among equals."""
    code_count = logits.shape[1]
    count = jnp.where((top_k > 0) & (top_k < code_count), top_k, code_count)
    order = _sortable(logits)
    threshold = _bisect(order, lambda candidate: _count(order >= candidate) >= count[:, None])
    is_above, is_tied = order > threshold, order == threshold
    tie_rank = jnp.cumsum(is_tied, axis=1, dtype=jnp.int32)  # 1 for the first of the tied codes
    return is_above | (is_tied & (tie_rank <= count[:, None] - _count(is_above)))


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """(B, V) bool, true where the codes that come before weigh less than top_p of the row; -inf weighs 0."""
    best = logits.max(axis=1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(best), best, 0.0))
    target = top_p[:, None] * weights.sum(axis=1, keepdims=True)
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)  # the best code stays although top_p underflows
    order = _sortable(logits)

    def weigh(is_counted):
        return jnp.where(is_counted, weights, 0.0).sum(axis=1, keepdims=True)

    threshold = _bisect(order, lambda candidate: weigh(order >= candidate) >= target)
    is_above, is_tied = order > threshold, order == threshold
    ties_before = (jnp.cumsum(is_tied, axis=1, dtype=jnp.int32) - 1).astype(jnp.float32)
    weight_before = weigh(is_above) + ties_before * weights
    return is_above | (is_tied & (weight_before < target)) | (top_p >= 1)[:, None]


def _sortable(values: jax.Array) -> jax.Array:
    """float32 to uint32 in the same order: a sign bit flipped, or all bits of a negative number; -0 as 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(_SIGN)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _bisect(order: jax.Array, is_reached) -> jax.Array:
    """The largest threshold (B, 1) uint32 for which `is_reached` (non-increasing in it) holds, bit by bit.

    32 passes over the row. A sort of 32 rows of 16,384 takes 25 times as long on a CPU, for the same answer.
    """

    def set_bit(index, threshold):
        candidate = threshold | (jnp.uint32(_SIGN) >> index.astype(jnp.uint32))
        return jnp.where(is_reached(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((order.shape[0], 1), jnp.uint32))


def _count(is_counted: jax.Array) -> jax.Array:
    return is_counted.sum(axis=1, keepdims=True, dtype=jnp.int32)
