"""The versions of the format, whose SQL is in `schema/`: 0001.sql makes version 1, each later file the next one."""

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Final

from dm_generations.archive.connection import APPLICATION_ID, ArchiveError, Connection
from dm_generations.archive.records import IMAGE_COLUMNS, INSERT_COLUMNS, MODEL_KINDS, ModelInfo
from dm_generations.paths import shipped

SCHEMA_VERSION: Final = 2
INDEXES: Final = frozenset({"images_by_group", "images_draw"})
TABLES: Final = ("prompts", "sc_prompts", "models", "images")
ALL_COLUMNS: Final = tuple(dict.fromkeys((*IMAGE_COLUMNS, *INSERT_COLUMNS)))  # of images
# Columns of version 2 with their values for an older archive, in which such a name would mean something else.
ADDED: Final[Mapping[str, str]] = {"log_prob": "NULL", "dtype": "NULL", "init_count": "0", "init_md5": "''"}


def read_version(connection: Connection) -> int:
    """Return the format's version of a file, 0 for one that is not of this format.

    A file that has lost its identifiers, as in a `.dump` of the program `sqlite3`, is recognised by its tables.

    Raises:
        ArchiveError: The version is newer than this program's.
    """
    version = max(connection.value("PRAGMA user_version"), 1)
    if connection.value("PRAGMA application_id") != APPLICATION_ID:
        columns = read_columns(connection, "images")
        if not MODEL_KINDS.keys() <= columns and not needed_columns(1)["models"] <= read_columns(connection, "models"):
            return 0
        if ADDED.keys() <= columns:
            version = max(version, 2)
    if version > SCHEMA_VERSION:
        raise ArchiveError(
            f"{connection.path}: this archive has format {version}, this program reads up to {SCHEMA_VERSION};"
            " install a newer dm_generations"
        )
    return version


def needed_columns(version: int) -> dict[str, frozenset[str]]:
    """Return the columns by table that a file of this version has at least."""
    images = frozenset({"id", *INSERT_COLUMNS})
    return {
        "prompts": frozenset({"id", "desc"}),
        "sc_prompts": frozenset({"id", "desc"}),
        "models": frozenset({"id", *ModelInfo.__dataclass_fields__}),
        "images": images if version >= 2 else images - ADDED.keys(),
    }


def check_tables(connection: Connection, needed: Mapping[str, frozenset[str]]) -> None:
    """Check that a file has these columns by table.

    Raises:
        ArchiveError: A column is missing, so it is another program's database.
    """
    for table, names in needed.items():
        missing = names - read_columns(connection, table)
        if missing == names:
            raise ArchiveError(f"{connection.path}: this database is not an archive: it has no table {table}")
        if missing:
            listed = ", ".join(sorted(missing))
            raise ArchiveError(f"{connection.path}: this database is not an archive: table {table} lacks {listed}")


def read_columns(connection: Connection, table: str) -> frozenset[str]:
    """Return the lower-case column names of a table, none if there is none; views and virtual tables do not count."""
    sql = "SELECT 1 FROM main.sqlite_master WHERE type = 'table' AND lower(name) = ? AND rootpage > 0"
    if connection.value(sql, (table,)) is None:
        return frozenset()
    return frozenset(row[1].lower() for row in connection.rows(f"PRAGMA main.table_info({table})"))


def create_images_view(connection: Connection, expressions: Mapping[str, str]) -> None:
    """Make a temporary view `images` of an older file, with the columns of the newest version.

    Temporary names hide those of the file, so every query reads the view. It is not in the archive's file.

    Args:
        connection: Open for reading.
        expressions: SQL by column, in terms of the file's own table; a column that is left out is NULL.
    """
    columns = ", ".join(f"{expressions.get(name, ADDED.get(name, 'NULL'))} AS {name}" for name in ALL_COLUMNS)
    connection.execute(f"CREATE TEMP VIEW images AS SELECT {columns} FROM main.images")


def is_newest(connection: Connection) -> bool:
    """Return whether a file has the identifiers of the newest version."""
    identifiers = connection.value("PRAGMA application_id"), connection.value("PRAGMA user_version")
    return identifiers == (APPLICATION_ID, SCHEMA_VERSION)


def upgrade(connection: Connection) -> None:
    """Update a database from its version, 0 for an empty file, to the newest. Call it inside a transaction."""
    assert connection.in_transaction, "upgraded outside a transaction"
    for version in range(read_version(connection) + 1, SCHEMA_VERSION + 1):
        for statement in _statements(shipped(f"schema/{version:04d}.sql").read_text(encoding="utf-8")):
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; `executescript` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
