"""Files that appear whole or not at all.

A file is written under a temporary name in its own folder, then renamed: readers see the old file or the whole new
one. A killed process leaves at most temporary files, which the next run removes.
"""

import contextlib
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.dmg-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp(-journal)?")
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # hosts that share a disk have other process numbers
_FOREIGN_STALE_S = 3600  # writing a file takes far less, so an older one of another host is abandoned


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
    temporary = temporary_path(path.parent)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(folder: Path) -> Path:
    """Return a new path in `folder` for a file that is renamed when it is whole."""
    # Short, because the final name can be as long as the file system allows.
    return folder / f".dmg-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what killed processes left in `folder`. Call it before this process writes there."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".dmg-")]
    except OSError:
        return  # the error is reported when the folder is written
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        with contextlib.suppress(OSError):
            if match and _is_stale(folder / name, match["host"], int(match["process"])):
                (folder / name).unlink()


def _is_stale(path: Path, host: str, process: int) -> bool:
    if host == _HOST and os.name == "posix":
        return process == os.getpid() or not _is_running(process)
    return time.time() - path.stat().st_mtime > _FOREIGN_STALE_S


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
