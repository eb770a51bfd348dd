"""Archives of images as tokens, in SQLite. Needs only the standard library; never imports JAX or NumPy.

>>> with Archive.open("archive/emoji.db") as archive:
...     for group in archive.groups(prompt="a rocket", temperature=1, top_p=1, cond_scale=3):
...         best = next(archive.rows(group.key, limit=1))
...         print(group.key.params.top_k, group.count, round(best.clip_score_input, 1))
0 8 20.4
50 8 20.4
256 8 20.4
"""

from dm_generations.archive.connection import ArchiveError
from dm_generations.archive.database import Archive
from dm_generations.archive.info import ArchiveInfo, ModelUse, PromptInfo, TokenInfo, ValueRange, info
from dm_generations.archive.merge import SourceReport, merge
from dm_generations.archive.records import (
    DTYPES,
    DType,
    Group,
    GroupKey,
    ImageRow,
    ModelInfo,
    ModelKind,
    NewImage,
    init_md5,
    quantvec_md5,
)
from dm_generations.archive.selection import Filters, Selection
from dm_generations.archive.verify import Problem, verify

__all__ = [
    "DTYPES",
    "Archive",
    "ArchiveError",
    "ArchiveInfo",
    "DType",
    "Filters",
    "Group",
    "GroupKey",
    "ImageRow",
    "ModelInfo",
    "ModelKind",
    "ModelUse",
    "NewImage",
    "Problem",
    "PromptInfo",
    "Selection",
    "SourceReport",
    "TokenInfo",
    "ValueRange",
    "info",
    "init_md5",
    "merge",
    "quantvec_md5",
    "verify",
]
