"""The folder around an archive: can it be written, and new files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dm_generations.archive._sqlite import ArchiveError

JOURNAL = "-journal"
MAX_NAME_BYTES = 255  # of one name, on nearly every file system


def check_writable(path: Path) -> None:
    """Fails early: SQLite would find out at the first write, after the models have been loaded."""
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
    """A path for SQLite to fill, which becomes `path` if the block succeeds and is removed if not.

    It lies in a folder of its own beside `path`, where its journals go too. ArchiveError when `path` exists,
    also when it appeared in the meantime: nothing is ever overwritten.
    """
    try:
        if path.exists() or path.is_symlink():
            raise ArchiveError(f"{path}: this file exists already")
        check_writable(path)
        folder = tempfile.TemporaryDirectory(prefix=".dmg-", dir=path.parent, ignore_cleanup_errors=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ArchiveError(f"{str(path)!r}: cannot be created: {error}") from error
    with folder:
        temporary = Path(folder.name) / "new.db"  # short: the name of `path` may be as long as names can be
        yield temporary
        _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, this fails when another program made the file meanwhile
    except FileExistsError as error:
        raise ArchiveError(f"{path}: this file exists already") from error
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
