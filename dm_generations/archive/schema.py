"""The versions of the format, whose SQL is in `schema/`: 0001.sql makes version 1, each later file the next one."""

import re
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Final

from dm_generations.archive.connection import APPLICATION_ID, ArchiveError, Connection
from dm_generations.archive.records import IMAGE_COLUMNS, INSERT_COLUMNS, MODEL_KINDS, ModelInfo
from dm_generations.errors import one_line
from dm_generations.paths import shipped

SCHEMA_VERSION: Final = 3
FORMAT: Final = "dm-generations"  # in the table meta
INDEXES: Final = frozenset({"images_by_group", "images_draw"})
# Tables of version 3 by name; an older file has none of them, and counts as having no rows.
ADDED_TABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "vocabularies": ("id", "name", "labels"),
    "scorers": ("id", "model_id", "reads"),
    "scores": ("id", "image_id", "scorer_id", "value", "time"),
    "vectors": ("id", "image_id", "model_id", "vector"),
    "ratings": ("id", "rater", "kind", "image_id", "other_id", "value", "time"),
}
TABLES: Final = ("prompts", "sc_prompts", "models", "images", *ADDED_TABLES)
ALL_COLUMNS: Final = tuple(dict.fromkeys((*IMAGE_COLUMNS, *INSERT_COLUMNS)))  # of images
# Columns by the version that added them, with their values for an older archive, in which such a name would mean
# something else.
ADDED_COLUMNS: Final[Mapping[int, Mapping[str, str]]] = {
    2: {"log_prob": "NULL", "dtype": "NULL", "init_count": "0", "init_md5": "''"},
    3: {"extra_settings": "''"},
}

# Columns of models: what they were before version 3, and SQL that makes the new ones of them.
_SHAPES_BEFORE_3: Final = frozenset({"grid", "image_size"})
_SHAPES: Final[Mapping[str, str]] = {
    "token_shape": "'[' || grid || ',' || grid || ']'",
    "image_shape": "'[' || image_size || ',' || image_size || ']'",
}
_TRIGGERS_OF_MODELS: Final = (
    "SELECT sql FROM main.sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = 'models' ORDER BY rowid"
)

_READS: Final = frozenset({sqlite3.SQLITE_READ, sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION})
_WRITES: Final = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
# Virtual tables and triggers as sqlite-utils makes them (`enable-counts`; `enable-fts --create-triggers`), normalised.
_TEXT_INDEX: Final = re.compile(
    r"create virtual table \w+_fts using fts[45]\(\w+(,\w+)*(,tokenize='[\w ]+')?,content=\w+\)"
)
_INDEX_TEXT: Final = r"insert into \w+_fts\(rowid(,\w+)+\)values\(new\.rowid(,new\.\w+)+\);"
_FORGET_TEXT: Final = r"insert into \w+_fts\(\w+_fts,rowid(,\w+)+\)values\('delete',old\.rowid(,old\.\w+)+\);"
_COUNT_ROW: Final = (
    r"insert or replace into _counts values\('\w+',"
    r"coalesce\(\(select count from _counts where table='\w+'\),0\)[+-]1\);"
)
_TOOL_TRIGGER: Final = re.compile(
    r"create trigger \w+ after (insert|update|delete) on \w+ begin"
    rf"( ?({_INDEX_TEXT}|{_FORGET_TEXT}|{_COUNT_ROW}))+ ?end"
)
# Of each table; together they run every trigger that the statements of this package can run.
_TRIGGERING: Final[Mapping[str, tuple[str, ...]]] = {
    **{table: (f"INSERT INTO {table} DEFAULT VALUES",) for table in TABLES},
    "images": (
        "INSERT INTO images DEFAULT VALUES",
        "UPDATE images SET clip_score_input = 0, clip_score_tokenized = 0, clip_id = 0, time_scored = 0",
    ),
    "ratings": ("INSERT INTO ratings DEFAULT VALUES", "DELETE FROM ratings"),
    "scores": ("INSERT INTO scores DEFAULT VALUES", "UPDATE scores SET value = 0, time = 0"),
    "vectors": ("INSERT INTO vectors DEFAULT VALUES", "UPDATE vectors SET vector = 0"),
}


def read_version(connection: Connection) -> int:
    """Return the format's version of a file, 0 for one that is not of this format.

    A file that has lost the identifiers of its header, as in a `.dump` of the program `sqlite3`, is recognised by its
    table `meta`, one of an older version by its other tables.

    Raises:
        ArchiveError: The version is newer than this program's, or `meta` is not that of an archive.
    """
    version = max(connection.value("PRAGMA user_version"), 1)
    if (stored := _read_meta(connection)) is not None:
        version = max(stored, version if connection.value("PRAGMA application_id") == APPLICATION_ID else 1)
    elif connection.value("PRAGMA application_id") != APPLICATION_ID:
        columns = read_columns(connection, "images")
        if not MODEL_KINDS.keys() <= columns and not needed_columns(1)["models"] <= read_columns(connection, "models"):
            return 0
        if ADDED_COLUMNS[2].keys() <= columns:
            version = max(version, 2)
    if version > SCHEMA_VERSION:
        raise ArchiveError(
            f"{connection.path}: this archive has format {version}, this program reads up to {SCHEMA_VERSION};"
            " install a newer dm_generations"
        )
    return version


def _read_meta(connection: Connection) -> int | None:
    """Return the version that the table `meta` states, None for a file without such a table."""
    if not {"format", "version"} <= read_columns(connection, "meta"):
        return None
    values = next(connection.rows("SELECT format, version FROM main.meta ORDER BY id LIMIT 1"), (None, None))
    match values:
        case (format_name, int(version)) if format_name == FORMAT and version >= 1:
            return version
    raise ArchiveError(f"{connection.path}: this database is not an archive: its table meta holds {values!r:.100}")


def needed_columns(version: int) -> dict[str, frozenset[str]]:
    """Return the columns by table that a file of this version has at least."""
    models = {"id", *ModelInfo.__dataclass_fields__}
    tables = {
        "prompts": frozenset({"id", "desc"}),
        "sc_prompts": frozenset({"id", "desc"}),
        "models": frozenset(models if version >= 3 else models - _SHAPES.keys() | _SHAPES_BEFORE_3),
        "images": frozenset({"id", *INSERT_COLUMNS} - _defaults(version).keys()),
    }
    if version >= 3:
        tables["prompts"] |= {"vocabulary_id", "class_label"}
        tables |= {name: frozenset(columns) for name, columns in ADDED_TABLES.items()}
    return tables


def _defaults(version: int) -> dict[str, str]:
    """Return the columns of images that a version lacks, with their values."""
    return {name: value for added, values in ADDED_COLUMNS.items() if added > version for name, value in values.items()}


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


def create_views(connection: Connection, version: int, row_id: str = "id") -> None:
    """Make temporary views of an older file, with the tables and columns of the newest version.

    Temporary names hide those of the file, so every query reads the views. They are not in the archive's file.

    Args:
        connection: Open for reading.
        version: Of the file, 0 for the layout of 2022, in which columns may be missing and count as NULL.
        row_id: Name of the column of `images` that holds a row's number.
    """
    defaults = _defaults(version)
    known = read_columns(connection, "images") - defaults.keys()
    values = {name: name if name in known else defaults.get(name, "NULL") for name in ALL_COLUMNS} | {"id": row_id}
    columns = ", ".join(f"{value} AS {name}" for name, value in values.items())
    connection.execute(f"CREATE TEMP VIEW images AS SELECT {columns} FROM main.images")
    fields = ("id", *ModelInfo.__dataclass_fields__)
    if version:
        columns = ", ".join(f"{_SHAPES.get(name, name)} AS {name}" for name in fields)
        connection.execute(f"CREATE TEMP VIEW models AS SELECT {columns} FROM main.models")
    for table, names in {**({} if version else {"models": fields}), **ADDED_TABLES}.items():
        columns = ", ".join(f"NULL AS {name}" for name in names)
        connection.execute(f"CREATE TEMP VIEW {table} AS SELECT {columns} WHERE FALSE")


def is_newest(connection: Connection) -> bool:
    """Return whether a file has the identifiers of the newest version."""
    identifiers = connection.value("PRAGMA application_id"), connection.value("PRAGMA user_version")
    return (*identifiers, _read_meta(connection)) == (APPLICATION_ID, SCHEMA_VERSION, SCHEMA_VERSION)


def upgrade(connection: Connection) -> None:
    """Update a database from its version, 0 for an empty file, to the newest, in one transaction.

    Raises:
        ArchiveError: A row is not as its version demands, or another program holds the lock. Nothing has changed.
    """
    # A table that others refer to is replaced (https://www.sqlite.org/lang_altertable.html, 7).
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA legacy_alter_table = ON")
    with connection.transaction():
        triggers = list(connection.rows(_TRIGGERS_OF_MODELS))
        for version in range(read_version(connection) + 1, SCHEMA_VERSION + 1):
            for statement in _statements(shipped(f"schema/{version:04d}.sql").read_text(encoding="utf-8")):
                connection.execute(statement)
        present = list(connection.rows(_TRIGGERS_OF_MODELS))
        for trigger in triggers:  # of other tools; they went with the table
            if trigger not in present:
                connection.execute(trigger[0])
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("PRAGMA legacy_alter_table = OFF")
    connection.execute("PRAGMA foreign_keys = ON")


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; `executescript` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def guard_triggers(connection: Connection) -> None:
    """Make sure that triggers in the file do not change the archive's tables. Reading runs no trigger.

    A trigger may read, and write to other tables: some count rows, or index the prompts for full-text search. The
    guard stays on while the connection is open; the triggers that are in the file now are checked at once.

    Raises:
        ArchiveError: A trigger does more, or something that SQLite does not allow in an untrusted file. No trigger has
            run.
    """
    denied: list[str] = []

    def authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        is_own = (first or "").lower() in (*TABLES, "claims", "meta")
        if trigger is None or action in _READS or (action in _WRITES and not is_own):
            return sqlite3.SQLITE_OK
        denied.append(trigger)
        return sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    if _is_made_by_tools(connection):
        # Otherwise an older SQLite does not let a trigger write to the tables of a full-text search.
        connection.execute("PRAGMA trusted_schema = ON")
    present = [table for table in TABLES if read_columns(connection, table)]  # an older file has not all of them yet
    for statement in (statement for table in present for statement in _TRIGGERING[table]):
        try:
            connection.execute(f"EXPLAIN {statement}").close()
        except ArchiveError as error:
            which = f"trigger {denied[0]!r:.100}" if denied else "a trigger"
            raise ArchiveError(
                f"{connection.path}: {which} in this file would change the archive, or cannot run here"
                f" (SQLite: {one_line(error.__cause__ or error)}); drop it, or `merge` the archive into a new one"
            ) from error


def _is_made_by_tools(connection: Connection) -> bool:
    """Return whether all virtual tables and triggers of a file are those that sqlite-utils makes."""
    sql = "SELECT type, sql FROM main.sqlite_master WHERE type = 'trigger' OR (type = 'table' AND rootpage = 0)"
    patterns = {"table": _TEXT_INDEX, "trigger": _TOOL_TRIGGER}
    return all(patterns[kind].fullmatch(_normalise_sql(text)) for kind, text in connection.rows(sql))


def _normalise_sql(text: str) -> str:
    """Return a statement in lower case, without quotes around plain names and without needless spaces."""
    text = re.sub(r'\[(\w+)\]|"(\w+)"|`(\w+)`', r"\1\2\3", text)
    return re.sub(r"\s*([(),=+;-])\s*", r"\1", re.sub(r"\s+", " ", text)).strip().lower()
