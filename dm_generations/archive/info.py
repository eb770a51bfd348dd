"""`info`: what an archive holds, as one value."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dm_generations.archive import queries
from dm_generations.archive.connection import Row
from dm_generations.archive.database import Archive
from dm_generations.archive.records import MODEL_KINDS, PARAM_COLUMNS, TokenShape, grid_side
from dm_generations.archive.selection import ALL, Selection, Where, compile_nonempty


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


def info(archive: Archive, selection: Selection = ALL) -> ArchiveInfo:
    """Return what an archive holds, in a few passes over its images and in constant memory.

    Args:
        archive: The archive.
        selection: Which images count; of some, only the prompts and models are listed that they have.

    Raises:
        UserError: Nothing is selected.
    """
    where = compile_nonempty(archive, selection)
    groups = archive.count_groups(where)
    sizes = [group.count for group in groups]
    image_count_by_prompt: Counter[int] = Counter()
    image_count_by_sc_prompt: Counter[int] = Counter()
    for group in groups:
        image_count_by_prompt[group.key.prompt_id] += group.count
        image_count_by_sc_prompt[group.key.sc_prompt_id] += group.count

    def rows(query: str) -> Iterator[Row]:
        return archive.connection.rows(query.format(images=where.images), where.parameters)

    def prompts(texts: dict[int, str | None], counts: Counter[int]) -> list[PromptInfo]:
        is_listed = (lambda row_id: True) if selection.is_all else counts.__contains__
        return [PromptInfo(row_id, text, counts[row_id]) for row_id, text in texts.items() if is_listed(row_id)]

    return ArchiveInfo(
        path=str(archive.path),
        layout=str(archive.version or "2022"),
        file_bytes=archive.path.stat().st_size,
        image_count=sum(sizes),
        group_count=len(groups),
        smallest_group=min(sizes, default=0),
        largest_group=max(sizes, default=0),
        prompts=prompts({i: text or "" for i, text in archive.prompts().items()}, image_count_by_prompt),
        sc_prompts=prompts(archive.sc_prompts(), image_count_by_sc_prompt),
        axes={name: sorted({getattr(group.key.params, name) for group in groups}) for name in PARAM_COLUMNS},
        models=_model_uses(archive, where, is_all=selection.is_all),
        scores={name: _value_range(archive, name, where) for name in ("clip_score_input", "clip_score_tokenized")},
        log_prob=_value_range(archive, "log_prob", where),
        image_count_by_dtype=dict(rows(queries.COUNT_DTYPES)),
        continued_count=next(rows(queries.COUNT_CONTINUED))[0],
        tokens=[
            TokenInfo(byte_count, grid_side(byte_count), image_count)
            for byte_count, image_count in rows(queries.COUNT_LENGTHS)
        ],
        first_time=next(rows(queries.FIRST_TIME))[0],
        last_time=next(rows(queries.LAST_TIME))[0],
    )


def _value_range(archive: Archive, column: str, where: Where) -> ValueRange:
    query = queries.RANGE.format(column=column, images=where.images)
    return ValueRange(*next(archive.connection.rows(query, where.parameters)))


def _model_uses(archive: Archive, where: Where, is_all: bool) -> list[ModelUse]:
    models = archive.models()
    image_count_by_model: Counter[int] = Counter()
    for column in MODEL_KINDS if models else ():
        query = queries.COUNT_BY.format(column=column, images=where.images)
        image_count_by_model.update(dict(archive.connection.rows(query, where.parameters)))
    return [
        ModelUse(
            model_id,
            *(model.kind, model.name, model.sha256),
            *(model.token_shape, model.codebook_size, model.image_shape),
            image_count=image_count_by_model[model_id],
        )
        for model_id, model in models.items()
        if is_all or model_id in image_count_by_model
    ]
