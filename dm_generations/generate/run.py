"""Fill an archive: missing draws to batches, tokens, pictures, scores, and a transaction for each batch."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dm_generations.archive import Archive, NewImage
from dm_generations.decode.tokens import TOKEN_DTYPE
from dm_generations.errors import UserError
from dm_generations.generate.claims import Claims
from dm_generations.generate.given import Given
from dm_generations.generate.models import Models, known_model, model_info, record_model
from dm_generations.generate.progressive import write_progress
from dm_generations.generate.row_inputs import sequence_count
from dm_generations.generate.sweep import Combination, Draw, Plan, Sweep, plan
from dm_generations.inference.decoder import Decoder
from dm_generations.inference.generator import Generator, RowSettings, tokenizer_of
from dm_generations.inference.scorer import Scorer
from dm_generations.models.checkpoints import Checkpoint
from dm_generations.runtime import compile_cache
from dm_generations.runtime.device import memory_errors
from dm_generations.sampling import SAMPLER_VERSION
from dm_generations.text import load_tokenizer

SMALLER_BATCH = "use a smaller --batch-size"
SAMPLER_VERSIONS = {"rows": SAMPLER_VERSION, "dalle-mini": 1001}  # stored with each row


class Pipeline:
    """The models of a run on the devices: draws to pictures ready to store.

    batch_size: pictures at a time on each device   given: codes that every picture goes on from   progress: where to
    write the pictures while they are drawn
    Raises UserError for a model folder that lacks its tokenizer. Nothing is compiled before the first batch.
    """

    def __init__(
        self,
        models: Models,
        batch_size: int,
        rng: str = "rows",
        dtype: str = "float32",
        given: Given | None = None,
        progress: "Progressive | None" = None,
    ):
        compile_cache.enable()
        self.models = models
        self.given = given
        self.progress = progress
        self.sampler_version = SAMPLER_VERSIONS[rng]
        self.generator = Generator(models.generator, tokenizer_of(models.generator), batch_size, dtype=dtype, rng=rng)
        self._codec = self._scorer = None
        self._is_compiled = False
        if models.clip is not None or progress is not None:
            self._codec = Decoder.from_checkpoint(models.codec, batch_size, grid=models.grid)
        if models.clip is not None:
            self._scorer = make_scorer(models.clip, batch_size)

    def check(self, sweep: Sweep) -> None:
        """Raises UserError for prompts that the model cannot read, before anything is drawn."""
        self.generator.check_texts([*sweep.prompts, *sweep.sc_prompts])

    def plan(self, sweep: Sweep, archive: Archive | None) -> Plan:
        """What of `sweep` the archive lacks of these pictures."""
        generator_id = None if archive is None else known_model(archive, model_info(self.models.generator))
        return plan(sweep, archive, generator_id, self.sampler_version, self._init_md5)

    def draw(self, draws: Sequence[Draw]) -> list[NewImage]:
        """Pictures of some draws, with their scores if there is a CLIP.

        Draws of dalle-mini that hold an id which is no code are left out: it has no picture of them either.
        """
        count, init_count = len(draws), 0 if self.given is None else self.given.count

        def write(first: int, tokens: np.ndarray) -> None:
            if self.progress is not None:
                # dalle-mini draws ids that are no codes, too
                codes = np.minimum(tokens, self.generator.codebook_size - 1).astype(np.uint16)
                write_progress(self.progress.folder, draws[first : first + len(codes)], codes, self._codec)

        combinations = [draw.combination for draw in draws]
        time_start = time.time()
        rows = (
            [combination.prompt for combination in combinations],
            _row_settings(combinations),
            np.array([(draw.key0, draw.key1) for draw in draws], np.uint32),
            [combination.sc_prompt for combination in combinations],
            None if self.given is None else np.tile(self.given.tokens, (count, 1)),
            init_count,
        )
        if self.progress is None:
            sampling = self.generator.start(*rows)
            if self._scorer is not None and not self._is_compiled:  # while the devices sample
                self._scorer.compile(self._codec.compile(), rows[0])
                self._is_compiled = True
            tokens, log_probs = sampling.samples()
        else:
            tokens, log_probs = self.generator.draw(*rows, self.progress.every, write)
        time_end = time.time()
        images = [
            NewImage(
                **dataclasses.asdict(draw.combination),
                key0=draw.key0,
                key1=draw.key1,
                quantvec=row.astype(TOKEN_DTYPE).tobytes(),
                time_start=time_start,
                time_end=time_end,
                log_prob=finite(log_prob),
                dtype=self.generator.dtype,
                init_count=init_count,
                init_md5=self._init_md5,
            )
            for draw, row, log_prob in zip(draws, tokens, log_probs, strict=True)
        ]
        is_picture = (tokens < self.generator.codebook_size).all(axis=1)
        images, tokens = list(itertools.compress(images, is_picture)), tokens[is_picture]
        return images if self._scorer is None or not images else self._scored(images, tokens)

    def seconds(self, work: Plan) -> float:
        """How long `work` is going to take, by a few steps of a batch and the scoring of one. Compiles the programs."""
        sequences = sum(sequence_count(c.cond_scale) * len(indices) for c, indices in work.missing)
        seconds = math.ceil(sequences / sum(self.generator.capacities)) * self.generator.measure_seconds()
        if self._scorer is None:
            return seconds
        count = self._codec.batch_size
        tokens = np.zeros((count, self.generator.token_count), np.uint16)
        for _ in range(2):  # compiled by the first
            started = time.perf_counter()
            self._scorer.score(self._codec.start(tokens), ["a picture"] * count)
        return seconds + work.missing_count / count * (time.perf_counter() - started)

    def fill(self, archive: Archive, work: Plan, on_pictures: Callable[[int], None]) -> "Filled":
        """Draw all that `work` lists into `archive`.

        What is drawn together is one transaction, so a stop at any moment loses that and nothing else. Several
        processes may fill one archive: what one of them is drawing, the others leave to it.
        `on_pictures` hears how many pictures were stored, by this process or another.
        """
        models = self.models
        infos = [
            model_info(models.generator),
            model_info(models.codec, models.grid),
            None if models.clip is None else model_info(models.clip),
        ]
        filled = Filled(0, 0)

        def stored_elsewhere(count: int) -> None:
            filled.elsewhere += count
            on_pictures(count)

        with Claims(archive, infos[0], self.sampler_version, known_model, self._init_md5) as claims:
            capacities = self.generator.capacities
            for batch in claims.batches(work.draws(), capacities, _sequences, stored_elsewhere):
                with memory_errors(SMALLER_BATCH):
                    images = self.draw(batch)
                with archive.transaction():
                    ids = [None if info is None else record_model(archive, info) for info in infos]
                    filled.added += archive.add_images(images, *ids, self.sampler_version)
                    claims.release(batch)
                on_pictures(len(batch))
        return filled

    @property
    def _init_md5(self) -> str:
        return "" if self.given is None else self.given.md5

    def _scored(self, images: list[NewImage], tokens: np.ndarray) -> list[NewImage]:
        decoding = self._codec.start(tokens.astype(np.uint16))
        scores = self._scorer.score(decoding, [image.prompt for image in images])
        time_scored = time.time()
        return [
            dataclasses.replace(
                image,
                clip_score_input=finite(score_input),
                clip_score_tokenized=finite(score_tokenized),
                time_scored=time_scored,
            )
            for image, score_input, score_tokenized in zip(images, *scores, strict=True)
        ]


class Progressive(NamedTuple):
    """Pictures of the codes so far, after every so many, in a folder."""

    every: int
    folder: Path


@dataclasses.dataclass
class Filled:
    """Pictures that a run added, and those that other processes did meanwhile."""

    added: int
    elsewhere: int


def make_scorer(clip: Checkpoint, batch_size: int) -> Scorer:
    """The scorer of a loaded CLIP, with the tokenizer of its folder."""
    return Scorer(clip, load_tokenizer(clip.folder, "clip", clip.config.text_config.vocab_size), batch_size)


def open_archive(path: Path) -> Archive:
    """The archive at `path`, open for writing; made if there is none."""
    try:
        return Archive.open_or_create(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def finite(number: float) -> float | None:
    """A score or log-probability as the archive keeps it; None for NaN and infinity, which it does not."""
    return float(number) if math.isfinite(number) else None


def _sequences(draw: Draw) -> int:
    return sequence_count(draw.combination.cond_scale)


def _row_settings(combinations: Sequence[Combination]) -> RowSettings:
    names = [field.name for field in dataclasses.fields(RowSettings)]
    return RowSettings(*(np.array([getattr(combination, name) for combination in combinations]) for name in names))
