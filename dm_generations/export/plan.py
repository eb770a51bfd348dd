"""What an export is to write: which groups, which files under which names, and whether the codec decodes their rows.

File names are those of the 2022 script, made safe by the same library. A name starts with ids, settings and rank, which
are never cut. So no two images share a name, not even where file names ignore case or normalise characters, and no name
is empty, `..` or one that Windows reserves: `pathvalidate` alone does not prevent these.
"""

import functools
import math
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dm_generations.archive import Archive, GroupKey, ImageRow, ModelInfo, quantvec_md5
from dm_generations.archive.records import BYTES_PER_TOKEN, TOKEN_DTYPE, TokenShape, format_shape, square_side
from dm_generations.archive.selection import EVERY, Selection, Where, compile_nonempty
from dm_generations.errors import UserError
from dm_generations.models.loading import Checkpoint
from dm_generations.paths import sanitize_file_name, sanitize_name, utf8_path

_SAMPLE_GROUPS, _SAMPLE_ROWS = 64, 8  # enough to tell a wrong codec from a few bad rows


@dataclass(frozen=True)
class Layout:
    """How images become files.

    Attributes:
        mode: "images" is a file each, "gallery" a grid of cols x rows for each group, "npy" a file of tokens each,
            "tar" a file for each `shard_size` images, and "zip" one file for all.
        image_extension: Of image files, with its dot.
        is_seamless: Whether the images of a gallery are decoded as one.
        decodings: How often each image is decoded, from other noise each time.
    """

    mode: str
    cols: int
    rows: int
    image_extension: str = ".png"
    shard_size: int = 1000
    is_seamless: bool = False
    decodings: int = 1

    def rank(self, place: int) -> int:
        """Return the rank of the image at a place among the files of its group, which has all its decodings."""
        return place // self.decodings

    def decoding(self, place: int) -> int:
        """Return the number of the decoding at a place, from 0."""
        return place % self.decodings

    @property
    def is_gallery(self) -> bool:
        """Whether a file holds several images as one."""
        return self.mode == "gallery"

    @property
    def is_sharded(self) -> bool:
        """Whether image files are put into larger files."""
        return self.mode in ("tar", "zip")

    @property
    def has_page(self) -> bool:
        """Whether the folder gets a page, and a journal of which images its files hold."""
        return self.mode in ("images", "gallery")

    @property
    def extension(self) -> str:
        """Of the files, with its dot."""
        return ".npy" if self.mode == "npy" else self.image_extension

    @property
    def images_per_file(self) -> int:
        """Images of one image file; of a full gallery."""
        return self.cols * self.rows if self.is_gallery else 1

    def trim(self, count: int, keeps_cols: bool) -> tuple[int, int]:
        """Return columns and rows of a gallery of `count` images, without empty ones.

        Args:
            count: At most `images_per_file`.
            keeps_cols: Whether empty columns stay, for a caption that needs the width.
        """
        return self.cols if keeps_cols else min(self.cols, count), -(-count // self.cols)


@dataclass(frozen=True, slots=True)
class Target:
    """One file to write.

    Attributes:
        path: Relative to the output folder, with "/" between its two parts.
        page: Of a gallery, from 0.
        ranks: The images on it; 0 is the best of the group. If images are decoded several times, places: see `Layout`.
        incomplete_path: Of a gallery with missing images; None for single images.
    """

    path: str
    page: int
    ranks: range
    incomplete_path: str | None


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The selected images of one prompt and one setting, best first."""

    key: GroupKey
    prompt: str | None
    sc_prompt: str | None
    count: int
    where: Where = EVERY

    def rows(self, archive: Archive, limit: int | None = None) -> Iterator[ImageRow]:
        """Yield the images, or at most `limit`."""
        return archive.rows(self.key, self.count if limit is None else min(limit, self.count), self.where)

    @property
    def folder(self) -> str:
        """The group's folder in the output folder."""
        return make_folder_name(self.key.prompt_id, self.prompt)

    def describe(self) -> str:
        """Return what stands for a group in the names of shards; it never changes, so finished shards are found."""
        key, params = self.key, self.key.params
        settings = (
            f"Settings(prompt_id={key.prompt_id!r}, sc_prompt_id={key.sc_prompt_id!r}, top_k={params.top_k!r}, "
            f"top_p={params.top_p!r}, temperature={params.temperature!r}, cond_scale={params.cond_scale!r})"
        )
        if key.extra_settings:
            settings = f"{settings[:-1]}, extra_settings={key.extra_settings!r})"
        return (
            f"GroupPlan(settings={settings}, prompt={self.prompt!r}, sc_prompt={self.sc_prompt!r}, "
            f"count={self.count!r})"
        )

    def targets(self, layout: Layout) -> Iterator[Target]:
        """Yield the files of this group, best images first."""
        folder = self.folder
        fields = (self.key.sc_prompt_id, *self.key.params.values(), self.sc_prompt)
        extra = self.key.extra_settings
        name = functools.partial(make_file_name, *fields, extra_settings=extra, extension=layout.extension)
        count = self.count * layout.decodings
        for page, first in enumerate(range(0, count, layout.images_per_file)):
            ranks = range(first, min(first + layout.images_per_file, count))
            if layout.is_gallery:
                incomplete_path = f"{folder}/{name(page=page, is_incomplete=True)}"
                yield Target(f"{folder}/{name(page=page)}", page, ranks, incomplete_path)
            else:
                file = name(rank=layout.rank(first), decoding=layout.decoding(first))
                yield Target(f"{folder}/{file}", 0, ranks, None)


def select_groups(archive: Archive, selection: Selection) -> list[GroupPlan]:
    """Return the selected groups, in the order of their ids and settings.

    Raises:
        UserError: An id, a text or a scorer is not in the archive, or nothing is selected.
    """
    where = compile_nonempty(archive, selection)
    prompts, sc_prompts = archive.prompts(), archive.sc_prompts()
    groups = archive.count_groups(where)
    if not groups:
        raise UserError(f"{archive.path} holds no images; `python -m dm_generations generate` adds some")
    return [
        GroupPlan(
            group.key, prompts.get(group.key.prompt_id), sc_prompts.get(group.key.sc_prompt_id), group.count, where
        )
        for group in groups
    ]


def is_finished(out_dir: Path, path: str) -> bool:
    """Return whether a file stands at its final name: it is whole then, since files are put there by renaming.

    An empty one is not, which a power cut may leave.
    """
    try:
        status = utf8_path(out_dir, path).stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


# File names.


def make_folder_name(prompt_id: int, prompt: str | None) -> str:
    """Return the folder of a prompt's images, `0001_a prompt`, at most 255 bytes; no prompt reads `None`."""
    return sanitize_name(f"{prompt_id:04d}_{prompt}")


def make_file_name(
    sc_prompt_id: int,
    top_k: int,
    top_p: float,
    temperature: float,
    cond_scale: float,
    sc_prompt: str | None,
    *,
    rank: int | None = None,
    decoding: int = 0,
    page: int = 0,
    is_incomplete: bool = False,
    extra_settings: str = "",
    extension: str = ".png",
) -> str:
    """Return the name of an image's or gallery's file, `0001_k=50,p=1.0,t=1.0,c=10.0_00_None.png`.

    Galleries that the 2022 script could not write add a field to the settings: `,page=2` for the second page of a group
    and `,incomplete` where images are missing. `,decoding=2` follows the rank of an image that is decoded again, from
    other noise. Elsewhere `_` follows cond_scale and the rank, so a prompt's text is never mistaken for these.

    Args:
        rank: The image's rank in its group, from 0; None for a gallery, whose name has none.
        decoding: Of the image, from 0.
        page: Of a gallery, from 0.
        is_incomplete: Whether images are missing in the gallery because of bad rows.
        extra_settings: Of the group; what stands for them is a part of the MD5 of their JSON.

    Returns:
        A name of at most 255 bytes.
    """
    settings = f"{sc_prompt_id:04d}_k={top_k},p={top_p},t={temperature},c={cond_scale}"
    if extra_settings:  # any text; a hash keeps the name short, and apart from others
        settings += f",x={quantvec_md5(extra_settings.encode())[:8]}"
    if page:
        settings += f",page={page + 1}"
    if is_incomplete:
        settings += ",incomplete"
    rank_field = "" if rank is None else f"_{rank:02d}"
    if decoding:
        rank_field += f",decoding={decoding + 1}"
    return sanitize_file_name(f"{settings}{rank_field}_{sc_prompt}", extension)


# Codec compatibility.


def check_codec(archive: Archive, plans: Sequence[GroupPlan], codec: Checkpoint) -> tuple[int, list[str]]:
    """Return the grid that a codec is to decode, in tokens a side, and warnings about it and the rows of `plans`.

    Rows that record their codec are compared with that record; of others (2022 archives) the tokens are checked. A
    codec decodes another grid than its own if the record says so.

    Raises:
        UserError: The codec's grid or codebook is not that of the rows.
    """
    warnings, grids = [], set()
    models = archive.models()
    for codec_id in _find_recorded_codecs(archive, plans, models):
        if codec_id is None:
            _check_tokens(archive, plans, codec)
            continue
        recorded = models[codec_id]
        is_same = recorded.sha256 == codec.sha256
        side = square_side(recorded.token_shape)
        grid = side if is_same and side else codec.config.grid
        grids.add(grid)
        if (side, recorded.codebook_size) != (grid, codec.config.codebook_size) or len(grids) > 1:
            theirs = f"{_describe(recorded.token_shape, recorded.codebook_size)} of {recorded.name!r:.100}"
            raise _mismatch(archive, codec, theirs)
        if not is_same:
            warnings.append(
                f"codec {codec.name!r} has other weights than {recorded.name!r:.100}, "
                "with which these images were made: they will look different"
            )
    return next(iter(grids), codec.config.grid), warnings


def _find_recorded_codecs(
    archive: Archive, plans: Sequence[GroupPlan], models: dict[int, ModelInfo]
) -> Sequence[int | None]:
    """Return the ids of the codecs that the selected rows name; None for rows that name none."""
    codec_ids = [model_id for model_id, model in models.items() if model.kind == "codec"]
    if not codec_ids:
        return [None]
    if len(codec_ids) == 1:
        return codec_ids
    named = {row.codec_id for plan in plans for row in plan.rows(archive)}
    return [codec_id for codec_id in codec_ids if codec_id in named] + ([None] if None in named else [])


def _check_tokens(archive: Archive, plans: Sequence[GroupPlan], codec: Checkpoint) -> None:
    """Raise UserError when most of a sample of rows has another length, or tokens beyond the codebook."""
    sample = [
        row.quantvec
        for plan in plans[:: max(1, len(plans) // _SAMPLE_GROUPS)]
        for row in _read_unrecorded(archive, plan)
        if row.quantvec  # else it says nothing about a codec
    ]
    if not sample:
        return
    size, _ = Counter(map(len, sample)).most_common(1)[0]
    token_count = size // BYTES_PER_TOKEN
    if token_count != codec.config.grid**2:
        side = math.isqrt(token_count)
        theirs = f"{side}x{side} tokens" if side**2 == token_count else f"{token_count:,} tokens an image"
        raise _mismatch(archive, codec, theirs)
    largest = [int(np.frombuffer(blob, TOKEN_DTYPE).max()) for blob in sample if len(blob) == size]
    if sum(token >= codec.config.codebook_size for token in largest) > len(largest) / 2:
        raise _mismatch(archive, codec, f"tokens up to {max(largest):,}")


def _read_unrecorded(archive: Archive, plan: GroupPlan) -> list[ImageRow]:
    """Return those of the best rows of a group that name no codec."""
    return [row for row in plan.rows(archive, _SAMPLE_ROWS) if row.codec_id is None]


def _mismatch(archive: Archive, codec: Checkpoint, theirs: str) -> UserError:
    ours = _describe((codec.config.grid, codec.config.grid), codec.config.codebook_size)
    return UserError(
        f"codec {codec.name!r} takes {ours}, but {archive.path} holds {theirs}; "
        "choose the codec that they were made with: --codec FOLDER"
    )


def _describe(token_shape: TokenShape | None, codebook_size: int | None) -> str:
    if token_shape is None or codebook_size is None:
        return "tokens of an unknown shape"
    return f"{format_shape(token_shape)} tokens below {codebook_size:,}"
