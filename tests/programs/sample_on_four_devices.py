"""Sample rows of tests/inference/test_generator.py on four devices: FOLDER of the model, FILE of their tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

import jax
import numpy as np
from test_generator import rows

from dm_generations.inference.generator import Generator
from dm_generations.models.loading import load_checkpoint
from dm_generations.models.tokenization import PromptTokenizer

if __name__ == "__main__":
    folder, expected = sys.argv[1:]
    assert jax.local_device_count() == 4
    tokens = np.load(expected)
    generator = Generator(load_checkpoint(folder, "generator"), PromptTokenizer(Path(folder)), 2)
    assert generator.capacities == [4, 4, 4, 4]
    indices = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0, 0, 0]
    samples = generator.sample(*rows(indices))
    np.testing.assert_array_equal(samples.tokens, tokens[indices])
    assert (samples.log_probs < 0).all()
    prompts, settings, keys, sc_prompts = rows([2, 5, 1])
    *_, streamed = generator.stream(prompts, settings, keys, 9, sc_prompts)
    np.testing.assert_array_equal(streamed, tokens[[2, 5, 1]])
    prompts, settings, keys, sc_prompts = rows(indices)
    margins = generator.teacher_forced_margins(prompts, settings, keys, tokens[indices], sc_prompts)
    assert (margins < 1e-4).all()
