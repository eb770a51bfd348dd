"""One output file under way: which images are on it, where it goes, and what its bytes are.

H, W: pixels of one image   L: tokens of one image
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.archive.records import TOKEN_DTYPE
from dm_generations.export.captions import Strips
from dm_generations.export.encoders import (
    Encoding,
    Record,
    encode_npy,
    gallery_record,
    image_record,
    json_value,
    record_json,
)
from dm_generations.export.manifest import Entry, GalleryEntry, ImageEntry
from dm_generations.export.plan import GroupPlan, Target
from dm_generations.export.writers import Member, Shard, fingerprint
from dm_generations.models.loading import is_other_embedded


@dataclass(frozen=True)
class EncodeContext:
    """What all files of an export share; goes to the threads that encode.

    Attributes:
        mode: That of the Layout.
        models: Those of the archive, by id, for records.
    """

    mode: str
    encoding: Encoding
    strips: Strips
    has_metadata: bool
    models: Mapping[int, ModelInfo]


@dataclass(eq=False, slots=True)
class OutputFile:
    """A file that is filled image by image: a grid, row by row, black where there is none; one image is a grid of one.

    Attributes:
        path: Where it goes, relative to the output folder.
        replaced_path: What can go once it is there.
        rows: The rows on it, with their cells; those that cannot be decoded are left out.
        shard: The file that it is put into; None for one of its own.
        grid: Columns and rows.
        pixels: (rows * H, cols * W, 3) uint8, once an image is placed; tokens (L,) in files of tokens.
    """

    path: str
    replaced_path: str | None
    plan: GroupPlan
    target: Target
    rows: list[tuple[int, ImageRow]]
    shard: Shard | None = None
    grid: tuple[int, int] = (1, 1)
    pixels: np.ndarray | None = None
    placed_count: int = 0

    @property
    def is_full(self) -> bool:
        """Whether all images that were to be placed are."""
        return self.placed_count == len(self.rows)

    def place(self, cell: int, image: np.ndarray) -> None:
        """Put an image (H, W, 3) uint8 into a cell, counted along the rows."""
        self.placed_count += 1
        cols, rows = self.grid
        if cols * rows == 1:
            self.pixels = image.copy()  # a view would hold the whole batch
            return
        height, width, channels = image.shape
        if self.pixels is None:
            self.pixels = np.zeros((rows * height, cols * width, channels), np.uint8)
        row, col = divmod(cell, cols)
        self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = image

    def place_all(self, pixels: np.ndarray) -> None:
        """Put all images at once, (rows * H, cols * W, 3) uint8; cells without an image become black."""
        self.placed_count = len(self.rows)
        self.pixels = pixels.copy()
        cols, rows = self.grid
        height, width = pixels.shape[0] // rows, pixels.shape[1] // cols
        for cell in set(range(rows * cols)).difference(cell for cell, _ in self.rows):
            row, col = divmod(cell, cols)
            self.pixels[row * height : (row + 1) * height, col * width : (col + 1) * width] = 0

    def encode(self, context: EncodeContext) -> bytes:
        """Return the bytes of the file."""
        pixels = self.pixels
        assert pixels is not None, "filled"
        if context.mode == "npy":
            return encode_npy(pixels)
        if self.target.incomplete_path is not None and context.strips:
            pixels = context.strips.add(pixels, *self.grid, self._caption(), self._labels())
        return context.encoding.encode(pixels, self._record(context) if context.has_metadata else None)

    def encode_members(self, context: EncodeContext) -> list[Member]:
        """Return what goes into the shard: the file, and in a tar also its row as JSON and its prompt."""
        image = self.encode(context)
        if context.mode == "zip":
            return [(self.target.path, image)]
        ((_, row),) = self.rows
        record = self._record(context)
        record["tokens"] = np.frombuffer(row.quantvec, TOKEN_DTYPE).tolist()
        key, prompt = f"{row.id:09d}", (self.plan.prompt or "").encode("utf-8", "replace")
        return [
            (key + context.encoding.extension, image),
            (f"{key}.json", record_json(record)),
            (f"{key}.txt", prompt),
        ]

    def _record(self, context: EncodeContext) -> Record:
        first, plan = self.target.ranks.start, self.plan
        records = [
            image_record(row, plan.prompt, plan.sc_prompt, first + cell, context.models) for cell, row in self.rows
        ]
        return records[0] if self.target.incomplete_path is None else gallery_record(records)

    def _caption(self) -> tuple[str, str]:
        params, sc_prompt = self.plan.key.params, self.plan.sc_prompt
        line = f"k={params.top_k}, p={params.top_p}, t={params.temperature}, c={params.cond_scale}"
        if sc_prompt is not None:
            line += f", against: {sc_prompt}"
        return self.plan.prompt or "", line

    def _labels(self) -> list[str]:
        """Return scores by cell; nothing where there is no image or no score."""
        score_by_cell = {cell: _finite_score(row) for cell, row in self.rows}
        scores = [score_by_cell.get(cell) for cell in range(len(self.target.ranks))]
        return ["" if score is None else f"{score:.2f}" for score in scores]


def fill_cells(tokens_by_cell: Mapping[int, np.ndarray], cell_count: int) -> np.ndarray:
    """Return the tokens of a gallery that is decoded as one.

    A cell without an image gets one of the others: whatever stands there changes the images next to it a little, and
    this is least seen.

    Args:
        tokens_by_cell: (L,) each, at least one.
        cell_count: Cells of the gallery.

    Returns:
        (cell_count, L).
    """
    present = list(tokens_by_cell.values())
    return np.stack([tokens_by_cell.get(cell, present[cell % len(present)]) for cell in range(cell_count)])


def make_entry(
    plan: GroupPlan, target: Target, path: str, members: list[ImageRow], models: Mapping[int, ModelInfo]
) -> Entry:
    """Return what the page shows of a file.

    Args:
        path: Where the file is: the target's, or its incomplete one.
        members: The rows of the target's ranks.
        models: Those of the archive, by id.
    """
    shared: dict[str, Any] = {
        "file": path,
        "prompt_id": plan.key.prompt_id,
        "prompt": plan.prompt,
        "sc_prompt_id": plan.key.sc_prompt_id,
        "sc_prompt": plan.sc_prompt,
        **asdict(plan.key.params),
    }
    scores = tuple(map(_finite_score, members))
    if target.incomplete_path:
        identity = fingerprint((row.key0, row.key1, row.quantvec_md5) for row in members)
        return GalleryEntry(**shared, scores=scores, page=target.page, identity=identity)
    (row,) = members
    names = ("key0", "key1", "sampler_version", "init_count", "dtype")
    provenance: dict[str, Any] = {name: json_value(getattr(row, name)) for name in names}
    generator = None if row.generator_id is None else models.get(row.generator_id)
    provenance["model"] = _find_generator_name(generator)
    return ImageEntry(**shared, rank=target.ranks.start, score=scores[0], **provenance)


def _finite_score(row: ImageRow) -> float | None:
    """Return the score by the prompt as typed, where there is one that is a number."""
    score = row.clip_score_input
    return score if isinstance(score, float) and math.isfinite(score) else None


def _find_generator_name(model: ModelInfo | None) -> str | None:
    """Return what `--model` needs to sample an image again; None where that is not known or gone (other weights)."""
    if model is None or is_other_embedded(model.name, model.sha256, "generator"):
        return None
    return model.name
