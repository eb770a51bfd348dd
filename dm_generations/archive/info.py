"""What an archive holds, as one value: `info`."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dm_generations.archive import queries
from dm_generations.archive.database import Archive
from dm_generations.archive.records import MODEL_KINDS, PARAM_COLUMNS, grid_side


@dataclass(frozen=True)
class PromptInfo:
    """A prompt and how many images it has."""

    id: int
    text: str | None  # None: the model's own empty unconditional prompt
    image_count: int


@dataclass(frozen=True)
class ScoreInfo:
    """Smallest, mean and largest score, None where no image has one."""

    scored_count: int
    smallest: float | None
    mean: float | None
    largest: float | None


@dataclass(frozen=True)
class LogProbInfo:
    """The same for the log-probabilities of the sampled tokens."""

    image_count: int
    smallest: float | None
    mean: float | None
    largest: float | None


@dataclass(frozen=True)
class ModelUse:
    """A model and how many images refer to it."""

    id: int
    kind: str
    name: str
    sha256: str
    grid: int | None
    codebook_size: int | None
    image_size: int | None
    image_count: int


@dataclass(frozen=True)
class TokenInfo:
    """Images with token vectors of one length; grid is None where they fill no square."""

    byte_count: int
    grid: int | None
    image_count: int


@dataclass(frozen=True)
class ArchiveInfo:
    """Sizes, prompts, settings, models and scores of an archive."""

    path: str
    layout: str  # "2" for instance, the version of our format, or "2022"
    file_bytes: int
    image_count: int
    group_count: int
    smallest_group: int
    largest_group: int
    prompts: list[PromptInfo]
    sc_prompts: list[PromptInfo]
    axes: dict[str, list[float]]  # values by setting, ascending
    models: list[ModelUse]
    scores: dict[str, ScoreInfo]  # by column
    log_prob: LogProbInfo
    image_count_by_dtype: dict[str, int]  # of the images that tell what they were computed in
    continued_count: int  # images with initial tokens
    tokens: list[TokenInfo]
    first_time: float | None  # UTC Unix seconds: when the first batch started
    last_time: float | None  # and the last one ended


def info(archive: Archive) -> ArchiveInfo:
    """Sums up an archive in a few passes over the images; memory does not grow with their number."""
    groups = archive.groups()
    sizes = [group.count for group in groups]
    image_count_by_prompt: Counter[int] = Counter()
    image_count_by_sc_prompt: Counter[int] = Counter()
    for group in groups:
        image_count_by_prompt[group.key.prompt_id] += group.count
        image_count_by_sc_prompt[group.key.sc_prompt_id] += group.count
    connection = archive.connection
    return ArchiveInfo(
        path=str(archive.path),
        layout=str(archive.version or "2022"),
        file_bytes=archive.path.stat().st_size,
        image_count=sum(sizes),
        group_count=len(groups),
        smallest_group=min(sizes, default=0),
        largest_group=max(sizes, default=0),
        prompts=[PromptInfo(i, text or "", image_count_by_prompt[i]) for i, text in archive.prompts().items()],
        sc_prompts=[PromptInfo(i, text, image_count_by_sc_prompt[i]) for i, text in archive.sc_prompts().items()],
        axes={name: sorted({getattr(group.key.params, name) for group in groups}) for name in PARAM_COLUMNS},
        models=_model_uses(archive),
        scores={name: ScoreInfo(*_range(archive, name)) for name in ("clip_score_input", "clip_score_tokenized")},
        log_prob=LogProbInfo(*_range(archive, "log_prob")),
        image_count_by_dtype=dict(connection.rows(queries.COUNT_DTYPES)),
        continued_count=connection.value(queries.COUNT_CONTINUED),
        tokens=[
            TokenInfo(byte_count, grid_side(byte_count), image_count)
            for byte_count, image_count in connection.rows(queries.COUNT_LENGTHS)
        ],
        first_time=connection.value(queries.FIRST_TIME),
        last_time=connection.value(queries.LAST_TIME),
    )


def _range(archive: Archive, column: str) -> tuple[Any, ...]:
    """Count, smallest, mean, largest."""
    return next(archive.connection.rows(queries.RANGE.format(column=column)))


def _model_uses(archive: Archive) -> list[ModelUse]:
    models = archive.models()
    image_count_by_model: Counter[int] = Counter()
    for column in MODEL_KINDS if models else ():
        image_count_by_model.update(dict(archive.connection.rows(queries.COUNT_BY_MODEL.format(column=column))))
    return [
        ModelUse(
            i,
            m.kind,
            m.name,
            m.sha256,
            m.grid,
            m.codebook_size,
            m.image_size,
            image_count=image_count_by_model[i],
        )
        for i, m in models.items()
    ]
