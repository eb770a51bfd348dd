"""The tables and columns of an archive: ours, and the 2022 layout with whatever it has or lacks."""

import sqlite3
from pathlib import Path

from dm_generations.archive._records import ImageRow, ModelInfo, Settings
from dm_generations.archive._sqlite import APPLICATION_ID, ArchiveError

SCHEMA_VERSION = 1

SETTINGS = tuple(Settings.__dataclass_fields__)
IMAGE_COLUMNS = tuple(ImageRow.__dataclass_fields__)
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
    "generator_id",
    "codec_id",
    "clip_id",
    "sampler_version",
)
NEEDED = frozenset(INSERT_COLUMNS) | {"id"}
NEEDED_2022 = frozenset(SETTINGS) | {"key0", "key1", "quantvec"}  # no job is impossible without the others


class Layout:
    """What an open database has; `sql` fits queries to it."""

    def __init__(self, image_columns: frozenset[str], is_2022: bool):
        self.is_2022 = is_2022
        self._expressions = _Expressions({name: name for name in image_columns})
        if is_2022:
            self._expressions["id"] = "rowid"  # which need not have been declared as `id`, or at all

    def sql(self, template: str) -> str:
        """SQL from a template: `{name}` becomes that column of images, or NULL where a 2022 file lacks it."""
        return template.format_map(self._expressions)


class _Expressions(dict):
    def __missing__(self, name: str) -> str:
        return "NULL"


def read_layout(path: Path, connection: sqlite3.Connection) -> Layout:
    """The layout of an archive; ArchiveError for any other database, and for a format newer than ours."""
    is_ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if is_ours and version > SCHEMA_VERSION:
        raise ArchiveError(
            f"{path}: this archive has format {version}, this program reads up to {SCHEMA_VERSION};"
            " install a newer dm_generations"
        )
    needed_columns = {"prompts": {"id", "desc"}, "sc_prompts": {"id", "desc"}}
    if is_ours:
        needed_columns["models"] = {"id", *ModelInfo.__dataclass_fields__}
    needed_columns["images"] = NEEDED if is_ours else NEEDED_2022
    for table, needed in needed_columns.items():
        missing = needed - columns_of(connection, table)
        if missing == needed:
            raise ArchiveError(f"{path}: this database is not an archive: it has no table {table}")
        if missing:
            names = ", ".join(sorted(missing))
            raise ArchiveError(f"{path}: this database is not an archive: table {table} lacks {names}")
    return Layout(columns_of(connection, "images"), not is_ours)


def columns_of(connection: sqlite3.Connection, table: str) -> frozenset[str]:
    """Lower-case column names of a table, empty if there is none; views and virtual tables do not count."""
    found = connection.execute(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND lower(name) = ? AND rootpage > 0", (table,)
    ).fetchone()
    if not found:
        return frozenset()
    return frozenset(row[1].lower() for row in connection.execute(f"PRAGMA table_info({table})"))
