"""Import the sampling parameters alone."""

import sys

import dm_generations.sampling.params  # noqa: F401

if __name__ == "__main__":
    assert not {"jax", "numpy", "flax"} & set(sys.modules)
