"""What tests of the token models share: generations of recorded tokens, and tokens drawn with recorded noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dm_generations.sampling import logits as sampling


@functools.partial(jax.jit, static_argnums=0)
def stepped(model, params, input_ids, attention_mask, tokens):
    """The logits (B, L, V) of a generation that samples `tokens` (B, L)."""
    apply = functools.partial(model.apply, {"params": params})

    def step(state, inputs):
        cache, token = state
        token_after, number = inputs
        logits, cache = apply(cache, token, number, method="decode_step")
        return (cache, token_after), logits

    cache = apply(apply(input_ids, attention_mask, method="encode_prompt"), method="init_cache")
    steps = jnp.arange(tokens.shape[1])
    return jax.lax.scan(step, (cache, jnp.zeros_like(tokens[:, 0])), (tokens.T, steps))[1].swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="columns")
def _sampled(logits, noise, top_k, top_p, temperature, columns):
    return sampling.sample_with_noise(logits, noise, top_k, top_p, temperature, columns)


def sampled(guided, exponential, top_k: int, top_p: float, temperature: float) -> np.ndarray:
    """The tokens (B, L) of guided logits (B, L, V), with recorded noise (B, L, V) of the exponential distribution."""
    rows = np.asarray(guided).reshape(-1, guided.shape[-1])
    noise = -np.log(exponential.reshape(rows.shape))
    values = ((top_k, np.int32), (top_p, np.float32), (temperature, np.float32))
    columns = [np.full(len(rows), value, dtype) for value, dtype in values]
    return np.asarray(_sampled(rows, noise, *columns, columns=rows.shape[1])).reshape(guided.shape[:2])


def tolerance(checkpoint) -> float:
    """How far logits may be from those of the original: further for weights of a trimmed copy in 16 bits."""
    leaf = jax.tree.leaves(checkpoint.params)[0]
    return 1e-4 if leaf.dtype.itemsize == 4 else 0.05
