"""Archives of pictures as tokens, in SQLite. Standard library only; never imports JAX or NumPy.

with Archive.open("archive/emoji.db") as archive:
    for group in archive.groups():
        best = next(archive.rows(group.settings, limit=1))
"""

from dm_generations.archive._info import ArchiveInfo, LogProbInfo, ModelUse, PromptInfo, ScoreInfo, TokenInfo, info
from dm_generations.archive._merge import SourceReport, merge
from dm_generations.archive._records import DTYPES, Group, ImageRow, ModelInfo, NewImage, Settings
from dm_generations.archive._sqlite import ArchiveError
from dm_generations.archive._store import Archive
from dm_generations.archive._tokens import init_md5, quantvec_md5
from dm_generations.archive._verify import Problem, verify

__all__ = [
    "DTYPES",
    "Archive",
    "ArchiveError",
    "ArchiveInfo",
    "Group",
    "ImageRow",
    "LogProbInfo",
    "ModelInfo",
    "ModelUse",
    "NewImage",
    "Problem",
    "PromptInfo",
    "ScoreInfo",
    "Settings",
    "SourceReport",
    "TokenInfo",
    "info",
    "init_md5",
    "merge",
    "quantvec_md5",
    "verify",
]
