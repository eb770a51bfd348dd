"""Codec compatibility: whether a codec decodes the rows asked for. Found out before anything is decoded."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dm_generations.archive import Archive, ImageRow, ModelInfo
from dm_generations.archive.records import BYTES_PER_TOKEN, TOKEN_DTYPE
from dm_generations.errors import UserError
from dm_generations.export.plan import GroupPlan
from dm_generations.models.loading import Checkpoint

_SAMPLE_GROUPS, _SAMPLE_ROWS = 64, 8  # enough to tell a wrong codec from a few bad rows


def check_codec(archive: Archive, plans: Sequence[GroupPlan], codec: Checkpoint) -> tuple[int, list[str]]:
    """Return the grid that a codec is to decode, in tokens a side, and warnings about it and the rows of `plans`.

    Rows that record their codec are held against that record; others (2022 archives) against their tokens. A codec
    decodes another grid than its own if the record says so.

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
        grid = recorded.grid if is_same and recorded.grid else codec.config.grid
        grids.add(grid)
        if (recorded.grid, recorded.codebook_size) != (grid, codec.config.codebook_size) or len(grids) > 1:
            theirs = f"{_describe(recorded.grid, recorded.codebook_size)} of {recorded.name!r:.100}"
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
    named = {row.codec_id for plan in plans for row in archive.rows(plan.key, plan.count)}
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
        theirs = f"{side}x{side} codes" if side**2 == token_count else f"{token_count:,} codes an image"
        raise _mismatch(archive, codec, theirs)
    largest = [int(np.frombuffer(blob, TOKEN_DTYPE).max()) for blob in sample if len(blob) == size]
    if sum(token >= codec.config.codebook_size for token in largest) > len(largest) / 2:
        raise _mismatch(archive, codec, f"codes up to {max(largest):,}")


def _read_unrecorded(archive: Archive, plan: GroupPlan) -> list[ImageRow]:
    """Return those of the best rows of a group that name no codec."""
    return [row for row in archive.rows(plan.key, min(plan.count, _SAMPLE_ROWS)) if row.codec_id is None]


def _mismatch(archive: Archive, codec: Checkpoint, theirs: str) -> UserError:
    ours = _describe(codec.config.grid, codec.config.codebook_size)
    return UserError(
        f"codec {codec.name!r} takes {ours}, but {archive.path} holds {theirs}; "
        "give the codec that they were made with: --codec FOLDER"
    )


def _describe(grid: int | None, codebook_size: int | None) -> str:
    return f"{grid}x{grid} codes below {codebook_size:,}"
