"""Check that a model reproduces the rows of an archive, by sampling them anew or by replaying their stored tokens."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dm_generations.archive import Archive, ImageRow
from dm_generations.archive.records import BadTokensError, parse_config, tokens_from_blob
from dm_generations.archive.selection import EVERY, Where
from dm_generations.errors import UserError
from dm_generations.inference.generator import Generator
from dm_generations.models.base import extra_settings_of
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.generate import SAMPLER_VERSIONS
from dm_generations.runtime import compile_cache
from dm_generations.sampling.params import complete_extra_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mismatch:
    """A row that the model does not reproduce.

    Attributes:
        position: Of the first token that differs, or of the one with the largest margin.
    """

    id: int
    position: int
    what: str

    def __str__(self) -> str:
        return f"image {self.id}: {self.what} at token {self.position}"


@dataclass
class ReproduceReport:
    """What was checked."""

    checked_count: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)


def reproduce_archive(
    archive: Archive,
    checkpoint: Checkpoint,
    batch_size: int,
    max_margin: float | None = None,
    sample_count: int | None = None,
    on_mismatch: Callable[[Mismatch], None] = lambda mismatch: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    where: Where = EVERY,
) -> ReproduceReport:
    """Check the rows that a model sampled with this program's own noise, each in the dtype it was sampled in.

    Args:
        archive: Only read.
        checkpoint: The text-to-image model.
        batch_size: Images at a time on each device, as the rows were sampled with.
        max_margin: See `find_mismatches`.
        sample_count: Check at most so many rows, evenly spread; None is all.
        on_mismatch: Called with each mismatch when it is found.
        on_progress: Called with (done, total) rows after every batch.
        where: Which rows, a compiled selection.

    Raises:
        UserError: The archive has no row of this model.
    """
    ids_by_dtype, other_count = select_ids(archive, checkpoint, sample_count, where)
    if other_count:
        logger.warning("%s rows not checked: sampled by another model, or with noise of another program", other_count)
    total = sum(map(len, ids_by_dtype.values()))
    if not total:
        raise UserError(
            f"{archive.path} has no row that {checkpoint.name!r} sampled with this program's own noise; give the model "
            "with --model, and the flags about it that it was sampled with"
        )
    report = ReproduceReport()
    for dtype, ids in ids_by_dtype.items():
        for count, mismatches in find_mismatches(archive, checkpoint, ids, batch_size, max_margin, dtype):
            for mismatch in mismatches:
                on_mismatch(mismatch)
            report.checked_count += count
            report.mismatches += mismatches
            on_progress(report.checked_count, total)
    return report


def select_ids(
    archive: Archive, checkpoint: Checkpoint, sample_count: int | None, where: Where = EVERY
) -> tuple[dict[str, list[int]], int]:
    """Find the rows that a model sampled with this program's own noise.

    Args:
        archive: Only read.
        checkpoint: The text-to-image model.
        sample_count: Return at most so many, evenly spread; None is all.
        where: Which rows, a compiled selection.

    Returns:
        The rows' ids by dtype, and how many other rows there are.
    """
    generator_id = archive.find_model(checkpoint.model_info())
    own: list[tuple[int, str]] = []
    other_count = 0
    columns = ("id", "generator_id", "sampler_version", "dtype")
    for row_id, row_generator, sampler_version, dtype in archive.scan(columns, where=where):
        if generator_id is not None and (row_generator, sampler_version) == (generator_id, SAMPLER_VERSIONS["rows"]):
            own.append((row_id, dtype or "float32"))
        else:
            other_count += 1
    if sample_count is not None and sample_count < len(own):
        own = [own[index * len(own) // sample_count] for index in range(sample_count)]
    ids_by_dtype: dict[str, list[int]] = {}
    for row_id, dtype in own:
        ids_by_dtype.setdefault(dtype, []).append(row_id)
    return ids_by_dtype, other_count


def find_mismatches(
    archive: Archive,
    checkpoint: Checkpoint,
    ids: Sequence[int],
    batch_size: int,
    max_margin: float | None,
    dtype: str = "float32",
) -> Iterator[tuple[int, list[Mismatch]]]:
    """Find the rows among `ids` that the model does not reproduce.

    Args:
        archive: Only read.
        checkpoint: The model that sampled the rows.
        ids: Of rows.
        batch_size: Images at a time on each device, as the rows were sampled with.
        max_margin: None samples every row anew and compares tokens. A number feeds the stored tokens to the model, and
            reports rows with a token that missed being sampled by more; that also serves rows made on other hardware.
        dtype: What the rows were sampled in.

    Yields:
        After each batch, how many rows were checked and their mismatches.
    """
    compile_cache.enable()
    generator = Generator(checkpoint, checkpoint.load_tokenizer(), batch_size, dtype=dtype)
    prompts, sc_prompts, classes = archive.prompts(), archive.sc_prompts(), archive.classes()
    rows, known = archive.read_rows(ids), extra_settings_of(checkpoint.config)
    while batch := list(itertools.islice(rows, sum(generator.capacities))):
        found: list[Mismatch] = []
        usable: list[ImageRow] = []
        tokens: list[np.ndarray] = []
        extra: list[dict[str, int | float]] = []
        for row in batch:
            try:
                row_tokens = tokens_from_blob(
                    row.quantvec, row.quantvec_md5, generator.token_count, generator.codebook_size
                )
                row.params.validate()
                extra_settings = complete_extra_settings(known, parse_config(row.extra_settings or "{}"))
            except (BadTokensError, UserError) as error:
                found.append(Mismatch(row.id, 0, str(error)))
                continue
            usable.append(row)
            extra.append(extra_settings)
            tokens.append(row_tokens)
        if usable:
            stored = np.stack(tokens)
            params = [row.params for row in usable]
            texts = [classes.get(row.prompt_id) or prompts[row.prompt_id] or "" for row in usable]
            keys = np.array([(row.key0, row.key1) for row in usable], np.uint32)
            sc_texts = [sc_prompts[row.sc_prompt_id] for row in usable]
            init_counts = np.array([row.init_count for row in usable])
            if max_margin is None:
                sampled = generator.generate(texts, params, keys, sc_texts, stored, init_counts, extra)
                found += _compare_tokens(usable, stored, sampled)
            else:
                margins = generator.teacher_forced_margins(texts, params, keys, stored, sc_texts, init_counts, extra)
                found += _compare_margins(usable, margins, max_margin)
        yield len(batch), found


def _compare_tokens(rows: list[ImageRow], stored: np.ndarray, sampled: np.ndarray) -> Iterator[Mismatch]:
    for row, old, new in zip(rows, stored, sampled, strict=True):
        differing = np.flatnonzero(old != new)
        if differing.size:
            position = int(differing[0])
            yield Mismatch(row.id, position, f"has {old[position]}, the model samples {new[position]}")


def _compare_margins(rows: list[ImageRow], margins: np.ndarray, largest: float) -> Iterator[Mismatch]:
    for row, row_margins in zip(rows, np.where(np.isnan(margins), np.inf, margins), strict=True):
        position = int(row_margins.argmax())
        if row_margins[position] > largest:
            yield Mismatch(row.id, position, f"its token missed being sampled by {row_margins[position]:.3g}")
