"""`info`: what an archive holds, as one value."""

from collections import Counter
from dataclasses import dataclass

from dm_generations.archive import queries
from dm_generations.archive.database import Archive
from dm_generations.archive.records import MODEL_KINDS, PARAM_COLUMNS, TokenShape, grid_side


@dataclass(frozen=True)
class PromptInfo:
    """A prompt and how many images it has."""

    id: int
    text: str | None  # None: the model's own empty unconditional prompt
    image_count: int


@dataclass(frozen=True)
class ValueRange:
    """How many images have a value; the smallest, mean and largest one, None if no image has one."""

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
    token_shape: TokenShape | None
    codebook_size: int | None
    image_shape: tuple[int, int] | None
    image_count: int


@dataclass(frozen=True)
class TokenInfo:
    """The images with token vectors of one length; `grid` is None if these do not fill a square."""

    byte_count: int
    grid: int | None
    image_count: int


@dataclass(frozen=True)
class ArchiveInfo:
    """Sizes, prompts, settings, models and scores of an archive.

    Attributes:
        path: The file.
        layout: Version of the format, as "2", or "2022".
        file_bytes: Size of the file.
        image_count: Images.
        group_count: Groups: combinations of prompt and settings.
        smallest_group: Images in the smallest group.
        largest_group: Images in the largest group.
        prompts: In order of id.
        sc_prompts: Unconditional prompts, in order of id.
        axes: Values by setting, ascending.
        models: In order of id.
        scores: By column.
        log_prob: Log-probabilities of the sampled tokens.
        image_count_by_dtype: Of the images that record what they were computed in.
        continued_count: Images with initial tokens.
        tokens: By length of the token vectors.
        first_time: When the first batch started, UTC Unix seconds.
        last_time: When the last batch ended.
    """

    path: str
    layout: str
    file_bytes: int
    image_count: int
    group_count: int
    smallest_group: int
    largest_group: int
    prompts: list[PromptInfo]
    sc_prompts: list[PromptInfo]
    axes: dict[str, list[float]]
    models: list[ModelUse]
    scores: dict[str, ValueRange]
    log_prob: ValueRange
    image_count_by_dtype: dict[str, int]
    continued_count: int
    tokens: list[TokenInfo]
    first_time: float | None
    last_time: float | None


def info(archive: Archive) -> ArchiveInfo:
    """Return what an archive holds, in a few passes over its images and in constant memory."""
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
        scores={name: _value_range(archive, name) for name in ("clip_score_input", "clip_score_tokenized")},
        log_prob=_value_range(archive, "log_prob"),
        image_count_by_dtype=dict(connection.rows(queries.COUNT_DTYPES)),
        continued_count=connection.value(queries.COUNT_CONTINUED),
        tokens=[
            TokenInfo(byte_count, grid_side(byte_count), image_count)
            for byte_count, image_count in connection.rows(queries.COUNT_LENGTHS)
        ],
        first_time=connection.value(queries.FIRST_TIME),
        last_time=connection.value(queries.LAST_TIME),
    )


def _value_range(archive: Archive, column: str) -> ValueRange:
    return ValueRange(*next(archive.connection.rows(queries.RANGE.format(column=column))))


def _model_uses(archive: Archive) -> list[ModelUse]:
    models = archive.models()
    image_count_by_model: Counter[int] = Counter()
    for column in MODEL_KINDS if models else ():
        image_count_by_model.update(dict(archive.connection.rows(queries.COUNT_BY_MODEL.format(column=column))))
    return [
        ModelUse(
            model_id,
            *(model.kind, model.name, model.sha256),
            *(model.token_shape, model.codebook_size, model.image_shape),
            image_count=image_count_by_model[model_id],
        )
        for model_id, model in models.items()
    ]
