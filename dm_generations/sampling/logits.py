"""Logits to the next token: guidance, filters and sampling, each row with settings and a key of its own.

B: rows of the batch   V: columns of the logits, of which the first `codebook_size` are tokens

Settings are arrays over rows, so one compiled function serves every mix of them. Rows do not depend on each other:
a row's token is a function of its own logits, settings, key and step. The noise is `threefry2x32` of the row's key at
counter (step, token); `schema/sampling.md` says how its bits become a Gumbel number.

Rare cases: a logit that is NaN is never sampled. Of equal logits the lower token comes first: top_k keeps exactly k,
top_p stops inside a tie, a greedy row takes the lowest. top_k 0 and top_k of codebook_size or more are off, top_p of 1
or more is off, and however small top_p is, the best token stays. Temperature 0 is greedy; so is one so small that the
tempered logits overflow float32. A row without a finite logit gives token 0; `can_sample` finds such
rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dm_generations.sampling.prng import threefry2x32

__all__ = [
    "ORDERS",
    "SAMPLER_VERSION",
    "can_sample",
    "filter_logits",
    "guide",
    "gumbel",
    "gumbel_from_bits",
    "log_prob",
    "margin",
    "margin_with_noise",
    "sample",
    "sample_with_noise",
]

# In which the filters are applied: temperature, top_k, top_p (DALL-E mini, minDALL-E, DALLE-pytorch), or top_p on the
# logits as they are, top_k, temperature (the DALL-3 fork).
ORDERS = ("temperature_first", "top_p_first")
SAMPLER_VERSION = 1  # stored with each row; raise it when the same key would give other tokens

_HIGHEST_UNIFORM = 1 - 2.0**-24  # the largest float32 below 1
_SIGN = 0x80000000


def guide(cond: jax.Array, uncond: jax.Array, cond_scale: jax.Array) -> jax.Array:
    """Combine conditional and unconditional logits (classifier-free guidance, "super conditioning").

    As in dalle-mini's `generate`: uncond + scale * (cond - uncond); exactly `cond` at scale 1.

    Args:
        cond: (B, V) float32, under the prompts.
        uncond: (B, V) float32, under the unconditional prompts.
        cond_scale: (B,) float32.

    Returns:
        (B, V) float32.
    """
    scale = cond_scale[:, None]
    return jnp.where(scale == 1, cond, uncond + scale * (cond - uncond))


def gumbel(keys: jax.Array, step: jax.Array, codebook_size: int) -> jax.Array:
    """Return standard Gumbel noise, a pure function of key, step and token.

    Args:
        keys: (B, 2) uint32.
        step: () int32, 0 for the first token of an image.
        codebook_size: Number of tokens.

    Returns:
        (B, codebook_size) float32, finite, from -2.82 to 22.88.
    """
    tokens = jnp.arange(codebook_size, dtype=jnp.uint32)[None, :]
    steps = jnp.asarray(step).astype(jnp.uint32).reshape(1, 1)
    bits, _ = threefry2x32(keys[:, 0:1], keys[:, 1:2], steps, tokens)  # (B, codebook_size)
    return gumbel_from_bits(bits)


def gumbel_from_bits(bits: jax.Array) -> jax.Array:
    """Map words of 32 random bits, uint32 of any shape, to standard Gumbel noise float32."""
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
    """Sample one token for each row: the largest of its filtered logits plus noise.

    Args:
        logits: (B, V) float32, guided.
        step: () int32.
        keys: (B, 2) uint32.
        top_k: (B,) int32.
        top_p: (B,) float32.
        temperature: (B,) float32.
        codebook_size: Only tokens below it are sampled.
        order: One of ORDERS.

    Returns:
        (B,) int32 in [0, codebook_size).
    """
    noise = gumbel(keys, step, min(logits.shape[1], codebook_size))
    return sample_with_noise(logits, noise, top_k, top_p, temperature, codebook_size, order)


def sample_with_noise(
    logits: jax.Array,
    noise: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """Sample as `sample` does, with Gumbel noise (B, min(V, codebook_size)) float32 from the caller."""
    logits = _codebook_logits(logits, codebook_size)
    is_greedy = _is_greedy(logits, temperature)

    def best():
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    def winner():
        # A greedy row needs no filter; without this the batch would go through one for nothing.
        settings = jnp.where(is_greedy, 0, top_k), jnp.where(is_greedy, 1.0, top_p), temperature
        perturbed = filter_logits(logits, *settings, codebook_size, order) + noise
        return jnp.argmax(jnp.where(is_greedy[:, None], logits, perturbed), axis=1).astype(jnp.int32)

    # As an operand of `cond` the noise is computed before, by a loop over vectors. Computed inside `argmax`, number by
    # number, it would take 6 times as long on a CPU.
    return jax.lax.cond(is_greedy.all(), best, winner)


def margin(
    logits: jax.Array,
    tokens: jax.Array,
    step: jax.Array,
    keys: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """Return by how much tokens missed being sampled, in units of tempered logits; 0 for the one that is sampled.

    A token that a filter removes misses by its distance to the lowest logit that is kept, if that is more. Rows made on
    other hardware differ by rounding alone, so their margins are small.

    Args:
        logits: (B, V) float32, guided.
        tokens: (B,) int32.
        step: () int32; this and the other arguments are those of `sample`.
        keys: (B, 2) uint32.
        top_k: (B,) int32.
        top_p: (B,) float32.
        temperature: (B,) float32.
        codebook_size: Number of tokens.
        order: One of ORDERS.

    Returns:
        (B,) float32.
    """
    noise = gumbel(keys, step, min(logits.shape[1], codebook_size))
    return margin_with_noise(logits, tokens, noise, top_k, top_p, temperature, codebook_size, order)


def margin_with_noise(
    logits: jax.Array,
    tokens: jax.Array,
    noise: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    temperature: jax.Array,
    codebook_size: int,
    order: str = "temperature_first",
) -> jax.Array:
    """Return what `margin` does, with Gumbel noise (B, min(V, codebook_size)) float32 from the caller."""
    logits = _codebook_logits(logits, codebook_size)
    is_greedy = _is_greedy(logits, temperature)[:, None]
    filtered = filter_logits(logits, top_k, top_p, temperature, codebook_size, order)
    noise = jnp.where(is_greedy, 0.0, noise)
    tempered = logits / jnp.where(is_greedy, 1.0, temperature[:, None])
    best = (jnp.where(is_greedy, logits, filtered) + noise).max(axis=1)
    lowest_kept = jnp.where(is_greedy | jnp.isneginf(filtered), jnp.inf, filtered).min(axis=1)
    own, own_noise = (jnp.take_along_axis(x, tokens[:, None], axis=1)[:, 0] for x in (tempered, noise))
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
    """Apply temperature, top_k and top_p.

    Each filter works on what the one before it left. Greedy rows have a temperature of 1 here.

    Args:
        logits: (B, V) float32, guided.
        top_k: (B,) int32.
        top_p: (B,) float32.
        temperature: (B,) float32.
        codebook_size: Number of tokens.
        order: One of ORDERS.

    Returns:
        (B, min(V, codebook_size)) float32, -inf for tokens that a filter removes.

    Raises:
        ValueError: The order is unknown.
    """
    logits = _codebook_logits(logits, codebook_size)
    divisor = jnp.where(_is_greedy(logits, temperature), 1.0, temperature)[:, None]
    if order == "temperature_first":
        logits = logits / divisor
        logits = jnp.where(keep_top_k(logits, top_k), logits, -jnp.inf)
        return jnp.where(keep_top_p(logits, top_p), logits, -jnp.inf)
    if order == "top_p_first":
        logits = jnp.where(keep_top_p(logits, top_p), logits, -jnp.inf)
        logits = jnp.where(keep_top_k(logits, top_k), logits, -jnp.inf)
        return logits / divisor
    raise ValueError(f"order is {order!r}, not one of {', '.join(ORDERS)}")


def log_prob(logits: jax.Array, tokens: jax.Array, codebook_size: int) -> jax.Array:
    """Return the natural log-probability of tokens under the softmax of the logits.

    The softmax is over the codebook, before temperature, top_k and top_p, so that images of different settings can be
    compared. Where logits are infinite, the tokens that have them share the probability.

    Args:
        logits: (B, V) float32, guided.
        tokens: (B,) int32.
        codebook_size: Number of tokens.

    Returns:
        (B,) float32; -inf for a token that cannot be sampled: its logit is NaN or -inf, or it is not in the codebook.
    """
    logits = _codebook_logits(logits, codebook_size)
    best = logits.max(axis=1, keepdims=True)
    shifted = jnp.where(logits == best, 0.0, logits - best)  # inf - inf would be NaN
    shifted = jnp.where(jnp.isneginf(logits), -jnp.inf, shifted)  # a row without a number
    own = jnp.take_along_axis(shifted, tokens[:, None], axis=1, mode="fill", fill_value=-jnp.inf)[:, 0]
    return own - jnp.log(jnp.maximum(jnp.exp(shifted).sum(axis=1), 1.0))


def can_sample(logits: jax.Array, codebook_size: int) -> jax.Array:
    """Return whether each row has a token to sample, (B,) bool. A broken checkpoint gives only NaN."""
    return (_codebook_logits(logits, codebook_size) > -jnp.inf).any(axis=1)


def _codebook_logits(logits: jax.Array, codebook_size: int) -> jax.Array:
    logits = logits[:, :codebook_size]
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _is_greedy(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """(B,) bool. Where the best logit over the temperature overflows, the limit of temperature 0 is taken."""
    return (temperature == 0) | ~jnp.isfinite(logits.max(axis=1) / temperature)


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Return (B, V) bool, exactly top_k true in a row; of equal logits the lower token comes first."""
    token_count = logits.shape[1]
    is_on = (top_k > 0) & (top_k < token_count)

    def keep():
        count = jnp.where(is_on, top_k, token_count)[:, None]
        order = to_sortable(logits)
        threshold = _count_threshold(order, count)
        is_above, is_tied = order > threshold, order == threshold
        places = count - _count(is_above)
        return is_above | (is_tied & (_ties_before(is_tied, (_count(is_tied) > places).any()) < places))

    return jax.lax.cond(is_on.any(), keep, lambda: jnp.ones(logits.shape, bool))


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return (B, V) bool, true where the tokens that come before weigh less than top_p of the row; -inf weighs 0."""
    is_off = (top_p >= 1)[:, None]

    def keep():
        best = logits.max(axis=1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(best), best, 0.0))
        target = top_p[:, None] * weights.sum(axis=1, keepdims=True)
        target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)  # the best token stays although top_p underflows
        order = to_sortable(logits)

        def weigh(is_counted):
            return jnp.where(is_counted, weights, 0.0).sum(axis=1, keepdims=True)

        threshold = _weight_threshold(order, lambda candidate: weigh(order >= candidate) >= target)
        is_above, is_tied = order > threshold, order == threshold
        ties_before = _ties_before(is_tied, (~is_off & (_count(is_tied) > 1)).any()).astype(jnp.float32)
        weight_before = weigh(is_above) + ties_before * weights
        return is_above | (is_tied & (weight_before < target)) | is_off

    return jax.lax.cond(is_off.all(), lambda: jnp.ones(logits.shape, bool), keep)


def to_sortable(values: jax.Array) -> jax.Array:
    """Return float32 as uint32 in the same order: a sign bit flipped, or all bits of a negative number; -0 as 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(_SIGN)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _ties_before(is_tied: jax.Array, is_needed: jax.Array) -> jax.Array:
    """(B, V) int32, how many tokens of lower number are tied; 0 if it is not needed, () bool.

    On a CPU the running sum takes longer than all else of a filter, and ties at its edge are rare.
    """
    return jax.lax.cond(
        is_needed,
        lambda: jnp.cumsum(is_tied, axis=1, dtype=jnp.int32) - is_tied,
        lambda: jnp.zeros(is_tied.shape, jnp.int32),
    )


def _count_threshold(order: jax.Array, count: jax.Array) -> jax.Array:
    """The largest threshold (B, 1) uint32 that `count` (B, 1) values of each row reach, two bits at a time.

    16 passes over the row, each of which counts for three candidates. On a CPU a sort of 64 rows of 16,384 takes 200
    times as long, `lax.top_k` of 256 takes 10 times as long.
    """

    def set_bits(index, threshold):
        low = jnp.uint32(_SIGN >> 1) >> (2 * index).astype(jnp.uint32)
        candidates = [threshold + digit * low for digit in map(jnp.uint32, (1, 2, 3))]
        is_counted = tuple((order >= candidate).astype(jnp.int32) for candidate in candidates)
        counts = jax.lax.reduce(
            is_counted, (jnp.int32(0),) * 3, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,)
        )
        digit = sum((reached[:, None] >= count).astype(jnp.uint32) for reached in counts)
        return threshold + digit * low

    return jax.lax.fori_loop(0, 16, set_bits, jnp.zeros(count.shape, jnp.uint32))


def _weight_threshold(order: jax.Array, is_reached: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold (B, 1) uint32 for which `is_reached` (non-increasing in it) holds, bit by bit.

    32 passes over the row. More candidates in one pass would add the weights in another order: the sums would be
    rounded otherwise, and now and then a row would keep one token more or less.
    """

    def set_bit(index, threshold):
        candidate = threshold | (jnp.uint32(_SIGN) >> index.astype(jnp.uint32))
        return jnp.where(is_reached(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((order.shape[0], 1), jnp.uint32))


def _count(is_counted: jax.Array) -> jax.Array:
    return is_counted.sum(axis=1, keepdims=True, dtype=jnp.int32)
