"""The tables and columns of an archive: ours, and the 2022 layout with whatever it has or lacks."""

import sqlite3
from pathlib import Path

from dm_generations.archive._records import ImageRow, ModelInfo, Settings
from dm_generations.archive._schema import SCHEMA_VERSION, version_of
from dm_generations.archive._sqlite import APPLICATION_ID, ArchiveError

SETTINGS = tuple(Settings.__dataclass_fields__)
IMAGE_COLUMNS = tuple(ImageRow.__dataclass_fields__)
MODEL_KINDS = {"generator_id": "generator", "codec_id": "codec", "clip_id": "clip"}  # of what a column refers to
INSERT_COLUMNS = (
    *SETTINGS,
    "key0",
    "key1",
    "quantvec",
    "quantvec_md5",
    "clip_score_input",
    "clip_score_tokenized",
    "time_start",
    "time_end",
    "time_scored",
    *MODEL_KINDS,
    "sampler_version",
    "log_prob",
    "dtype",
    "init_count",
    "init_md5",
)
# Columns of version 2, and what stands for them in an older archive, where such a name would mean something else.
ADDED = {"log_prob": "NULL", "dtype": "NULL", "init_count": "0", "init_md5": "''"}
NEEDED = frozenset(INSERT_COLUMNS) | {"id"}
NEEDED_2022 = frozenset(SETTINGS) | {"key0", "key1", "quantvec"}  # no job is impossible without the others


class Layout:
    """What an open database has; `sql` fits queries to it."""

    def __init__(self, image_columns: frozenset[str], version: int):
        """`version` is the format's, 0 for the layout of 2022."""
        self.version = version
        self.is_2022 = version == 0
        known = image_columns if version >= 2 else image_columns - ADDED.keys()
        self._expressions = _Expressions({name: name for name in known})
        if self.is_2022:
            self._expressions["id"] = "rowid"  # which need not have been declared as `id`, or at all

    def sql(self, template: str) -> str:
        """SQL from a template: `{name}` becomes that column of images, or its default where an older file lacks it."""
        return template.format_map(self._expressions)


class _Expressions(dict):
    def __missing__(self, name: str) -> str:
        return ADDED.get(name, "NULL")


def read_layout(path: Path, connection: sqlite3.Connection) -> Layout:
    """The layout of an archive; ArchiveError for any other database, and for a format newer than ours."""
    is_ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    version = max(version_of(connection), 1) if is_ours else 0
    if version > SCHEMA_VERSION:
        raise ArchiveError(
            f"{path}: this archive has format {version}, this program reads up to {SCHEMA_VERSION};"
            " install a newer dm_generations"
        )
    needed_columns = {"prompts": {"id", "desc"}, "sc_prompts": {"id", "desc"}}
    if is_ours:
        needed_columns["models"] = {"id", *ModelInfo.__dataclass_fields__}
    needed_columns["images"] = NEEDED_2022 if not is_ours else NEEDED if version >= 2 else NEEDED - ADDED.keys()
    if version >= 2:
        needed_columns["claims"] = {"digest", "owner", "expires"}
    for table, needed in needed_columns.items():
        missing = needed - columns_of(connection, table)
        if missing == needed:
            raise ArchiveError(f"{path}: this database is not an archive: it has no table {table}")
        if missing:
            names = ", ".join(sorted(missing))
            raise ArchiveError(f"{path}: this database is not an archive: table {table} lacks {names}")
    return Layout(columns_of(connection, "images"), version)


def columns_of(connection: sqlite3.Connection, table: str) -> frozenset[str]:
    """Lower-case column names of a table, empty if there is none; views and virtual tables do not count."""
    found = connection.execute(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND lower(name) = ? AND rootpage > 0", (table,)
    ).fetchone()
    if not found:
        return frozenset()
    return frozenset(row[1].lower() for row in connection.execute(f"PRAGMA table_info({table})"))
