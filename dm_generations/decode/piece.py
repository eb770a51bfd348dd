"""One picture file under way: which pictures are on it, where it goes, and what its bytes are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.browser.manifest import Entry, GalleryEntry
from dm_generations.decode.captions import Strips
from dm_generations.decode.encode import Encoding
from dm_generations.decode.gallery import Sheet
from dm_generations.decode.metadata import Record, gallery_record, picture_record, plain
from dm_generations.decode.plan import GroupPlan, Target
from dm_generations.decode.shards import Member, Shard, fingerprint, webdataset_members
from dm_generations.decode.tokens import TOKEN_DTYPE
from dm_generations.models.loading import is_other_embedded


@dataclass(frozen=True)
class Finish:
    """What makes a file of a sheet of pixels; goes to the threads that encode."""

    encoding: Encoding
    strips: Strips
    has_metadata: bool
    models: Mapping[int, ModelInfo]  # by id, for records


@dataclass(eq=False, slots=True)
class Piece:
    """A file that becomes full picture by picture."""

    sheet: Sheet
    plan: GroupPlan
    target: Target
    rows: list[tuple[int, ImageRow]]  # with their cells; what could not be decoded is not among them
    shard: Shard | None  # what the file is a part of; None for one that stands alone

    def encoded(self, finish: Finish) -> bytes | memoryview:
        """The bytes of the file."""
        sheet, pixels = self.sheet, self.sheet.pixels
        if self.target.incomplete_path is not None and (finish.strips.captions or finish.strips.score_labels):
            pixels = finish.strips.add(pixels, sheet.cols, sheet.rows, self._caption(), self._labels())
        return finish.encoding.encode(pixels, self._record(finish) if finish.has_metadata else None)

    def members(self, finish: Finish, mode: str) -> list[Member]:
        """What goes into the shard, a "tar" or a "zip"."""
        picture = self.encoded(finish)
        if mode == "zip":
            return [(self.target.path, picture)]
        ((_, row),) = self.rows
        tokens = np.frombuffer(row.quantvec, TOKEN_DTYPE)
        return webdataset_members(picture, finish.encoding.extension, self._record(finish), tokens)

    def _record(self, finish: Finish) -> Record:
        first, plan = self.target.ranks.start, self.plan
        records = [
            picture_record(row, plan.prompt, plan.sc_prompt, first + cell, finish.models) for cell, row in self.rows
        ]
        return records[0] if self.target.incomplete_path is None else gallery_record(records)

    def _caption(self) -> tuple[str, str]:
        settings, sc_prompt = self.plan.settings, self.plan.sc_prompt
        line = f"k={settings.top_k}, p={settings.top_p}, t={settings.temperature}, c={settings.cond_scale}"
        if sc_prompt is not None:
            line += f", against: {sc_prompt}"
        return self.plan.prompt or "", line

    def _labels(self) -> list[str]:
        """Scores by cell; nothing where there is no picture or no score."""
        score_by_cell = {cell: finite_score(row) for cell, row in self.rows}
        scores = [score_by_cell.get(cell) for cell in range(len(self.target.ranks))]
        return ["" if score is None else f"{score:.2f}" for score in scores]


def finite_score(row: ImageRow) -> float | None:
    """The score by the prompt as typed, where there is one that is a number."""
    score = row.clip_score_input
    return score if isinstance(score, float) and math.isfinite(score) else None


def entry(
    plan: GroupPlan, target: Target, path: str, members: list[ImageRow], models: Mapping[int, ModelInfo]
) -> Entry | GalleryEntry:
    """What the page shows of a file. models: those of the archive, by id"""
    settings = plan.settings
    shared = {
        "file": path,
        "prompt_id": settings.prompt_id,
        "prompt": plan.prompt,
        "sc_prompt_id": settings.sc_prompt_id,
        "sc_prompt": plan.sc_prompt,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "temperature": settings.temperature,
        "cond_scale": settings.cond_scale,
    }
    scores = tuple(map(finite_score, members))
    if target.incomplete_path:
        identity = fingerprint((row.key0, row.key1, row.quantvec_md5) for row in members)
        return GalleryEntry(**shared, scores=scores, page=target.page, identity=identity)
    (row,) = members
    names = ("key0", "key1", "sampler_version", "init_count", "dtype")
    provenance = {name: plain(getattr(row, name)) for name in names}
    provenance["model"] = _drawn_by(models.get(row.generator_id))
    return Entry(**shared, rank=target.ranks.start, score=scores[0], **provenance)


def _drawn_by(model: ModelInfo | None) -> str | None:
    """What `--model` needs to draw the picture again, None where that is not known or is no more (other weights)."""
    if model is None or is_other_embedded(model.name, model.sha256, "generator"):
        return None
    return model.name
