"""Every optimiser moves downhill at the rate of its schedule, and leaves constants alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dm_generations.training.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_moves_downhill_and_leaves_buffers(name):
    params = {"layer": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "rotary_cos": jnp.ones((3, 2))}
    optimizer = make_optimizer(name, make_schedule("constant", 0.01, 10, 0), weight_decay=0.1, clip_norm=1.0)

    def loss_of(params):
        return sum(jnp.square(leaf - 0.5).sum() for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    moved, state = params, optimizer.init(params)
    for _ in range(3):
        moved, state = step(moved, state)
    assert loss_of(moved["layer"]) < loss_of(params["layer"])
    np.testing.assert_array_equal(moved["rotary_cos"], params["rotary_cos"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_warms_up_to_the_peak_and_ends_low(name):
    schedule = make_schedule(name, 0.5, 100, 10)
    rates = np.array([schedule(step) for step in range(101)])
    assert rates[0] == 0 and rates.argmax() >= 10 and rates.max() == pytest.approx(0.5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) <= 0).all()
    assert rates[100] == (0.5 if name == "constant" else pytest.approx(0, abs=1e-6))
