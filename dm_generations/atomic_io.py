"""Files that appear whole or not at all.

A file is written under a temporary name in the folder where it belongs, then renamed: readers see the old
file or the whole new one. A killed process leaves at most temporary files, which the next run removes.
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

_TEMPORARY = re.compile(r"\.dmg-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # a process number means something on its own host only
_FOREIGN_STALE_S = 3600  # a file is written in far less, so an older one of another host is abandoned


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `path` whole or not at all; its folder must exist. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends, and is gone after an error in it. Raises OSError."""
    temporary = temporary_path(path.parent)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(folder: Path) -> Path:
    """Where to write a file that is to be renamed within `folder` when it is whole."""
    # Short, whatever the length of the final name: a longer one might not fit the file system.
    return folder / f".dmg-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what killed processes left in `folder`; call it before this process writes there."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".dmg-")]
    except OSError:
        return  # housekeeping: a folder that cannot be read is reported when it is written
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
        os.kill(process, 0)  # sends nothing; only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
