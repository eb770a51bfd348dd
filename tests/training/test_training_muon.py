"""Muon, as the trainers of CLIP, DalleBart and the VQGAN use it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.common import MUON_RMS, MUON_STEPS, NEWTON_SCHULZ, muon, orthogonalised


def exactly(matrix):
    """The iteration on the singular values, in float64."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    values = values / max(np.linalg.norm(values), 1e-8)
    a, b, c = NEWTON_SCHULZ
    for _ in range(MUON_STEPS):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (150, 16)])
def test_singular_values_are_those_of_the_iteration(shape):
    # Three: devices share them out. One of no size, and one whose columns differ a thousandfold in size.
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    matrices[1] = 0
    matrices[2, :, ::2] *= 1e-3
    np.testing.assert_allclose(jax.jit(orthogonalised)(matrices), [exactly(x) for x in matrices], atol=2e-3)


def test_every_direction_of_a_hidden_kernel_moves_alike_and_the_ends_by_adam():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": (3, 3, 8, 12),
        "dense": (16, 8),
        "embed_tokens": (32, 8),
        "lm_head": (8, 32),
        "conv_in": (3, 3, 3, 16),
        "bias": (8,),
    }
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    grads = {name: {"kernel": rng.normal(size=shape).astype(np.float32)} for name, shape in shapes.items()}
    optimiser = muon(peak=1.0, steps=10, warmup=0, weight_decay=0.0, adam_share=0.7)
    updates, _ = jax.jit(optimiser.update)(grads, optimiser.init(params), params)
    for name in ("conv", "dense"):
        matrix = np.asarray(updates[name]["kernel"]).reshape(-1, shapes[name][-1])
        values = np.linalg.svd(matrix, compute_uv=False) / (MUON_RMS * max(matrix.shape) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.3
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.7, b2=0.98, nesterov=True))
    expected, _ = adam.update(grads, adam.init(params), params)
    for name in ("embed_tokens", "lm_head", "conv_in", "bias"):
        np.testing.assert_allclose(updates[name]["kernel"], expected[name]["kernel"], rtol=1e-4)
