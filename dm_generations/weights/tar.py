"""Tar archives of others: their members, and a few known files extracted to the disk, where they can be mapped.

No name or link in the archive decides where anything is written.
"""

import contextlib
import functools
import gzip
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

from dm_generations.errors import EXIT_CALLBACKS, UserError, one_line
from dm_generations.weights.mmap import refuse_lfs_pointer

SUFFIXES = (".tar.gz", ".tgz", ".tar")
MAX_HEADER = 1 << 20  # bytes before the content of a file: names, extended headers and maps of sparse files
_PREFIX = ".dmg-extracted-"  # of temporary folders, which nothing else has
_UNLOCKED_S = 60  # a folder as young as that may just be about to be locked
_FREE_BYTES = 1 << 28  # left on the disk for others
# What tarfile and the decompressors below it raise for bytes that are no archive, or half of one.
DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError)


class _HeaderLimit:
    """A stream that refuses to be read beyond `limit`: tarfile itself keeps headers of any length in memory."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file, self._position = file, 0
        self.limit = MAX_HEADER

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        if self._position > self.limit:
            raise tarfile.ReadError(f"a header is longer than {MAX_HEADER:,} bytes")
        return data


def iterate(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of an archive, each with the archive, which reads it before the next one is asked for.

    Args:
        file: The archive, which gzip may have compressed.

    Raises:
        OSError: It cannot be read.
        DAMAGED: It is no archive, half of one, or has a header that is too long.
    """
    is_compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = _HeaderLimit(gzip.GzipFile(fileobj=file) if is_compressed else file)
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # all so far, which nobody needs; not in the stubs
            stream.limit = archive.offset + MAX_HEADER  # where the next header starts
            yield archive, member


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a regular file of an archive."""
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return file.read()


def is_archive(path: Path) -> bool:
    """Whether `path` is a file with the name of a tar archive."""
    return path.name.endswith(SUFFIXES) and path.is_file()


def extract(path: Path, wanted: Mapping[str, str], max_bytes: int | None = None) -> Path:
    """Extract files of an archive into a temporary folder, which is deleted when the process ends.

    An archive is extracted once, as long as it is not changed.

    Args:
        path: A .tar, or one that gzip compressed.
        wanted: Relative paths in the new folder, by the base name that a file has in the archive.
        max_bytes: Of a file; larger ones are refused.

    Returns:
        The folder. Its name has that of the archive, for messages.

    Raises:
        UserError: The archive is damaged, or a file is too large for the disk or larger than `max_bytes`.
    """
    stat = path.stat()
    return _extract(path.resolve(), stat.st_size, stat.st_mtime_ns, tuple(sorted(wanted.items())), max_bytes)


@functools.cache
def _extract(
    path: Path, _size: int, _mtime_ns: int, wanted: tuple[tuple[str, str], ...], max_bytes: int | None
) -> Path:
    """Do the work of `extract`, once for each size and time of change."""
    targets = dict(wanted)
    folder = _make_temporary_folder(path)
    try:
        with open(path, "rb") as file:
            refuse_lfs_pointer(path, file.read(100))
            file.seek(0)
            for archive, member in iterate(file):
                target = targets.get(PurePosixPath(member.name).name)
                if target is not None and member.isreg() and not member.issparse():
                    _check_size(member.size, max_bytes, folder, f"{path}: {member.name:.200}")
                    archive.extract(member.replace(name=target, deep=False), folder, filter="data")
    except DAMAGED as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): download it again") from error
    except OSError as error:
        raise UserError(f"cannot extract {path} into {folder}: {error.strerror or error}") from error
    return folder


def _make_temporary_folder(path: Path) -> Path:
    """Make a folder that is deleted when the process ends, or else by the next process that calls this.

    A lock on it, which ends with the process however that ends, tells that it is in use.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{path.name[:40]}-"))
    except OSError as error:
        raise UserError(f"cannot extract {path}: {error.strerror}; set TMPDIR to a folder with room") from error
    # Mapped files stay readable after this where a file in use can be removed at all.
    EXIT_CALLBACKS.callback(shutil.rmtree, folder, ignore_errors=True)
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks: nothing of it is ever removed here
            _lock(folder)
        for other in folder.parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                status = other.lstat()
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > _UNLOCKED_S:
                    descriptor = _lock(other)
                    shutil.rmtree(other, ignore_errors=True)
                    os.close(descriptor)
    return folder


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock on a folder. Raises OSError if another one does."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_size(size: int, max_bytes: int | None, folder: Path, name: str) -> None:
    if max_bytes is not None and size > max_bytes:
        raise UserError(f"{name} takes {size:,} bytes, more than {max_bytes:,}: not a file of this kind")
    free = shutil.disk_usage(folder).free
    if size > free - _FREE_BYTES:
        raise UserError(
            f"{name} takes {size:,} bytes, {folder.parent} has {free:,} free: extract it elsewhere and give its folder"
        )
