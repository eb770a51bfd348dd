"""Generate the images of a sweep that an archive lacks: sample tokens, score them, store each batch in one transaction.

L: tokens of an image, row-major over its grid
"""

import dataclasses
import functools
import itertools
import logging
import math
import os.path
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dm_generations.archive import Archive, NewImage
from dm_generations.archive.records import TOKEN_DTYPE, ClassLabel, parse_config
from dm_generations.archive.vocabulary import class_text
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator
from dm_generations.inference.scorer import Scorer
from dm_generations.models.base import (
    check_prompt_kinds,
    check_texts,
    class_count_of,
    default_params_of,
    extra_settings_of,
)
from dm_generations.models.labels import class_vocabulary
from dm_generations.models.loading import Models, load_models
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

if TYPE_CHECKING:
    from dm_generations.pipelines.init_tokens import InitTokens
    from dm_generations.runtime.ray_pool import RayPool

SAMPLER_VERSIONS = {"rows": SAMPLER_VERSION, "dalle-mini": 1001}  # stored with each row
SMALLER_BATCH = "use a smaller --batch-size"

logger = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]  # called with how many images are done, and of how many
# Called with n samples, how many steps were made, and the tokens so far, as `Generator.sample` gives them.
OnUnfinished = Callable[[Sequence[Sample], int, np.ndarray], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The archive, models, batches and files of a run.

    Models are folders, files or names on the Hugging Face hub; None is the embedded one, and for the codec the model's
    own if it has one.

    Attributes:
        db: The archive to fill; it is created if there is none.
        model: The text-to-image model.
        tokenizer: File or folder of its tokenizer; None is the model's own.
        config_overrides: Entries of a DALLE-pytorch model's config that its file lacks or has wrong.
        codec: What decodes the tokens.
        clip: What scores the images.
        is_scored: Whether to score the images.
        batch_size: Images at a time on each device.
        dtype: Of the text model's activations and caches.
        rng: A key of `SAMPLER_VERSIONS`.
        shard: The part of the sweep to generate.
        init_image: Image file whose first tokens start every image.
        init_tokens: `.npy` file of these tokens, in place of `init_image`.
        init_count: How many of these tokens are used; None is the default share.
        progressive_every: Steps (tokens of most models) after which unfinished images are written; None for never.
        progressive_dir: Folder for unfinished images.
    """

    db: Path = Path()
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
        distinct_count: How many of those that were sampled here have different tokens.
        seconds: Time of sampling, scoring and storing.
        codec: Folder, file or hub name of the codec; None is the embedded one.
        progressive_dir: Folder with unfinished images, if some were written.
    """

    added_count: int = 0
    existing_count: int = 0
    others_count: int = 0
    invalid_count: int = 0
    distinct_count: int = 0
    seconds: float = 0.0
    codec: str | None = None
    progressive_dir: Path | None = None


def generate(
    sweep: Sweep,
    options: GenerateOptions,
    on_progress: OnProgress = lambda done, total: None,
    pool: "RayPool | None" = None,
) -> GenerateReport:
    """Generate the images of a sweep that the archive lacks, and add them to it.

    A run that is stopped at any moment loses the batch it works on and nothing else. Several processes can fill one
    archive, best with a `shard` each: an image that two of them sample is stored once.

    Args:
        sweep: What to generate.
        options: The archive and the models.
        on_progress: Called with (done, total) images at the start and after every batch.
        pool: What samples and scores; None is this process. The archive is written here in any case.

    Raises:
        UserError: An input is missing, broken or incompatible, or memory does not hold one image.
    """
    pipeline, sweep = prepare(sweep, options, "w", pool is not None)
    with Archive.open_or_create(options.db) as archive:
        plan = pipeline.plan(sweep, archive, options.shard)
        counts = sweep.combination_count, sweep.count, plan.missing_count
        logger.info("combinations: %s, images of each: %s, to generate: %s", *(f"{count:,}" for count in counts))
        report = pipeline.fill(archive, plan, on_progress, pool)
        report.codec = pipeline.models.codec_from
    return report


class Pipeline:
    """The models of a run: samples to scored images.

    The first use of a model puts all of them on the devices, and the first batch compiles their programs.

    Attributes:
        models: The checkpoints.
    """

    def __init__(
        self,
        models: Models,
        options: GenerateOptions,
        init: "InitTokens | None" = None,
        loaded: tuple[Generator, Decoder | None, Scorer | None] | None = None,
        on_unfinished: OnUnfinished | None = None,
    ):
        """Take the models, which go to the devices when they are needed.

        Args:
            models: The checkpoints.
            options: Batch size, dtype, noise and unfinished images.
            init: Tokens that every image starts with.
            loaded: What is on the devices already, in place of `models`.
            on_unfinished: Called every `options.progressive_every` steps; None writes the images as files.

        Raises:
            UserError: Unfinished images are wanted of a model that has none.
        """
        self.models = models
        class_count = class_count_of(models.generator.config)
        self._vocabulary = class_vocabulary(class_count) if class_count else ("", [])
        self._loaded = loaded
        scorer = None if loaded is None else loaded[2]
        self._clip = models.clip.model_info() if models.clip is not None else None if scorer is None else scorer.info
        self._sampler_version = SAMPLER_VERSIONS[options.rng]
        self._init = init
        self._init_md5 = "" if init is None else init.md5
        self._options = options
        self._is_compiled = False
        self._on_unfinished = on_unfinished or self._write_unfinished

    @functools.cached_property
    def _on_devices(self) -> tuple[Generator, Decoder | None, Scorer | None]:
        compile_cache.enable()
        return self._loaded or _load(self.models, self._options)

    @property
    def generator(self) -> Generator:
        """Samples tokens. Raises UserError: a model lacks its tokenizer, or memory does not hold the weights."""
        return self._on_devices[0]

    @property
    def decoder(self) -> Decoder | None:
        """Decodes tokens; None if neither scores nor unfinished images are wanted."""
        return self._on_devices[1]

    @property
    def scorer(self) -> Scorer | None:
        """Scores images; None if they are not to be scored."""
        return self._on_devices[2]

    def plan(self, sweep: Sweep, archive: Archive | None, shard: Shard = WHOLE_SWEEP) -> Plan:
        """Find the images of `sweep` that the archive lacks from this model."""
        generator_id = None if archive is None else archive.find_model(self.models.generator.model_info())
        return plan_sweep(sweep, archive, generator_id, self._sampler_version, self._init_md5, shard)

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
            [parse_config(combination.extra_settings or "{}") for combination in combinations],
        )
        if self._options.progressive_every is None:
            sampling = self.generator.start(*rows)
            self._compile_scoring(self.texts(rows[0]))  # while the devices sample
            tokens, log_probs = sampling.samples()
        else:
            last_token = self.generator.codebook_size - 1  # dalle-mini also samples other tokens
            tokens, log_probs = self.generator.sample(
                *rows,
                self._options.progressive_every,
                lambda first, step, tokens: self._on_unfinished(
                    samples[first : first + len(tokens)], step, np.minimum(tokens, last_token).astype(TOKEN_DTYPE)
                ),
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
                extra_settings=sample.combination.extra_settings,
            )
            for sample, row, log_prob in zip(samples, tokens, log_probs, strict=True)
        ]
        is_valid = (tokens < self.generator.codebook_size).all(axis=1)
        return self._add_scores(list(itertools.compress(images, is_valid)), tokens[is_valid])

    def sample_all(self, samples: Iterable[Sample]) -> Iterator[tuple[int, list[NewImage]]]:
        """Sample images in batches.

        Yields:
            How many samples a batch had, and the images.
        """
        for batch in self.batches(samples):
            with memory_errors(SMALLER_BATCH):
                yield len(batch), self.sample(batch)

    def fill(
        self, archive: Archive, plan: Plan, on_progress: OnProgress, pool: "RayPool | None" = None
    ) -> GenerateReport:
        """Generate all that `plan` lists into `archive`, each batch in a transaction."""
        report = GenerateReport(existing_count=plan.existing_count)
        total, done = plan.missing_count, 0
        distinct: set[int] = set()  # hashes of tokens
        started = time.monotonic()
        on_progress(done, total)
        batches = self.sample_all(plan.samples()) if pool is None else self._sample_remotely(plan.samples(), pool)
        for count, images in batches:
            added = self.store(archive, images)
            report.added_count += added
            report.others_count += len(images) - added
            report.invalid_count += count - len(images)
            distinct.update(hash(image.quantvec) for image in images)
            done += count
            on_progress(done, total)
        report.distinct_count = len(distinct)
        if total and self._options.progressive_every is not None:
            report.progressive_dir = self._options.progressive_dir
        report.seconds = time.monotonic() - started
        return report

    def batches(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
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

    def store(self, archive: Archive, images: Sequence[NewImage]) -> int:
        """Add images in one transaction; returns how many were new."""
        models = self.models
        with archive.transaction():
            if any(isinstance(image.prompt, ClassLabel) for image in images):
                archive.add_vocabulary(*self._vocabulary)
            generator_id = archive.add_model(models.generator.model_info())
            codec_id = archive.add_model(models.codec.model_info(models.grid))
            clip_id = None if self._clip is None else archive.add_model(self._clip)
            return archive.add_images(images, generator_id, codec_id, clip_id, self._sampler_version)

    def _sample_remotely(self, samples: Iterator[Sample], pool: "RayPool") -> Iterator[tuple[int, list[NewImage]]]:
        """Do as `sample_all` does, in a pool."""
        size = 2 * self._options.batch_size  # as many as a process samples at a time
        pieces = iter(lambda: list(itertools.islice(samples, size)), [])
        make = functools.partial(_make_sampler, self.models, self._options, self._init)
        for batches in pool.map(make, pieces):
            yield from batches

    def _add_scores(self, images: list[NewImage], tokens: np.ndarray) -> list[NewImage]:
        """Return images with the CLIP scores of their tokens (n, L)."""
        if self.scorer is None or self.decoder is None or not images:
            return images
        decoding = self.decoder.start(tokens.astype(np.uint16))
        scores = self.scorer.score(decoding, self.texts([image.prompt for image in images]))
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

    def texts(self, prompts: Sequence[str | ClassLabel]) -> list[str]:
        """Return prompts as an archive has them, classes with their labels."""
        labels = self._vocabulary[1]
        return [class_text(prompt, labels) if isinstance(prompt, ClassLabel) else prompt for prompt in prompts]

    def _compile_scoring(self, prompts: Sequence[str]) -> None:
        """Compile what scores the images, once."""
        if self.scorer is not None and self.decoder is not None and not self._is_compiled:
            self.scorer.compile(self.decoder.compile(), prompts)
            self._is_compiled = True

    def _write_unfinished(self, samples: Sequence[Sample], step: int, tokens: np.ndarray) -> None:
        """Write images of the tokens (n, count) uint16 of n samples after so many steps."""
        from dm_generations.pipelines.progressive import write_partial_images

        assert self.decoder is not None, "made with `progressive_every`"
        write_partial_images(self._options.progressive_dir, samples, step, tokens, self.decoder)


def _make_sampler(
    models: Models, options: GenerateOptions, init: "InitTokens | None"
) -> Callable[[list[Sample]], list[tuple[int, list[NewImage]]]]:
    """Return what samples images in another process."""
    pipeline = Pipeline(models, options, init)
    return lambda samples: list(pipeline.sample_all(samples))


def _load(models: Models, options: GenerateOptions) -> tuple[Generator, Decoder | None, Scorer | None]:
    """Put the models on the devices; without a decoder if neither scores nor unfinished images are wanted."""
    tokenizer = models.generator.load_tokenizer()
    generator = Generator(models.generator, tokenizer, options.batch_size, dtype=options.dtype, rng=options.rng)
    decoder = scorer = None
    if models.clip is not None or options.progressive_every is not None:
        decoder = Decoder.from_checkpoint(models.codec, options.batch_size, grid=models.grid)
    if models.clip is not None:
        scorer = Scorer.from_checkpoint(models.clip, options.batch_size)
    return generator, decoder, scorer


def finite_or_none(number: float) -> float | None:
    """Convert a score or log-probability for the archive, which has None for NaN and infinity."""
    return float(number) if math.isfinite(number) else None


def prepare(
    sweep: Sweep, options: GenerateOptions, mode: Literal["r", "w"], is_remote: bool = False
) -> tuple[Pipeline, Sweep]:
    """Check the archive, load the models and check the sweep's prompts.

    Args:
        sweep: What to generate.
        options: The archive and the models.
        mode: How the archive is to be opened: "r" to read, "w" to write.
        is_remote: Whether other processes sample, so that no model is put on the devices of this one.

    Returns:
        The pipeline, and the sweep with the model's own defaults where these count.

    Raises:
        UserError: An input is missing, broken or incompatible.
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
    sweep = fit_sweep(sweep, config)
    texts = [*sweep.prompts, *sweep.sc_prompts]
    name, given = models.generator.name, [text for text in texts if text is not None]
    check_prompt_kinds(given, config, name)  # before it is put on the devices
    pipeline = Pipeline(models, options, _load_init_tokens(models, options))
    if is_remote:
        check_texts(texts, config, name, models.generator.load_tokenizer())
    else:
        pipeline.generator.check_texts(texts)
        if pipeline.generator.batch_size < options.batch_size:
            held = pipeline.generator.batch_size
            logger.warning("memory holds batches of %s images, not of %s", held, options.batch_size)
    if options.rng == "dalle-mini":  # whose `generate` has its defaults from config.json
        scale = DEFAULT_PARAMS.cond_scale if config.cond_scale is None else config.cond_scale
        defaults = SamplingParams(config.top_k, config.top_p, config.temperature, scale)
        sweep = sweep.with_defaults(defaults)
    return pipeline, sweep


def fit_sweep(sweep: Sweep, config: Any) -> Sweep:
    """Return a sweep for a model: with its own defaults, its extra settings checked and its classes named.

    Args:
        sweep: What to generate.
        config: Of the text-to-image model.

    Raises:
        UserError: The model has no such extra setting, or a value is out of range.
    """
    defaults = default_params_of(config)
    fitted = sweep if defaults is None else sweep.with_defaults(defaults)
    class_count = class_count_of(config)
    vocabulary = class_vocabulary(class_count)[0] if class_count else ""
    return fitted.for_model(vocabulary, extra_settings_of(config))


def _load_init_tokens(models: Models, options: GenerateOptions) -> "InitTokens | None":
    flags = options.init_image, options.init_tokens, options.init_count
    if all(flag is None for flag in flags):
        return None
    from dm_generations.pipelines.init_tokens import load_init_tokens

    config = models.generator.config
    return load_init_tokens(*flags, models.codec, config.image_length, config.codebook_size)
