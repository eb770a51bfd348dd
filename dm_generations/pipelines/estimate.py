"""What `generate` would do: images, bytes, memory and time, for `--dry-run`."""

import contextlib
import math
import os.path
import time
from dataclasses import dataclass

import numpy as np

from dm_generations.archive import Archive
from dm_generations.archive.records import BYTES_PER_TOKEN
from dm_generations.pipelines.generate import GenerateOptions, Pipeline, prepare
from dm_generations.pipelines.sweep import Plan, Sweep
from dm_generations.sampling.batching import sequence_count

ROW_BYTES = 250  # of the archive for an image besides its tokens, indexes included: measured on archive/emoji.db


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Attributes:
        token_bytes: Size of the new images' tokens.
        archive_bytes: By how much the archive grows.
        batch_size: Images of a batch on each device.
        batch_count: Batches that are sampled at the same time.
        memory_bytes: Peak memory of these batches on a device, besides the weights.
        seconds: How long it takes, from the speed of a few steps; 0 if there is nothing to do.
        is_scored: Whether that includes scoring.
    """

    plan: Plan
    token_bytes: int
    archive_bytes: int
    batch_size: int
    batch_count: int
    memory_bytes: int
    seconds: float
    is_scored: bool


def estimate(sweep: Sweep, options: GenerateOptions) -> Estimate:
    """Find what `generate` would do, and how long that takes; nothing is written.

    Args:
        sweep: What would be generated.
        options: The archive and the models.

    Raises:
        UserError: As `generate` does.
    """
    pipeline, sweep = prepare(sweep, options, "r")
    with Archive.open(options.db) if os.path.exists(options.db) else contextlib.nullcontext() as archive:
        plan = pipeline.plan(sweep, archive, options.shard)
    generator = pipeline.generator
    token_bytes = plan.missing_count * generator.token_count * BYTES_PER_TOKEN
    return Estimate(
        plan,
        token_bytes,
        token_bytes + plan.missing_count * ROW_BYTES,
        generator.batch_size,
        generator.concurrency,
        generator.concurrency * generator.batch_bytes(generator.batch_size),
        estimate_seconds(pipeline, plan) if plan.missing else 0.0,
        pipeline.scorer is not None,
    )


def estimate_seconds(pipeline: Pipeline, plan: Plan) -> float:
    """Estimate how long a plan takes, from a few steps of a batch and the scoring of one. Compiles the programs."""
    generator = pipeline.generator
    sequences = sum(sequence_count(c.params.cond_scale) * len(indices) for c, indices in plan.missing)
    seconds = math.ceil(sequences / sum(generator.capacities)) * generator.measure_seconds()
    if pipeline.scorer is None or pipeline.decoder is None:
        return seconds
    count = pipeline.decoder.batch_size
    tokens = np.zeros((count, generator.token_count), np.uint16)
    for _ in range(2):  # the first one compiles
        started = time.perf_counter()
        pipeline.scorer.score(pipeline.decoder.start(tokens), ["an image"] * count)
    return seconds + plan.missing_count / count * (time.perf_counter() - started)
