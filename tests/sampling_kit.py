"""The sampling function, compiled once for all tests, and the distribution that it must follow."""

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.sampling import logits as sampling

SAMPLE = jax.jit(sampling.sample, static_argnames=("codebook_size", "order"))
FILTER = jax.jit(sampling.filter_logits, static_argnames=("codebook_size", "order"))
LOG_PROB = jax.jit(sampling.log_prob, static_argnames="codebook_size")
GUMBEL = jax.jit(sampling.gumbel, static_argnames="codebook_size")
OFF = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


def settings_arrays(row_count, top_k=0, top_p=1.0, temperature=1.0):
    """Keyword arguments for `sample` and `filter_logits`; each value is one number or one per row."""

    def column(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (row_count,)))

    return {
        "top_k": column(top_k, np.int32),
        "top_p": column(top_p, np.float32),
        "temperature": column(temperature, np.float32),
    }


def sample_tokens(logits, keys=None, step=0, codebook_size=None, order="temperature_first", **settings):
    """Tokens (B,) of rows of `logits`; one row is shared by all keys."""
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    keys = np.zeros((len(logits), 2), np.uint32) if keys is None else keys
    logits = jnp.asarray(np.broadcast_to(logits, (len(keys), logits.shape[1])))
    size = codebook_size or logits.shape[1]
    arrays = settings_arrays(len(keys), **settings)
    fixed = {"codebook_size": size, "order": order}
    return np.asarray(SAMPLE(logits, jnp.int32(step), jnp.asarray(keys), **fixed, **arrays))


def keep(logits, codebook_size=None, order="temperature_first", **settings):
    """Which tokens of one row of logits the filters leave, as a list."""
    logits = jnp.asarray(np.atleast_2d(np.asarray(logits, np.float32)))
    size = codebook_size or logits.shape[1]
    filtered = FILTER(logits, codebook_size=size, order=order, **settings_arrays(len(logits), **settings))
    return np.flatnonzero(np.isfinite(np.asarray(filtered)[0])).tolist()


def reference_distribution(logits, top_k, top_p, temperature, order="temperature_first"):
    """Exact probabilities in float64, by sorting: the definition, not the way it is computed."""
    tempered = np.asarray(logits, np.float64) / temperature
    weighed = tempered if order == "temperature_first" else np.asarray(logits, np.float64)
    kept = np.argsort(-tempered, kind="stable")  # best first
    if order == "temperature_first":
        kept = kept[: top_k or None]
    weights = np.exp(weighed[kept] - weighed.max())
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    kept = kept[before < top_p] if top_p < 1 else kept
    kept = kept[: top_k or None]
    result = np.zeros(len(tempered))
    result[kept] = np.exp(tempered[kept] - tempered.max())
    return result / result.sum()
