"""Samples rows of a model with compiled programs cached; prints what came of it. Usage: sample_rows.py MODEL."""

import hashlib
import sys

import numpy as np

from dm_generations import Generator, RowSettings

KEYS = np.array([row_key(0, index) for index in range(3)])
ROWS = ["a rocket"] * 3, RowSettings(cond_scale=np.array([1.0, 3.0, 10.0])), KEYS

generator = Generator.load(sys.argv[1], batch_size=2)
samples = generator.draw(*ROWS)
print(hashlib.sha256(samples.tokens.tobytes()).hexdigest(), samples.log_probs.tobytes().hex())
print(generator.teacher_forced_margins(*ROWS, samples.tokens).max())
