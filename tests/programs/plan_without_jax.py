"""Plan a sweep, and fail if that imported JAX or NumPy."""

import sys

from dm_generations.pipelines.sweep import Sweep, plan_sweep

if __name__ == "__main__":
    plan_sweep(Sweep(["a"]), None, None, 1)
    assert not {"jax", "numpy", "flax"} & set(sys.modules)
