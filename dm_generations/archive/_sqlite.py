"""SQLite underneath: connecting, telling file kinds apart, and SQLite's errors as one clear line."""

import contextlib
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

from dm_generations.errors import UserError

APPLICATION_ID = 0x444D4731  # "DMG1"
HEADER_BYTES = 100  # https://www.sqlite.org/fileformat.html#the_database_header
MAGIC = b"SQLite format 3\x00"


class ArchiveError(UserError):
    """An archive cannot be read or written as asked; the text is one line for the user."""


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's exceptions into an ArchiveError that names the file and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise ArchiveError(f"{path}: {_explain(error)}") from error
    except UnicodeEncodeError as error:
        raise ArchiveError(f"{path}: text with a lone surrogate cannot be stored: {error.object!r:.100}") from error
    except OverflowError as error:
        raise ArchiveError(f"{path}: a number does not fit into 64 bits") from error


def is_damage(error: ArchiveError) -> bool:
    """Whether SQLite met a page that is not what it should be."""
    return (getattr(error.__cause__, "sqlite_errorname", None) or "").startswith("SQLITE_CORRUPT")


def _explain(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_READONLY_ROLLBACK":
        return "another program was stopped while writing here; run the command again to undo its last batch"
    for prefix, text in _EXPLANATIONS.items():
        if name.startswith(prefix):
            return f"{text} (SQLite: {error})"
    return f"SQLite refused: {error}"


_EXPLANATIONS = {
    "SQLITE_NOTADB": "this is not an SQLite database",
    "SQLITE_CORRUPT": "the file is damaged or cut short; get another copy of it",
    "SQLITE_BUSY": "another program is using the archive; try again when it has finished",
    "SQLITE_LOCKED": "another program is using the archive; try again when it has finished",
    "SQLITE_READONLY": "the archive or its folder cannot be written; copy it to a folder of yours",
    "SQLITE_CANTOPEN": "the archive or its folder cannot be opened; check the permissions",
    "SQLITE_FULL": "the disk is full; free some space and run the command again",
    "SQLITE_IOERR": "reading or writing the disk failed",
    "SQLITE_CONSTRAINT": "a value does not fit the archive's format",
}


def read_header(path: Path) -> bytes:
    """The first 100 bytes of an SQLite database, or an ArchiveError that says what the file is instead."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ArchiveError(f"{path}: this is not a regular file")  # reading a pipe would wait for ever
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise ArchiveError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ArchiveError(f"{path}: this is a folder, not an archive") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ArchiveError(f"{str(path)!r}: cannot be read: {error}") from error
    if not header:
        raise ArchiveError(f"{path}: the file is empty, not an archive")
    if not header.startswith(MAGIC):
        raise ArchiveError(f"{path}: this is not an SQLite database, so not an archive")
    # SQLite takes the end of a page that is cut off for zeros.
    if len(header) < HEADER_BYTES or (size % _page_bytes(header) and not _is_being_written(path)):
        raise ArchiveError(f"{path}: the file is damaged or cut short; get another copy of it")
    return header


def _page_bytes(header: bytes) -> int:
    (page_bytes,) = struct.unpack_from(">H", header, 16)
    return 65536 if page_bytes == 1 else page_bytes or 1


def _is_being_written(path: Path) -> bool:
    return any(path.with_name(path.name + suffix).exists() for suffix in ("-journal", "-wal"))


def application_id(header: bytes) -> int:
    return struct.unpack_from(">I", header, 68)[0]


def is_wal(header: bytes) -> bool:
    return 2 in header[18:20]


def connect(path: Path, header: bytes, mode: str, timeout: float) -> sqlite3.Connection:
    """An open connection in autocommit mode; `mode` "r" never changes the file nor leaves one beside it.

    timeout: seconds to wait for another program's lock.
    """
    uri = f"{path.resolve().as_uri()}?mode={'ro' if mode == 'r' else 'rw'}"
    wal = path.with_name(path.name + "-wal")
    if mode == "r" and is_wal(header) and not (wal.exists() and wal.stat().st_size):
        # Reading a file in WAL mode would create -wal and -shm beside it. Without a log nobody is writing.
        uri += "&immutable=1"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
    # Stored prompts come from strangers: bytes that are not UTF-8 must not stop a read.
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def prepare_to_write(connection: sqlite3.Connection, header: bytes) -> None:
    """What holds for a connection that writes: the rollback journal, foreign keys, and room for busy pages."""
    if is_wal(header):  # someone's tool switched it; see the docstring of `_store`
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA foreign_keys = ON")
    # In KiB: room for the busy pages of the indexes while rows are added.
    connection.execute("PRAGMA cache_size = -32768")


def undo_interrupted_write(path: Path, timeout: float) -> None:
    """Lets SQLite roll back what a killed writer left, which a read-only connection may not do."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=timeout)
    with contextlib.closing(connection):
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
