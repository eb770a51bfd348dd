"""The versions of the format, whose SQL is in `schema/`: 0001.sql makes version 1, each later file the next one.

And which other definitions a file may have. SQLite evaluates generated columns, constraints, indexes of expressions and
triggers whenever it reads or writes a row, and a short one can take hours or gigabytes. So their texts are checked
before any other statement. Constraints and triggers do not run on reading; views never run.
"""

import contextlib
import functools
import re
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Final

from dm_generations.archive.connection import APPLICATION_ID, ArchiveError, Connection
from dm_generations.archive.records import IMAGE_COLUMNS, INSERT_COLUMNS, MODEL_KINDS, ModelInfo
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

# The texts of definitions, normalised.
_SKIPPED: Final = re.compile(
    r"""(?P<string>'(?:[^']|'')*')|"(?P<a>(?:[^"]|"")*)"|`(?P<b>(?:[^`]|``)*)`|\[(?P<c>[^\]]*)\]|--[^\n]*|/\*.*?(?:\*/|$)""",
    re.DOTALL,
)
_CREATE: Final = re.compile(r"create (unique index|index|table|virtual table|view|trigger) '?(\w+)\b(?!\.)")
_COLUMN: Final = r"\w+(?: collate (?:binary|nocase|rtrim))?(?: asc| desc)?"
_INDEX: Final = re.compile(rf"create (?:unique )?index \w+ on (\w+)\({_COLUMN}(?:,{_COLUMN})*\)")
_OTHER_COLUMN: Final = re.compile(r"\w+(?: (?:integer|int|real|float|numeric|text|blob))?")

# What sqlite-utils makes (`enable-counts`; `enable-fts --create-triggers`), and what SQLite makes for it.
_TEXT_INDEX: Final = re.compile(
    r"create virtual table \w+_fts using fts[45]\(\w+(,\w+)*(,tokenize='[\w ]+')?,content=(prompts|sc_prompts|models)\)"
)
_TEXT_TABLES: Final = {
    "data": r"id integer primary key,block blob",
    "idx": r"segid,term,pgno,primary key\(segid,term\)",
    "docsize": r"(id|docid) integer primary key,(sz|size) blob",
    "config": r"k primary key,v",
    "segments": r"blockid integer primary key,block blob",
    "segdir": r"level integer,idx integer,start_block integer,leaves_end_block integer,end_block integer,"
    r"root blob,primary key\(level,idx\)",
    "stat": r"id integer primary key,value blob",
}
_TOOL_TABLES: Final = re.compile(
    r"create table (_counts\(table text primary key,count integer default 0\)|'\w+_fts_("
    + "|".join(rf"{name}'\({columns}\)" for name, columns in _TEXT_TABLES.items())
    + r")( ?without rowid)?)"
)
_INDEX_TEXT: Final = r"insert into \w+_fts\(rowid(,\w+)+\)values\(new\.rowid(,new\.\w+)+\);"
_FORGET_TEXT: Final = r"insert into \w+_fts\(\w+_fts,rowid(,\w+)+\)values\('delete',old\.rowid(,old\.\w+)+\);"
_COUNT_ROW: Final = (
    r"insert or replace into _counts values\('\w+',"
    r"coalesce\(\(select count from _counts where table='\w+'\),0\)[+-]1\);"
)
_TRIGGER: Final = re.compile(
    r"create trigger \w+ after (insert|update|delete) on \w+ begin"
    rf"( ?({_INDEX_TEXT}|{_FORGET_TEXT}|{_COUNT_ROW}))+ ?end"
)


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


def check_to_read(connection: Connection) -> None:
    """Check that no definition in a file computes while its tables are read.

    Raises:
        ArchiveError: One does, or is of a kind that this program does not know.
    """
    known = frozenset().union(*map(_format_definitions, range(1, SCHEMA_VERSION + 1)))
    for text in _definitions(connection):
        kind, name = _kind_and_name(connection, text)
        if kind == "table" and re.search(r"\bas\(", re.sub(r"'[^']*'", "''", text)):
            raise _refusal(connection, f"table {name} has a generated column")
        if kind.endswith("index") and not _INDEX.fullmatch(text) and text not in known:
            raise _refusal(connection, f"index {name} is partial or of an expression")
        if kind == "virtual table" and not _TEXT_INDEX.fullmatch(text):
            raise _refusal(connection, f"{name} is a virtual table, not a text index as sqlite-utils makes it")
        if kind == "view" and "_fts" in name:
            raise _refusal(connection, f"view {name} takes the name of a table of a text index")


def check_to_write(connection: Connection, checked: int | None = None) -> int:
    """Check that nothing in a file but the format's own constraints runs when its tables are written.

    Tables can have more columns without a constraint and more indexes; and what sqlite-utils makes.

    Args:
        connection: Open for writing.
        checked: What the last check returned.

    Returns:
        SQLite's number of the definitions, which changes with them.

    Raises:
        ArchiveError: A table, index or trigger is another.
    """
    with connection.snapshot():
        number = connection.value("PRAGMA schema_version")
        if number == checked:
            return number
        known = _format_definitions(read_version(connection))
        definitions = list(_definitions(connection))
    own = {_CREATE.match(text)[2]: text for text in known}  # type: ignore[index]
    has_text_index = False
    for text in definitions:
        kind, name = _kind_and_name(connection, text)
        has_text_index |= kind == "virtual table"
        if text in known:
            continue
        if kind == "table" and name in own:
            is_known = _is_same_table(text, own[name])
        elif kind == "table" and (name == "_counts" or "_fts" in name):
            is_known = _TOOL_TABLES.fullmatch(text) is not None
        elif kind == "trigger":
            is_known = _TRIGGER.fullmatch(text) is not None
        else:
            is_known = kind != "unique index"
        if not is_known:
            raise _refusal(connection, f"{kind} {name} is not as this program or sqlite-utils makes it")
    if has_text_index and not connection.in_transaction:
        # Otherwise an older SQLite does not let a trigger write to the tables of a text index.
        connection.execute("PRAGMA trusted_schema = ON")
    return number


def _refusal(connection: Connection, what: str) -> ArchiveError:
    return ArchiveError(f"{connection.path}: {what:.200}; drop it, or `merge` the archive into a new one")


def _definitions(connection: Connection) -> Iterator[str]:
    for (text,) in connection.rows("SELECT sql FROM main.sqlite_master WHERE sql IS NOT NULL"):
        yield _normalise(str(text))


def _kind_and_name(connection: Connection, text: str) -> tuple[str, str]:
    match = _CREATE.match(text)
    if match is None:
        raise ArchiveError(f"{connection.path}: it has a definition of an unknown kind: {text!r:.100}")
    return match[1], match[2]


def _normalise(text: str) -> str:
    """Return a definition in lower case, without quotes around names, comments and needless spaces."""

    def replace(match: re.Match[str]) -> str:
        if match["string"] is not None:
            return match["string"]
        name = next((match[group] for group in "abc" if match[group] is not None), None)
        return " " if name is None else name if re.fullmatch(r"\w+", name) else "odd_name"

    text = _SKIPPED.sub(replace, text)
    return re.sub(r"\s*([(),=+;-])\s*", r"\1", re.sub(r"\s+", " ", text)).strip().lower()


def _is_same_table(text: str, own: str) -> bool:
    """Return whether a table has the columns and constraints of the format's, in any order, and plain columns."""
    if not text.endswith(")"):
        return False
    parts, own_parts = _split(text), _split(own)
    return set(own_parts) <= set(parts) and all(
        part in own_parts or _OTHER_COLUMN.fullmatch(part) is not None for part in parts
    )


def _split(text: str) -> list[str]:
    """Return the columns and constraints in the outer parentheses of a definition."""
    parts, depth = [""], 0
    for character in text[text.index("(") + 1 : text.rindex(")")]:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@functools.cache
def _format_definitions(version: int) -> frozenset[str]:
    """Return the definitions of a version of the format, normalised."""
    with contextlib.closing(sqlite3.connect(":memory:")) as sqlite:
        for number in range(1, version + 1):
            sqlite.executescript(shipped(f"schema/{number:04d}.sql").read_text(encoding="utf-8"))
        texts = sqlite.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return frozenset(_normalise(text) for (text,) in texts)
