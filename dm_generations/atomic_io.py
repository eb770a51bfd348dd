"""Files that appear whole or not at all, and files that others may have put there.

A file is written under a temporary name in its own folder, then renamed: readers see the old file or the whole new
one. A killed process leaves at most temporary files, which the next run removes.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.dmg-[0-9a-f-]+\.tmp")
DATABASE = "-db"  # added to the name of a temporary file by a database that is being made
DATABASE_FILES = (DATABASE, f"{DATABASE}-journal")
_STALE_S = 3600  # writing a file takes far less; only for disks without locks
_LOCK_OFFSET = 1 << 30  # Windows locks bytes, and others may not read them: one beyond the end of the file
_OPEN_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Args:
        path: Its folder must exist.
        data: The content.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which becomes `path` when the block ends, and is removed after an error.

    Args:
        path: Its folder must exist.

    Raises:
        OSError: It cannot be written.
    """
    temporary = TemporaryFile(path.parent)
    try:
        yield temporary.file
        temporary.rename(path)
    except BaseException:
        temporary.discard()
        raise


class TemporaryFile:
    """A file that gets its name when it is whole. Until then it is locked, which tells that its writer is alive.

    The number of the writer's process would not: it may run in another container, or on another machine.

    Attributes:
        path: Its name until it is whole.
        file: To write to.
    """

    def __init__(self, folder: Path):
        """Make it in an existing folder. Raises OSError."""
        while True:
            # A short name, because the final one can be as long as the file system allows.
            self.path = folder / f".dmg-{secrets.token_hex(8)}.tmp"
            self.file: BinaryIO = open(self.path, "xb")  # noqa: SIM115
            # A lock of its own, since closing `file` may still write. Windows renames and removes no open file.
            self._lock = None if os.name == "nt" else os.dup(self.file.fileno())
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                lock_file(self.file)
                if os.path.samestat(os.fstat(self.file.fileno()), os.lstat(self.path)):
                    return
            self.discard()  # another process took it for stale before it was locked

    def rename(self, path: Path) -> None:
        """Close the file and give it its name. Raises OSError."""
        self.file.close()
        os.replace(self.path, path)
        self._unlock()

    def discard(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(OSError):  # there may be no room for what is still to be written
            self.file.close()
        self.path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what killed processes left in `folder`."""
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return  # the error is reported when the folder is written
    for name in names:
        with contextlib.suppress(OSError):  # it is being written, for instance
            _remove_if_stale(folder / name)


def _remove_if_stale(path: Path) -> None:
    database = [path.with_name(path.name + suffix) for suffix in DATABASE_FILES]
    if os.name == "nt":
        _remove([path, *database])  # the first fails while it is open
        return
    with open_regular(path, os.O_RDWR) as file:
        if lock_file(file) or time.time() - os.fstat(file.fileno()).st_mtime > _STALE_S:
            _remove([*database, path])  # until its last moment, another run finds what a killed one left


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a regular file without following links; pipes and devices, which could wait for ever, are refused.

    Args:
        path: Where anyone may have put anything.
        flags: Of `os.open`.

    Raises:
        OSError: It cannot be opened, or is something else.
    """
    if os.path.islink(path):  # where there is no O_NOFOLLOW
        raise OSError(errno.ELOOP, "it is a symbolic link")
    file = io.FileIO(os.open(path, flags | _OPEN_FLAGS, 0o666), "r+" if flags & os.O_RDWR else "r")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def open_locked(path: Path) -> io.FileIO:
    """Open a file, made if it is missing, which this process alone has open so until it closes it or ends.

    Raises:
        OSError: It cannot be opened, or is no regular file; BlockingIOError if another process has it open.
    """
    file = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        lock_file(file)
    except BaseException:
        file.close()
        raise
    return file


def lock_file(file: io.FileIO | BinaryIO) -> bool:
    """Lock an open file for this process, until all its descriptors are closed.

    Returns:
        Whether it is locked; False on a file system without locks.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCK_OFFSET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    return True
