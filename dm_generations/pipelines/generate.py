"""Generate the images of a sweep that an archive lacks: sample tokens, score them, store each batch in one transaction.

L: tokens of an image, row-major over its grid
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import math
import os.path
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dm_generations.archive import Archive, NewImage
from dm_generations.archive.records import BYTES_PER_TOKEN, TOKEN_DTYPE
from dm_generations.atomic_io import write_atomic
from dm_generations.errors import UserError
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.inference.scorer import Scorer
from dm_generations.models.loading import Checkpoint, Models, load_models
from dm_generations.paths import sanitize_file_name, utf8_path
from dm_generations.pipelines.init_tokens import InitTokens, load_init_tokens
from dm_generations.pipelines.model_records import add_model, find_model_id, model_info
from dm_generations.pipelines.sweep import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_PARAMS,
    WHOLE_SWEEP,
    Plan,
    Sample,
    Shard,
    Sweep,
    plan_sweep,
)
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.sampling.batching import sequence_count
from dm_generations.sampling.logits import SAMPLER_VERSION
from dm_generations.sampling.params import SamplingParams

SAMPLER_VERSIONS = {"rows": SAMPLER_VERSION, "dalle-mini": 1001}  # stored with each row
ROW_BYTES = 235  # of the archive for an image besides its tokens, indexes included: measured on archive/emoji.db

SMALLER_BATCH = "use a smaller --batch-size"

logger = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]  # hears how many images are done, and of how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The archive, models, batches and files of a run.

    Models are folders, files or names on the Hugging Face hub; None is the one that ships, and for the codec the
    model's own if it has one.

    Attributes:
        db: The archive to fill; it is created if there is none.
        config_overrides: Entries of a DALLE-pytorch model's config that its file lacks or has wrong.
        is_scored: Whether CLIP scores the images.
        batch_size: Images at a time on each device.
        dtype: Of the text model's activations and caches.
        rng: A key of `SAMPLER_VERSIONS`.
        init_image: Image file whose first tokens every image continues.
        init_tokens: `.npy` file of tokens to continue, in place of `init_image`.
        init_count: How many of these tokens are kept; None is the default share.
        progressive_every: Tokens after which unfinished images are written to `progressive_dir`; None for never.
    """

    db: Path
    model: str | None = None
    tokenizer: Path | None = None
    config_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codec: str | None = None
    clip: str | None = None
    is_scored: bool = True
    batch_size: int = DEFAULT_BATCH_SIZE
    dtype: str = "float32"
    rng: str = "rows"
    shard: Shard = WHOLE_SWEEP
    init_image: Path | None = None
    init_tokens: Path | None = None
    init_count: int | None = None
    progressive_every: int | None = None
    progressive_dir: Path = Path("progressive")


@dataclasses.dataclass
class GenerateReport:
    """What a run did, in images.

    Attributes:
        added_count: Added to the archive.
        existing_count: Skipped, because the archive had them before.
        others_count: Sampled here, but stored by another process in the meantime.
        invalid_count: Left out, because dalle-mini's noise sampled a token outside the codebook.
        seconds: Time of sampling, scoring and storing.
        codec: Folder, file or hub name that has the codec; None: it is the one that ships.
    """

    added_count: int = 0
    existing_count: int = 0
    others_count: int = 0
    invalid_count: int = 0
    seconds: float = 0.0
    codec: str | None = None


@dataclasses.dataclass(frozen=True)
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


def generate(
    sweep: Sweep, options: GenerateOptions, on_progress: OnProgress = lambda done, total: None
) -> GenerateReport:
    """Generate the images of a sweep that the archive lacks, and add them to it.

    A run that is stopped at any moment loses the batch it works on and nothing else. Several processes can fill one
    archive, best with a `shard` each: an image that two of them sample is stored once.

    Args:
        on_progress: Called with (done, total) images at the start and after every batch.

    Raises:
        UserError: An input is missing, broken or incompatible, or memory does not hold one image.
    """
    pipeline, sweep = _prepare(sweep, options, "w")
    with open_archive(options.db) as archive:
        plan = pipeline.plan(sweep, archive, options.shard)
        logger.info("%s combinations x %s images, %s to generate", *_counts(sweep, plan))
        report = pipeline.fill(archive, plan, on_progress)
        report.codec = pipeline.models.codec_from
    return report


def estimate(sweep: Sweep, options: GenerateOptions) -> Estimate:
    """Find what `generate` would do, and how long that takes; nothing is written.

    Raises:
        UserError: As `generate` does.
    """
    pipeline, sweep = _prepare(sweep, options, "r")
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
        pipeline.estimate_seconds(plan) if plan.missing else 0.0,
        pipeline.models.clip is not None,
    )


class Pipeline:
    """The models of a run on the devices: samples to scored images.

    Nothing is compiled before the first batch.

    Raises:
        UserError: A model folder lacks its tokenizer.
    """

    def __init__(self, models: Models, options: GenerateOptions, init: InitTokens | None = None):
        compile_cache.enable()
        self.models = models
        self.sampler_version = SAMPLER_VERSIONS[options.rng]
        self.generator = Generator(
            models.generator,
            models.generator.load_tokenizer(),
            options.batch_size,
            dtype=options.dtype,
            rng=options.rng,
        )
        self._init = init
        self._options = options
        self._is_compiled = False
        self._codec = self._scorer = None
        if models.clip is not None or options.progressive_every is not None:
            self._codec = Decoder.from_checkpoint(models.codec, options.batch_size, grid=models.grid)
        if models.clip is not None:
            self._scorer = make_scorer(models.clip, options.batch_size)

    def plan(self, sweep: Sweep, archive: Archive | None, shard: Shard = WHOLE_SWEEP) -> Plan:
        """Find the images of `sweep` that the archive lacks from this model."""
        generator_id = None if archive is None else find_model_id(archive, model_info(self.models.generator))
        return plan_sweep(sweep, archive, generator_id, self.sampler_version, self._init_md5, shard)

    def sample(self, samples: Sequence[Sample]) -> list[NewImage]:
        """Sample images, with their scores if there is a CLIP.

        Images of dalle-mini's noise with a token outside the codebook are left out.
        """
        count, init_count = len(samples), 0 if self._init is None else self._init.count
        combinations = [sample.combination for sample in samples]
        time_start = time.time()
        rows = (
            [combination.prompt for combination in combinations],
            [combination.params for combination in combinations],
            np.array([(sample.key0, sample.key1) for sample in samples], np.uint32),
            [combination.sc_prompt for combination in combinations],
            None if self._init is None else np.tile(self._init.tokens, (count, 1)),
            init_count,
        )
        if self._options.progressive_every is None:
            sampling = self.generator.start(*rows)
            self._compile_scoring(rows[0])  # while the devices sample
            tokens, log_probs = sampling.samples()
        else:
            tokens, log_probs = self.generator.draw(
                *rows,
                self._options.progressive_every,
                lambda first, partial: self._write_partial(samples[first : first + len(partial)], partial),
            )
        time_end = time.time()
        images = [
            NewImage(
                sample.combination.prompt,
                sample.combination.sc_prompt,
                sample.combination.params,
                key0=sample.key0,
                key1=sample.key1,
                quantvec=row.astype(TOKEN_DTYPE).tobytes(),
                time_start=time_start,
                time_end=time_end,
                log_prob=finite_or_none(log_prob),
                dtype=self.generator.dtype,
                init_count=init_count,
                init_md5=self._init_md5,
            )
            for sample, row, log_prob in zip(samples, tokens, log_probs, strict=True)
        ]
        is_valid = (tokens < self.generator.codebook_size).all(axis=1)
        return self._add_scores(list(itertools.compress(images, is_valid)), tokens[is_valid])

    def fill(self, archive: Archive, plan: Plan, on_progress: OnProgress) -> GenerateReport:
        """Generate all that `plan` lists into `archive`, each batch in a transaction."""
        report = GenerateReport(existing_count=plan.existing_count)
        total, done = plan.missing_count, 0
        started = time.monotonic()
        on_progress(done, total)
        for batch in self._batches(plan.samples()):
            with memory_errors(SMALLER_BATCH):
                images = self.sample(batch)
            added = self._store(archive, images)
            report.added_count += added
            report.others_count += len(images) - added
            report.invalid_count += len(batch) - len(images)
            done += len(batch)
            on_progress(done, total)
        report.seconds = time.monotonic() - started
        return report

    def estimate_seconds(self, plan: Plan) -> float:
        """Estimate how long `plan` takes, from a few steps of a batch and the scoring of one. Compiles the programs."""
        sequences = sum(sequence_count(c.params.cond_scale) * len(indices) for c, indices in plan.missing)
        seconds = math.ceil(sequences / sum(self.generator.capacities)) * self.generator.measure_seconds()
        if self._scorer is None or self._codec is None:
            return seconds
        count = self._codec.batch_size
        tokens = np.zeros((count, self.generator.token_count), np.uint16)
        for _ in range(2):  # the first one compiles
            started = time.perf_counter()
            self._scorer.score(self._codec.start(tokens), ["an image"] * count)
        return seconds + plan.missing_count / count * (time.perf_counter() - started)

    @property
    def _init_md5(self) -> str:
        return "" if self._init is None else self._init.md5

    def _batches(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Yield samples in order, as many as the generator takes at a time."""
        batch: list[Sample] = []
        room = list(self.generator.capacities)
        for sample in samples:
            needed = sequence_count(sample.combination.params.cond_scale)
            while room and needed > room[0]:
                del room[0]
            if not room:
                yield batch
                batch, room = [], list(self.generator.capacities)
            batch.append(sample)
            room[0] -= needed
        if batch:
            yield batch

    def _store(self, archive: Archive, images: Sequence[NewImage]) -> int:
        """Add images in one transaction; returns how many were new."""
        models = self.models
        with archive.transaction():
            generator_id = add_model(archive, model_info(models.generator))
            codec_id = add_model(archive, model_info(models.codec, models.grid))
            clip_id = None if models.clip is None else add_model(archive, model_info(models.clip))
            return archive.add_images(images, generator_id, codec_id, clip_id, self.sampler_version)

    def _add_scores(self, images: list[NewImage], tokens: np.ndarray) -> list[NewImage]:
        """Return images with the CLIP scores of their tokens (n, L)."""
        if self._scorer is None or self._codec is None or not images:
            return images
        decoding = self._codec.start(tokens.astype(np.uint16))
        scores = self._scorer.score(decoding, [image.prompt for image in images])
        time_scored = time.time()
        return [
            dataclasses.replace(
                image,
                clip_score_input=finite_or_none(score_input),
                clip_score_tokenized=finite_or_none(score_tokenized),
                time_scored=time_scored,
            )
            for image, score_input, score_tokenized in zip(images, *scores, strict=True)
        ]

    def _compile_scoring(self, prompts: Sequence[str]) -> None:
        """Compile what scores the images, once."""
        if self._scorer is not None and self._codec is not None and not self._is_compiled:
            self._scorer.compile(self._codec.compile(), prompts)
            self._is_compiled = True

    def _write_partial(self, samples: Sequence[Sample], tokens: np.ndarray) -> None:
        if self._codec is not None:
            # dalle-mini also samples tokens outside the codebook
            tokens = np.minimum(tokens, self.generator.codebook_size - 1).astype(np.uint16)
            write_partial_images(self._options.progressive_dir, samples, tokens, self._codec)


def pad_tokens(tokens: np.ndarray, token_count: int) -> np.ndarray:
    """Fill up unfinished images with each one's own first token, so that a codec can decode them.

    That is the token of the upper left corner, which mostly is background, so an image grows on its own. Any one token
    of the codebook, as min-dalle takes its last, is a pattern that depends on the codec, often a loud one.

    Args:
        tokens: The first tokens of n images, (n, count) with count at least 1.
        token_count: L.

    Returns:
        (n, L), of the same dtype.
    """
    missing = token_count - tokens.shape[1]
    return np.concatenate([tokens, np.repeat(tokens[:, :1], missing, axis=1)], axis=1)


def write_partial_images(out_dir: Path, samples: Sequence[Sample], tokens: np.ndarray, codec: Decoder) -> list[Path]:
    """Write a PNG of each unfinished image.

    Args:
        samples: n samples.
        tokens: Their first tokens, (n, count) uint16.

    Returns:
        The paths, in the order of `samples`.

    Raises:
        UserError: The folder cannot be written.
    """
    paths = [utf8_path(out_dir, partial_image_name(sample, tokens.shape[1])) for sample in samples]
    images = codec.decode(pad_tokens(tokens, codec.token_count))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write into {str(out_dir)!r}: {error.strerror}; choose another folder") from error
    return paths


def partial_image_name(sample: Sample, count: int) -> str:
    """Return `8d3c0b51_0_42_0128_a prompt.png` for an image after `count` tokens, at most 255 bytes.

    The first field is a hash of the combination, because combinations share keys. The steps of an image follow each
    other in the order of names.
    """
    combination = hashlib.sha256(repr(sample.combination).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    name = f"{combination}_{sample.key0}_{sample.key1}_{count:04d}_{sample.combination.prompt}"
    return sanitize_file_name(name, ".png")


def make_scorer(clip: Checkpoint, batch_size: int) -> Scorer:
    """Return the scorer of a loaded CLIP, with the tokenizer of its folder."""
    return Scorer(clip, clip.load_tokenizer(), batch_size)


def open_archive(path: Path) -> Archive:
    """Open the archive at `path` for writing; create it if there is none."""
    try:
        return Archive.open_or_create(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def finite_or_none(number: float) -> float | None:
    """Convert a score or log-probability for the archive, which has None for NaN and infinity."""
    return float(number) if math.isfinite(number) else None


def _prepare(sweep: Sweep, options: GenerateOptions, mode: str) -> tuple[Pipeline, Sweep]:
    """Check the archive, load the models and check the sweep's prompts.

    Returns:
        The pipeline, and the sweep with the model's own defaults where these count.
    """
    if os.path.exists(options.db):  # unlike Path.exists, False for a name that cannot exist
        with Archive.open(options.db, mode) as archive:  # before the models are loaded, which takes a moment
            archive.check_appendable()
    models = load_models(
        options.model, options.codec, options.clip, options.is_scored, options.tokenizer, options.config_overrides
    )
    config, codec = models.generator.config, models.codec
    if codec.config.codebook_size > config.codebook_size:
        logger.warning(
            "codec %r has %s tokens, model %r samples %s: images are right only if it is the codec that the model was "
            "trained with",
            *(codec.name, f"{codec.config.codebook_size:,}", models.generator.name, f"{config.codebook_size:,}"),
        )
    init = load_init_tokens(
        options.init_image, options.init_tokens, options.init_count, codec, config.image_length, config.codebook_size
    )
    pipeline = Pipeline(models, options, init)
    pipeline.generator.check_texts([*sweep.prompts, *sweep.sc_prompts])
    if pipeline.generator.batch_size < options.batch_size:
        logger.warning(
            "memory holds batches of %s images, not of %s", pipeline.generator.batch_size, options.batch_size
        )
    if options.rng == "dalle-mini":  # whose `generate` takes what it is not given from config.json
        own = SamplingParams(config.top_k, config.top_p, config.temperature, DEFAULT_PARAMS.cond_scale)
        sweep = sweep.with_defaults(own)
    return pipeline, sweep


def _counts(sweep: Sweep, plan: Plan) -> tuple[str, str, str]:
    return f"{sweep.combination_count:,}", f"{sweep.count:,}", f"{plan.missing_count:,}"
