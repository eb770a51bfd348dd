"""SQLite underneath: opening files safely, SQLite's errors as one line, and new files that appear whole.

Locking: archives use a rollback journal, not a write-ahead log (WAL). So an archive is one file whenever no batch is
being written, works on network disks, and can be read in folders that cannot be written. The price is that a commit
waits for readers; so no method of `Archive` leaves a query open between two rows.
"""

import contextlib
import math
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from dm_generations.atomic_io import DATABASE, DATABASE_FILES, TemporaryFile
from dm_generations.errors import UserError, one_line
from dm_generations.paths import sqlite_uri

Mode = Literal["r", "w"]
Row = tuple[Any, ...]

APPLICATION_ID: Final = 0x444D4731  # "DMG1"
HEADER_BYTES: Final = 100  # https://www.sqlite.org/fileformat.html#the_database_header
MAGIC: Final = b"SQLite format 3\x00"
JOURNAL: Final = "-journal"
LOG: Final = "-wal"
JOURNAL_MAGIC: Final = bytes.fromhex("d9d505f920a163d7")
MAX_NAME_BYTES: Final = 255  # of one name, on nearly every file system
LIMITS: Final = {
    sqlite3.SQLITE_LIMIT_LENGTH: 16 * 2**20,  # bytes of a value or a row
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 2**20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 10,
}
STEPS: Final = 20_000  # of SQLite's machine, a few milliseconds, after which it looks for Ctrl-C
# A query for reading that takes more steps never ends: in a damaged file, pages can be reached in many ways.
MAX_STEPS: Final = 30_000_000
MAX_STEPS_PER_BYTE: Final = 10
MIN_ROW_BYTES: Final = 4  # in a file
COMMIT_TIMEOUT: Final = 60.0  # seconds to wait for another program's lock when finished work would be lost

_EXPLANATIONS: Final = {
    "SQLITE_NOTADB": "this is not an SQLite database",
    "SQLITE_CORRUPT": "the file is damaged or cut short; get another copy of it",
    "SQLITE_BUSY": "another program is using the archive; try again when it has finished",
    "SQLITE_LOCKED": "another program is using the archive; try again when it has finished",
    "SQLITE_READONLY": "the archive or its folder cannot be written; copy it to a folder of yours",
    "SQLITE_CANTOPEN": "the archive or its folder cannot be opened; check the permissions",
    "SQLITE_FULL": "the disk is full; free some space and run the command again",
    "SQLITE_IOERR": "reading or writing the disk failed",
    "SQLITE_CONSTRAINT": "the archive's format does not allow a value",
    "SQLITE_TOOBIG": "a value is larger than 16 MiB; the file is damaged, or not an archive",
    "SQLITE_INTERRUPT": "a query does not come to an end; the file is damaged",
}


class ArchiveError(UserError):
    """An archive cannot be read or written; the text is one line for the user."""


class Watch:
    """Called by SQLite every STEPS steps of a statement, so that Python can handle signals; ends one of too many."""

    def __init__(self, max_steps: float = math.inf):
        self._max_steps = max_steps
        self._steps = 0

    def restart(self) -> None:
        """Begin to count for another statement."""
        self._steps = 0

    def has_ended(self) -> bool:
        """Return whether the statement took too many steps."""
        return self._steps > self._max_steps

    def __call__(self) -> bool:
        """Count; return whether SQLite is to end the statement."""
        self._steps += STEPS
        return self.has_ended()


@contextlib.contextmanager
def sqlite_errors(path: Path, watch: Watch | None = None) -> Iterator[None]:
    """Turn SQLite's exceptions into ArchiveErrors, which name the file and say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        # An exception in a watch, as a signal's, ends the statement and is lost.
        if getattr(error, "sqlite_errorname", None) == "SQLITE_INTERRUPT" and not (watch and watch.has_ended()):
            raise KeyboardInterrupt from error
        raise ArchiveError(f"{path}: {_explain(error)}") from error
    except UnicodeEncodeError as error:
        raise ArchiveError(f"{path}: text with a lone surrogate cannot be stored: {error.object!r:.100}") from error
    except UnicodeDecodeError as error:  # from Python's sqlite3, for a message that quotes the file
        raise ArchiveError(f"{path}: SQLite refused, in words that are not UTF-8: {error.object!r:.200}") from error
    except OverflowError as error:
        raise ArchiveError(f"{path}: a number needs more than 64 bits") from error


def _explain(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_READONLY_ROLLBACK":
        return "another program was stopped while writing here; run the command again to undo its last batch"
    for prefix, text in _EXPLANATIONS.items():
        if name.startswith(prefix):
            return f"{text} (SQLite: {one_line(error)})"
    return f"SQLite refused: {one_line(error)}"


def is_damage(error: ArchiveError) -> bool:
    """Return whether an error was caused by a damaged page of the file, or by a value that is too large."""
    name = getattr(error.__cause__, "sqlite_errorname", None) or ""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_TOOBIG"))


class Connection:
    """An open database in autocommit mode, whose errors are ArchiveErrors. Only the modules of this folder use it."""

    def __init__(
        self,
        path: Path,
        sqlite: sqlite3.Connection,
        timeout: float,
        watch: Watch,
        state: tuple[int, int, bool] | None = None,
    ):
        """Wrap a connection. `state` is that of a file which SQLite takes for immutable; see `_read_state`."""
        self.path = path
        self._sqlite = sqlite
        self._timeout = timeout
        self._watch = watch
        self._state = state

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._sqlite.in_transaction

    def close(self) -> None:
        """Close the database; an open transaction is rolled back."""
        self._sqlite.close()

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        """Run one statement."""
        with self._errors():
            return self._sqlite.execute(sql, parameters)

    def insert(self, sql: str, parameters: Any) -> int:
        """Run an INSERT of one row; return the row's number."""
        return self.execute(sql, parameters).lastrowid or 0

    def script(self, sql: str) -> None:
        """Run several statements."""
        with self._errors():
            self._sqlite.executescript(sql)

    def rows(self, sql: str, parameters: Any = ()) -> Iterator[Row]:
        """Yield the rows of a query one by one. While it runs, other programs cannot commit."""
        with self._errors():
            cursor = self._sqlite.execute(sql, parameters)
            yield from (row for row in cursor)  # the cursor itself would be closed, also when the database is already

    def bounded_rows(self, sql: str, parameters: Any = ()) -> Iterator[Row]:
        """Yield the rows of a query whose values, in a sound file, are together not larger than the file.

        Raises:
            ArchiveError: They are: in a damaged file, values and whole tables can share their pages.
        """
        left = self.value("PRAGMA page_count") * self.value("PRAGMA page_size")
        for row in self.rows(sql, parameters):
            left -= MIN_ROW_BYTES + sum(len(value) for value in row if isinstance(value, str | bytes))
            if left < 0:
                raise ArchiveError(f"{self.path}: the file is damaged: its tables are larger than itself")
            yield row

    def value(self, sql: str, parameters: Any = ()) -> Any:
        """Return the first column of the first row, None if there is no row."""
        return next(self.rows(sql, parameters), (None,))[0]

    def write_many(self, sql: str, rows: Iterable[Row]) -> int:
        """Run one statement for each row of parameters; return how many rows of the table changed."""
        with self._errors():
            return self._sqlite.executemany(sql, rows).rowcount

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        self._watch.restart()
        self._check_unchanged()
        with sqlite_errors(self.path, self._watch):
            yield
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self._state is not None and _read_state(self.path) != self._state:
            raise ArchiveError(f"{self.path}: another program has written to it meanwhile; run the command again")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let all that the block reads be of one moment, whatever other programs write meanwhile."""
        if self.in_transaction:
            yield
            return
        self.execute("BEGIN")
        try:
            yield
        finally:
            if self.in_transaction:
                self.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block writes when it ends, or undo all of it."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute(f"PRAGMA busy_timeout = {COMMIT_TIMEOUT * 1000:.0f}")
            self.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back after a full disk, for instance.
            if self.in_transaction:
                self.execute("ROLLBACK")
            raise
        finally:
            self.execute(f"PRAGMA busy_timeout = {self._timeout * 1000:.0f}")


def connect(path: Path, mode: Mode, timeout: float) -> Connection:
    """Open an SQLite database.

    Args:
        path: The file, which must exist.
        mode: "r" does not change the file, and leaves no other file next to it.
        timeout: Seconds to wait for another program's lock.

    Raises:
        ArchiveError: The file is not an SQLite database, is damaged or locked, or a stopped program's batch cannot be
            rolled back here.
    """
    header = _read_header(path)
    _check_journal(path)
    if mode == "w":
        check_writable(path)
    size, _, has_log = state = _read_state(path)
    # Reading a file in WAL mode would create -wal and -shm next to it. Without a log nobody is writing.
    is_immutable = mode == "r" and _is_wal(header) and not has_log
    watch = Watch(MAX_STEPS + MAX_STEPS_PER_BYTE * size if mode == "r" else math.inf)
    with sqlite_errors(path, watch), contextlib.ExitStack() as on_error:
        sqlite = _open(path, mode, timeout, is_immutable)
        on_error.callback(sqlite.close)
        sqlite.set_progress_handler(watch, STEPS)
        try:
            sqlite.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except sqlite3.OperationalError as error:
            if has_log and error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")):
                raise ArchiveError(
                    f"{path}: its last commits are in {path.resolve().name}{LOG}, which SQLite reads only where it can"
                    f" write; copy the archive and its {LOG} to a folder of yours"
                ) from error
            if error.sqlite_errorname != "SQLITE_READONLY_ROLLBACK":
                raise
            _check_undoable(path, header)
            _undo_interrupted_write(path, timeout)
        if mode == "w":
            if _is_wal(header):  # another tool switched it on; see the docstring of this module
                sqlite.execute("PRAGMA journal_mode = DELETE")
            sqlite.execute("PRAGMA foreign_keys = ON")
            sqlite.execute("PRAGMA cache_size = -32768")  # KiB; holds the indexes' pages while rows are added
        on_error.pop_all()
    return Connection(path, sqlite, timeout, watch, state if is_immutable else None)


def connect_new(file: Path, path: Path, timeout: float) -> Connection:
    """Make an empty database in `file`; its errors name `path`."""
    with sqlite_errors(path):
        return Connection(path, sqlite3.connect(file, timeout=timeout, isolation_level=None), timeout, Watch())


def _read_header(path: Path) -> bytes:
    """Return the first 100 bytes of an SQLite database.

    Raises:
        ArchiveError: The file is something else; the text says what.
    """
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
    # SQLite itself would read the missing end of a page as zeros.
    if len(header) < HEADER_BYTES or (size % _page_bytes(header) and not _is_being_written(path)):
        raise ArchiveError(f"{path}: the file is damaged or cut short; get another copy of it")
    return header


def _page_bytes(header: bytes) -> int:
    (page_bytes,) = struct.unpack_from(">H", header, 16)
    return 65536 if page_bytes == 1 else page_bytes or 1


def _is_being_written(path: Path) -> bool:
    return any(_companion(path, suffix).exists() for suffix in (JOURNAL, LOG))


def _companion(path: Path, suffix: str) -> Path:
    """Return the path of a file that SQLite writes next to a database. Like SQLite, resolves links first."""
    path = path.resolve()
    return path.with_name(path.name + suffix)


def _application_id(header: bytes) -> int:
    return struct.unpack_from(">I", header, 68)[0]


def _is_wal(header: bytes) -> bool:
    return 2 in header[18:20]


def _read_state(path: Path) -> tuple[int, int, bool]:
    """Return the size of a file, when it was changed, and whether there are commits in a log next to it."""
    try:
        status = path.stat()
        log = _companion(path, LOG)
        return status.st_size, status.st_mtime_ns, log.exists() and log.stat().st_size > 0
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {one_line(error)}") from error


def _check_journal(path: Path) -> None:
    """Refuse a rollback journal that names a super-journal: SQLite would delete the file of that name.

    Such a journal ends with the name, its length, its checksum and the magic number
    (https://www.sqlite.org/fileformat.html#the_rollback_journal, `writeSuperJournal` in SQLite's pager.c).

    Raises:
        ArchiveError: The journal names one, or cannot be read.
    """
    journal = _companion(path, JOURNAL)
    try:
        if not journal.exists():
            return
        if not journal.is_file():
            raise ArchiveError(f"{journal}: this is not a regular file; remove it")
        with open(journal, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(JOURNAL_MAGIC)))
            end = file.read()
    except FileNotFoundError:  # its writer has finished
        return
    except OSError as error:
        raise ArchiveError(f"{journal}: cannot be read: {one_line(error)}") from error
    if end == JOURNAL_MAGIC:
        raise ArchiveError(
            f"{journal}: this journal is part of a write to several databases, which only the program `sqlite3` may "
            "undo, where it happened; get another copy of the archive"
        )


def _open(path: Path, mode: Mode, timeout: float, is_immutable: bool) -> sqlite3.Connection:
    query = "mode=ro" if mode == "r" else "mode=rw"
    if is_immutable:
        query += "&immutable=1"
    uri = sqlite_uri(path.resolve(), query)
    sqlite = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)
    # Stored prompts are untrusted: bytes that are not UTF-8 must not stop a read.
    sqlite.text_factory = lambda raw: raw.decode("utf-8", "replace")
    sqlite.execute("PRAGMA trusted_schema = OFF")
    for limit, value in LIMITS.items():
        sqlite.setlimit(limit, value)
    if mode == "r":  # `PRAGMA integrity_check` would evaluate them
        sqlite.execute("PRAGMA ignore_check_constraints = ON")
    return sqlite


def _check_undoable(path: Path, header: bytes) -> None:
    """Check that the batch of a stopped program may be rolled back here.

    Raises:
        ArchiveError: It may not: the file has the layout of 2022, or cannot be written.
    """
    if _application_id(header) != APPLICATION_ID:
        remedy = "the program `sqlite3` does that when it reads the file; this one changes no archive of 2022"
    elif not (os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK | os.X_OK)):
        remedy = "copy the archive and its -journal to a folder of yours"
    else:
        return
    raise ArchiveError(f"{path}: another program was stopped while writing here; to undo its last batch: {remedy}")


def _undo_interrupted_write(path: Path, timeout: float) -> None:
    """Let SQLite roll back a stopped program's batch, which a read-only connection may not do."""
    sqlite = sqlite3.connect(sqlite_uri(path.resolve(), "mode=rw"), uri=True, timeout=timeout)
    with contextlib.closing(sqlite):
        sqlite.execute("SELECT count(*) FROM sqlite_master").fetchone()


def check_writable(path: Path) -> None:
    """Check that SQLite can write to `path`, before models are loaded for it.

    Raises:
        ArchiveError: The folder is missing, or it or the file cannot be written.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ArchiveError(f"{folder}: no such folder; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArchiveError(f"{folder}: this folder cannot be written; choose another")
    if len(os.fsencode(path.name + JOURNAL)) > MAX_NAME_BYTES:
        raise ArchiveError(f"{path}: this name is too long; SQLite adds {JOURNAL!r} to it while it writes")
    if path.exists() and not os.access(path, os.W_OK):
        raise ArchiveError(f"{path}: this file cannot be written; copy it or change its permissions")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path for SQLite to write, which becomes `path` if the block succeeds and is removed if not.

    It has a temporary name next to `path`, as its journal has. Nothing is ever overwritten.

    Raises:
        ArchiveError: `path` exists, or was made in the meantime; or its folder cannot be written.
    """
    if os.path.lexists(path):
        raise ArchiveError(f"{path}: this file exists already")
    with scratch_file(path) as temporary:
        yield temporary
        _publish(temporary, path)


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield a path for SQLite to write, with a temporary name next to `path`, which is removed in the end.

    Raises:
        ArchiveError: The folder cannot be written.
    """
    try:
        check_writable(path)
        holder = TemporaryFile(path.parent)  # SQLite does not share the locks of its own files
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ArchiveError(f"{str(path)!r}: cannot be created: {error}") from error
    try:
        yield holder.path.with_name(holder.path.name + DATABASE)
    finally:
        for suffix in DATABASE_FILES:
            holder.path.with_name(holder.path.name + suffix).unlink(missing_ok=True)
        holder.discard()


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, this fails when another program made the file meanwhile
    except FileExistsError as error:
        raise ArchiveError(f"{path}: this file exists already") from error
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
