import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """A training step is a large program, and a few steps of a tiny model do not repay its optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
