"""Dense layers whose kernel is split for a CPU compute what those with the whole kernel compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dm_generations.models.dense import Dense, split_kernels

INPUTS = 24


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def params_of(outputs: int) -> dict:
    return {"kernel": random(INPUTS, outputs), "bias": random(outputs)}


def apply(layer: nn.Module, params: dict, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda params, x: layer.apply({"params": params}, x))(params, x))


@pytest.mark.parametrize("outputs", [3, 384, 129 * 5, 257])
@pytest.mark.parametrize("cores", [2, 16])
def test_a_split_kernel_gives_what_the_whole_one_gives(outputs, cores, monkeypatch):
    monkeypatch.setattr("dm_generations.models.dense.core_count", lambda: cores)
    params, x = params_of(outputs), random(2, 3, INPUTS)
    (name,) = split_kernels(params).keys() - params.keys()
    assert split_kernels(params)[name].size == params["kernel"].size
    expected = apply(nn.Dense(outputs), params, x)
    for form in (params, split_kernels(params)):
        np.testing.assert_allclose(apply(Dense(outputs), form, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 9, 32])
def test_a_row_gives_the_same_bits_at_every_place(count):
    params, row = split_kernels(params_of(384)), random(1, INPUTS)
    found = apply(Dense(384), params, np.repeat(row, count, axis=0))
    np.testing.assert_array_equal(found, np.repeat(found[:1], count, axis=0))


def test_modules_inside_modules_are_split_and_nothing_is_copied():
    params = {"a": params_of(128), "b": {"c": params_of(128), "scale": random(8)}}
    split = split_kernels(params)
    assert split["b"]["scale"] is params["b"]["scale"] and split["a"]["bias"] is params["a"]["bias"]
    for leaf in jax.tree.leaves(split):
        assert any(np.shares_memory(leaf, own) for own in jax.tree.leaves(params))


@pytest.mark.parametrize("form", [lambda params: params, split_kernels])
def test_products_of_16_bits_can_be_32_bits_wide(form):
    params, x = form(params_of(128)), random(2, INPUTS)
    wide = Dense(128, use_bias=False, dtype=jnp.bfloat16, product_dtype=jnp.float32)
    found = apply(wide, params, x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x @ params_of(128)["kernel"], atol=0.2)
    assert (found.astype(jnp.bfloat16) != found).any()
