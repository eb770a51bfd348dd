"""Whether the rows of an archive come out of their model again: drawn anew, or by replaying the codes they hold."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dm_generations import compile_cache
from dm_generations.archive import Archive, ImageRow
from dm_generations.decode.tokens import BadTokens, tokens_of
from dm_generations.generate.generator import Generator, RowSettings
from dm_generations.generate.run import SAMPLER_VERSIONS, known_model, model_info, tokenizer_of
from dm_generations.models.checkpoints import Checkpoint


@dataclass(frozen=True)
class Difference:
    """A row that the model does not give again."""

    id: int
    position: int  # of the first code that differs, or of the one that missed by most
    what: str

    def __str__(self) -> str:
        return f"image {self.id}: {self.what} at code {self.position}"


def ids_of_model(archive: Archive, generator: Checkpoint, sample: int | None) -> tuple[list[int], int]:
    """Ids of the rows that `generator` drew with this program's own noise, and how many rows are of other kinds.

    sample: at most so many, evenly spread; None is all.
    """
    generator_id = known_model(archive, model_info(generator))
    rows = archive.scan(("id", "generator_id", "sampler_version"))
    own, other_count = [], 0
    for row_id, row_generator, sampler_version in rows:
        if generator_id is not None and (row_generator, sampler_version) == (generator_id, SAMPLER_VERSIONS["rows"]):
            own.append(row_id)
        else:
            other_count += 1
    if sample is not None and sample < len(own):
        own = [own[index * len(own) // sample] for index in range(sample)]
    return own, other_count


def differences(
    archive: Archive, generator: Checkpoint, ids: Sequence[int], batch_size: int, largest_margin: float | None
) -> Iterator[list[Difference]]:
    """The rows `ids` that do not come out again, a list for each batch of rows that was looked at.

    largest_margin: None draws every row anew and compares codes. A number feeds the stored codes to the model and
    reports rows with a code that missed being drawn by more; one pass serves rows made on other hardware too.
    """
    compile_cache.enable()
    drawer = Generator(generator, tokenizer_of(generator), batch_size)
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    rows = archive.read_rows(ids)
    while batch := list(itertools.islice(rows, batch_size)):
        found, usable, tokens = [], [], []
        for row in batch:
            try:
                tokens.append(tokens_of(row.quantvec, row.quantvec_md5, drawer.token_count, drawer.codebook_size))
                usable.append(row)
            except BadTokens as error:
                found.append(Difference(row.id, 0, str(error)))
        if usable:
            stored = np.stack(tokens)
            arguments = _arguments(usable, prompts, sc_prompts)
            if largest_margin is None:
                found += _drawn_differently(usable, stored, drawer.generate(*arguments))
            else:
                found += _missed(usable, drawer.replay(*arguments, stored), largest_margin)
        yield found


def _arguments(rows: list[ImageRow], prompts: dict, sc_prompts: dict) -> tuple:
    settings = RowSettings(
        *(np.array([getattr(row, name) for row in rows]) for name in ("top_k", "top_p", "temperature", "cond_scale"))
    )
    keys = np.array([(row.key0, row.key1) for row in rows], np.uint32)
    return [prompts[row.prompt_id] for row in rows], [sc_prompts[row.sc_prompt_id] for row in rows], settings, keys


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
