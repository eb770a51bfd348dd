"""What an archive holds, as one value: `info`."""

from collections import Counter
from dataclasses import dataclass

from dm_generations.archive._layout import MODEL_KINDS, SETTINGS
from dm_generations.archive._store import Archive
from dm_generations.archive._tokens import grid_side

COUNT_LENGTHS = """
SELECT length(quantvec), count(*) FROM images WHERE typeof(quantvec) = 'blob' GROUP BY 1 ORDER BY 1
"""
RANGE = """
SELECT count({column}), min({column}), avg({column}), max({column}) FROM images
WHERE typeof({column}) IN ('real', 'integer')
"""
COUNT_DTYPES = "SELECT {dtype}, count(*) FROM images WHERE typeof({dtype}) = 'text' GROUP BY 1 ORDER BY 1"
COUNT_CONTINUED = "SELECT count(*) FROM images WHERE {init_count} > 0"

AXES = SETTINGS[2:]  # top_k, top_p, temperature, cond_scale


@dataclass(frozen=True)
class PromptInfo:
    id: int
    text: str | None  # None: the model's own empty unconditional prompt
    image_count: int


@dataclass(frozen=True)
class ScoreInfo:
    """Smallest, mean and largest score, None where no picture has one."""

    scored_count: int
    smallest: float | None
    mean: float | None
    largest: float | None


@dataclass(frozen=True)
class LogProbInfo:
    """The same for the log-probabilities of the codes that were drawn."""

    image_count: int
    smallest: float | None
    mean: float | None
    largest: float | None


@dataclass(frozen=True)
class ModelUse:
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
    """Pictures with token vectors of one length; grid is None where they fill no square."""

    byte_count: int
    grid: int | None
    image_count: int


@dataclass(frozen=True)
class ArchiveInfo:
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
    image_count_by_dtype: dict[str, int]  # of the pictures that tell what they were computed in
    continued_count: int  # pictures that go on from given codes
    tokens: list[TokenInfo]
    first_time: float | None  # UTC Unix seconds: when the first batch started
    last_time: float | None  # and the last one ended


def info(archive: Archive) -> ArchiveInfo:
    """Everything that `info` prints; a few passes over the pictures, in constant memory."""
    groups = archive.groups()
    sizes = [group.count for group in groups]
    image_count_by_prompt: Counter[int] = Counter()
    image_count_by_sc_prompt: Counter[int] = Counter()
    for group in groups:
        image_count_by_prompt[group.settings.prompt_id] += group.count
        image_count_by_sc_prompt[group.settings.sc_prompt_id] += group.count
    first_time = archive.query("SELECT min({time_start}) FROM images WHERE typeof({time_start}) = 'real'")
    last_time = archive.query("SELECT max({time_end}) FROM images WHERE typeof({time_end}) = 'real'")
    return ArchiveInfo(
        path=str(archive.path),
        layout="2022" if archive.is_2022 else str(archive.version),
        file_bytes=archive.path.stat().st_size,
        image_count=sum(sizes),
        group_count=len(groups),
        smallest_group=min(sizes, default=0),
        largest_group=max(sizes, default=0),
        prompts=[PromptInfo(i, text or "", image_count_by_prompt[i]) for i, text in archive.prompts().items()],
        sc_prompts=[PromptInfo(i, text, image_count_by_sc_prompt[i]) for i, text in archive.sc_prompts().items()],
        axes={name: sorted({getattr(group.settings, name) for group in groups}) for name in AXES},
        models=_models(archive),
        scores={name: ScoreInfo(*_range(archive, name)) for name in ("clip_score_input", "clip_score_tokenized")},
        log_prob=LogProbInfo(*_range(archive, "log_prob")),
        image_count_by_dtype=dict(archive.query(COUNT_DTYPES)),
        continued_count=archive.query(COUNT_CONTINUED)[0][0],
        tokens=[
            TokenInfo(byte_count, grid_side(byte_count), image_count)
            for byte_count, image_count in archive.query(COUNT_LENGTHS)
        ],
        first_time=first_time[0][0],
        last_time=last_time[0][0],
    )


def _range(archive: Archive, column: str) -> tuple:
    """Count, smallest, mean, largest."""
    return archive.query(RANGE.replace("column", column))[0]


def _models(archive: Archive) -> list[ModelUse]:
    if archive.is_2022:
        return []
    image_count_by_model: Counter[int] = Counter()
    for column in MODEL_KINDS:
        counts = archive.query(f"SELECT {{{column}}}, count(*) FROM images GROUP BY 1")
        image_count_by_model.update(dict(counts))
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
        for i, m in archive.models().items()
    ]
