"""Whether the rows of an archive come out of their model again: drawn anew, or by replaying the codes they hold."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from dm_generations import compile_cache
from dm_generations.archive import Archive, ImageRow
from dm_generations.decode.tokens import BadTokens, tokens_of
from dm_generations.generate.generator import Generator, RowSettings, tokenizer_of
from dm_generations.generate.run import SAMPLER_VERSIONS
from dm_generations.models.loading import Checkpoint
from dm_generations.pipelines.model_records import known_model, model_info

_SETTINGS = tuple(field.name for field in fields(RowSettings))


@dataclass(frozen=True)
class Difference:
    """A row that the model does not give again."""

    id: int
    position: int  # of the first code that differs, or of the one that missed by most
    what: str

    def __str__(self) -> str:
        return f"image {self.id}: {self.what} at code {self.position}"


def ids_of_model(archive: Archive, generator: Checkpoint, sample: int | None) -> tuple[dict[str, list[int]], int]:
    """Ids of the rows that `generator` drew with this program's own noise, by dtype, and how many others there are.

    sample: at most so many, evenly spread; None is all.
    """
    generator_id = known_model(archive, model_info(generator))
    own, other_count = [], 0
    columns = ("id", "generator_id", "sampler_version", "dtype")
    for row_id, row_generator, sampler_version, dtype in archive.scan(columns):
        if generator_id is not None and (row_generator, sampler_version) == (generator_id, SAMPLER_VERSIONS["rows"]):
            own.append((row_id, dtype or "float32"))
        else:
            other_count += 1
    if sample is not None and sample < len(own):
        own = [own[index * len(own) // sample] for index in range(sample)]
    ids: dict[str, list[int]] = {}
    for row_id, dtype in own:
        ids.setdefault(dtype, []).append(row_id)
    return ids, other_count


def differences(
    archive: Archive,
    generator: Checkpoint,
    ids: Sequence[int],
    batch_size: int,
    largest_margin: float | None,
    dtype: str = "float32",
) -> Iterator[tuple[int, list[Difference]]]:
    """The rows `ids` that do not come out again: how many rows were looked at, and those of them, batch after batch.

    largest_margin: None draws every row anew and compares codes. A number feeds the stored codes to the model and
    reports rows with a code that missed being drawn by more; one pass serves rows made on other hardware too.
    dtype: that the rows were drawn in
    """
    compile_cache.enable()
    drawer = Generator(generator, tokenizer_of(generator), batch_size, dtype=dtype)
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    rows = archive.read_rows(ids)
    while batch := list(itertools.islice(rows, sum(drawer.capacities))):
        found, usable, tokens = [], [], []
        for row in batch:
            try:
                tokens.append(tokens_of(row.quantvec, row.quantvec_md5, drawer.token_count, drawer.codebook_size))
                usable.append(row)
            except BadTokens as error:
                found.append(Difference(row.id, 0, str(error)))
        if usable:
            stored = np.stack(tokens)
            settings = RowSettings(*(np.array([getattr(row, name) for row in usable]) for name in _SETTINGS))
            keys = np.array([(row.key0, row.key1) for row in usable], np.uint32)
            what = [prompts[row.prompt_id] for row in usable], settings, keys
            sc_texts = [sc_prompts[row.sc_prompt_id] for row in usable]
            kept = np.array([row.init_count for row in usable])
            if largest_margin is None:
                found += _drawn_differently(usable, stored, drawer.generate(*what, sc_texts, stored, kept))
            else:
                found += _missed(usable, drawer.replay(*what, stored, sc_texts, kept), largest_margin)
        yield len(batch), found


def _drawn_differently(rows: list[ImageRow], stored: np.ndarray, drawn: np.ndarray) -> Iterator[Difference]:
    for row, old, new in zip(rows, stored, drawn, strict=True):
        differing = np.flatnonzero(old != new)
        if differing.size:
            position = int(differing[0])
            yield Difference(row.id, position, f"holds {old[position]}, the model draws {new[position]}")


def _missed(rows: list[ImageRow], margins: np.ndarray, largest: float) -> Iterator[Difference]:
    for row, row_margins in zip(rows, np.where(np.isnan(margins), np.inf, margins), strict=True):
        position = int(row_margins.argmax())
        if row_margins[position] > largest:
            yield Difference(row.id, position, f"its code missed being drawn by {row_margins[position]:.3g}")
