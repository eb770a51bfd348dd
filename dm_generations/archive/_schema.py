"""The format's versions as SQL: `schema/0001.sql` makes version 1 of an empty file, each later file the next."""

import sqlite3
from collections.abc import Iterator

from dm_generations.resources import shipped

SCHEMA_VERSION = 2


def version_of(connection: sqlite3.Connection) -> int:
    """`PRAGMA user_version`: the format's version, 0 in an empty file."""
    return connection.execute("PRAGMA user_version").fetchone()[0]


def upgrade(connection: sqlite3.Connection) -> None:
    """Takes a database from whatever version it has to the newest. Inside a transaction, which the caller commits."""
    assert connection.in_transaction, "upgraded outside a transaction"
    for version in range(version_of(connection) + 1, SCHEMA_VERSION + 1):
        for statement in _statements(shipped(f"schema/{version:04d}.sql").read_text(encoding="utf-8")):
            connection.execute(statement)


def _statements(script: str) -> Iterator[str]:
    """One by one, since `executescript` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
