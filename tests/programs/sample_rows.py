"""Samples rows of a model with compiled programs cached; prints what came of it. Usage: sample_rows.py MODEL."""

import hashlib
import sys

import numpy as np

from dm_generations import Generator, SamplingParams
from dm_generations.sampling.prng import row_key

KEYS = np.array([row_key(0, index) for index in range(3)])
ROWS = ["a rocket"] * 3, [SamplingParams(256, cond_scale=scale) for scale in (1.0, 3.0, 10.0)], KEYS

generator = Generator.load(sys.argv[1], batch_size=2)
samples = generator.draw(*ROWS)
print(hashlib.sha256(samples.tokens.tobytes()).hexdigest(), samples.log_probs.tobytes().hex())
print(generator.teacher_forced_margins(*ROWS, samples.tokens).max())
