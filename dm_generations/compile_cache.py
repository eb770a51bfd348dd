"""Compiled programs kept between runs, so that a second start is quick."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError
from dm_generations.files import remove_stale_temporaries, write_atomic
from dm_generations.resources import cache_dir

MAX_BYTES = 1 << 30
_folder: Path | None = None
_CHECKED = "checked"  # a file whose time says: entries older than this were found whole
_CLOCK_SLACK_NS = 10**9  # file systems round times, and lag behind the clock


def enable() -> None:
    """Keep every compiled program in this user's private cache, at most about 1 GiB of them, from now on.

    On a CPU `programs.Kept` does it, whose programs are found without being traced; elsewhere JAX's own cache.
    Call it before the first compilation. A cache that cannot be used costs time, nothing else, so it is
    reported on stderr and the program goes on. A folder set by JAX_COMPILATION_CACHE_DIR is left to JAX as it is.
    Starts JAX: UserError where JAX_PLATFORMS names a platform that is not there.
    """
    import jax

    global _folder
    try:
        on_cpu = jax.default_backend() == "cpu"
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA, where JAX's plugin for it is not installed
        wanted = f"JAX_PLATFORMS={jax.config.jax_platforms}"
        raise UserError(f"JAX finds no device for {wanted}: unset it, or install JAX for that platform") from error
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache_dir("xla") / _machine()
        folder.mkdir(mode=0o700, exist_ok=True)
        _prune(folder.parent, MAX_BYTES)
        if on_cpu:
            remove_stale_temporaries(folder)
            _folder = folder
        else:
            _let_jax_keep_in(folder)
    except (OSError, UserError) as error:
        warn(str(error))


def folder() -> Path | None:
    """Where `programs` keeps those of a CPU of this kind; None before `enable`, and where JAX keeps them itself.

    For what JAX has loaded from its cache cannot be written again: functions of it are missing.
    """
    import jax

    return _folder if jax.config.jax_compilation_cache_dir is None else None


def write(path: Path, data: bytes) -> None:
    """Keep `data` as a file of `folder`, if that can be written."""
    try:
        write_atomic(path, data)
    except OSError as error:
        warn(f"{path.parent}: {error.strerror}")


@functools.cache
def warn(reason: str) -> None:
    """Once: there are several programs."""
    print(f"warning: compiled programs are not kept: {reason}", file=sys.stderr)


def _let_jax_keep_in(folder: Path) -> None:
    import jax

    _remove_cut_off(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cpu_features() -> str:
    """The line of /proc/cpuinfo that names what the first CPU can do; where there is none, the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _machine() -> str:
    """A name for this kind of CPU: a program compiled for another one, in a shared home, may not run here."""
    name = f"{platform.machine()} {cpu_features()}"
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:12]


def _prune(folder: Path, max_bytes: int) -> None:
    """Delete the files used longest ago until the rest fit.

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


def _remove_cut_off(folder: Path) -> None:
    """Delete entries that a killed process or a full disk left half written.

    JAX writes them in place, would warn of them at each start and would never replace them.
    """
    started = time.time_ns()
    checked = folder / _CHECKED
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if path.stat().st_mtime_ns >= since and not _is_whole(path.read_bytes()):
                path.unlink()
    checked.touch()
    os.utime(checked, ns=(started, started - _CLOCK_SLACK_NS))


def _is_whole(entry: bytes) -> bool:
    """Whether a compressed entry has its end. JAX compresses with zstd where there is one, else with zlib."""
    if not entry.startswith(b"\x28\xb5\x2f\xfd"):  # https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1
        decompressor, errors = zlib.decompressobj(), zlib.error
    elif (found := _zstd()) is not None:
        decompressor, errors = found
    else:
        return True  # another installation's, which JAX is not going to read here
    try:
        decompressor.decompress(entry)
    except errors:
        return False
    return decompressor.eof


def _zstd() -> tuple[Any, type[Exception]] | None:
    """A decompressor, and what it raises; None where there is none."""
    try:
        from compression import zstd  # Python 3.14

        return zstd.ZstdDecompressor(), zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    except ImportError:
        return None
