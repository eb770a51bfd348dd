"""Sample rows of a model with the compile cache on; print their tokens' hash, log-probabilities and largest margin.

Usage: sample_rows.py MODEL
"""

import hashlib
import sys

import numpy as np

from dm_generations import Generator, SamplingParams
from dm_generations.sampling.prng import row_key

COND_SCALES = (1.0, 3.0, 10.0)

if __name__ == "__main__":
    params = [SamplingParams(cond_scale=scale) for scale in COND_SCALES]
    keys = np.array([row_key(0, index) for index in range(len(params))], np.uint32)
    rows = ["a rocket"] * len(params), params, keys
    generator = Generator.load(sys.argv[1], batch_size=2)
    samples = generator.sample(*rows)
    print(hashlib.sha256(samples.tokens.tobytes()).hexdigest(), samples.log_probs.tobytes().hex())
    print(generator.teacher_forced_margins(*rows, samples.tokens).max())
