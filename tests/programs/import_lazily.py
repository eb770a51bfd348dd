"""Import the package, then its public names, and fail if JAX is imported too early or torch at all."""

import sys

import dm_generations

if __name__ == "__main__":
    assert {"Generator", "MinDalle", "SamplingParams"} <= set(dir(dm_generations))
    assert not {"jax", "numpy"} & set(sys.modules)
    from dm_generations import Generator, MinDalle, SamplingParams

    assert callable(Generator) and callable(MinDalle)
    assert SamplingParams().cond_scale == 1.0
    assert "jax" in sys.modules
    assert "torch" not in sys.modules
