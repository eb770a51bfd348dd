"""JAX's persistent compilation cache, so that a second start is quick."""

import contextlib
import hashlib
import logging
import os
import platform
import time
import zlib
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError
from dm_generations.paths import cache_dir

_logger = logging.getLogger(__name__)
MAX_BYTES = 1 << 30
_CHECKED = "checked"  # a file whose time says: entries older than this were found complete
_CLOCK_SLACK_NS = 10**9  # file systems round times, and lag behind the clock


def enable() -> None:
    """Cache compiled programs on disk from now on, at most about 1 GiB, in this user's private folder.

    Call it before the first compilation. A cache that cannot be used costs only time, so that is logged as a
    warning and the program continues. A folder set by JAX_COMPILATION_CACHE_DIR is left to JAX as it is. Starts JAX.

    Raises:
        UserError: JAX_PLATFORMS names a platform that is not there.
    """
    import jax

    config: Any = jax.config
    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA, where JAX's plugin for it is not installed
        wanted = f"JAX_PLATFORMS={config.jax_platforms}"
        raise UserError(f"JAX finds no device for {wanted}: unset it, or install JAX for that platform") from error
    if config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache_dir(f"xla/{_machine()}")
        prune(folder.parent, MAX_BYTES)
        _remove_truncated(folder)
    except (OSError, UserError) as error:
        _logger.warning("compiled programs are not cached: %s", error)
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cpu_features() -> str:
    """Return the line of /proc/cpuinfo that names the features of the first CPU; without that file, the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _machine() -> str:
    """Return a name for this kind of CPU: a program compiled for another one, in a shared home, may not run here."""
    name = f"{platform.machine()} {cpu_features()}"
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:12]


def prune(folder: Path, max_bytes: int) -> None:
    """Delete the least recently used files until the rest have at most `max_bytes`.

    JAX's own bound (`jax_compilation_cache_max_size`) needs one more package, filelock.
    """
    files = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process prunes too
            continue
        if path.is_file():
            files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _remove_truncated(folder: Path) -> None:
    """Delete entries that a killed process or a full disk left incomplete.

    JAX writes entries in place. It would warn of such a one at every start, compile anew, and never replace it.
    """
    started = time.time_ns()
    checked = folder / _CHECKED
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if path.stat().st_mtime_ns >= since and not _is_complete(path.read_bytes()):
                path.unlink()
    checked.touch()
    os.utime(checked, ns=(started, started - _CLOCK_SLACK_NS))


def _is_complete(entry: bytes) -> bool:
    """Return whether a compressed entry has its end. JAX compresses with zstd where it is installed, else with zlib."""
    if not entry.startswith(b"\x28\xb5\x2f\xfd"):  # https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1
        decompressor: Any = zlib.decompressobj()
    elif (decompressor := _zstd_decompressor()) is None:
        return True  # of another installation; JAX is not going to read it here
    try:
        decompressor.decompress(entry)
    except Exception:  # of zlib or of either package for zstd: damaged
        return False
    return decompressor.eof


def _zstd_decompressor() -> Any:
    with contextlib.suppress(ImportError):
        from compression import zstd  # Python 3.14

        return zstd.ZstdDecompressor()
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
    return None
