"""A few known files out of a tar archive, on disk, where they can be mapped.

No name or link in the archive decides where anything is written.
"""

import functools
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from dm_generations.errors import EXIT_CALLBACKS, UserError

SUFFIXES = (".tar.gz", ".tgz", ".tar")
_FREE_BYTES = 1 << 28  # left on the disk for others
# What tarfile and the decompressors below it raise for bytes that are no archive, or half of one.
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, RecursionError)


def is_archive(path: Path) -> bool:
    """Whether `path` is a file with the name of a tar archive."""
    return path.name.endswith(SUFFIXES) and path.is_file()


def unpacked(path: Path, wanted: Mapping[str, str]) -> Path:
    """A folder with the files of the archive whose base names are keys of `wanted`, at the relative paths it maps to.

    A temporary folder, which goes with the process; its name has that of the archive, for messages. An archive is
    unpacked once, as long as it is not changed. Raises UserError if it is damaged, or too large for the disk.
    """
    stat = path.stat()
    return _unpack(path.resolve(), stat.st_size, stat.st_mtime_ns, tuple(sorted(wanted.items())))


@functools.cache
def _unpack(path: Path, size: int, mtime_ns: int, wanted: tuple[tuple[str, str], ...]) -> Path:
    """Size and mtime_ns tell one state of the file from another."""
    targets, folder = dict(wanted), Path(tempfile.mkdtemp(prefix=f"dm-generations-{path.name[:100]}-"))
    # Mapped files stay readable after this where a file in use can be removed at all.
    EXIT_CALLBACKS.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                target = targets.get(PurePosixPath(member.name).name)
                if target is not None and member.isreg() and not member.issparse():
                    _write(archive, member, folder / target, path)
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {path} into {folder}: {error.strerror or error}") from error
    return folder


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, path: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if member.size > free - _FREE_BYTES:
        raise UserError(
            f"{path}: {target.name} takes {member.size:,} bytes, {target.parent} has {free:,} free: "
            "unpack it elsewhere and give its folder"
        )
    with open(target, "wb") as file:
        shutil.copyfileobj(archive.extractfile(member), file, 1 << 20)
    if target.stat().st_size != member.size:
        raise UserError(f"{path} is damaged: it ends within {target.name}; download it again")
