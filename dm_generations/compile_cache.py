"""Compiled programs kept between runs, so that a second start is quick."""

import hashlib
import platform
import sys
from pathlib import Path

from dm_generations.errors import UserError
from dm_generations.resources import cache_dir

MAX_BYTES = 1 << 30


def enable() -> None:
    """Let JAX keep every compiled program in this user's private cache, at most about 1 GiB of them.

    Call it before the first compilation. A cache that cannot be used costs time, nothing else, so it is
    reported on stderr and the program goes on. A folder set by JAX_COMPILATION_CACHE_DIR is left as it is.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache_dir("xla") / _machine()
        folder.mkdir(mode=0o700, exist_ok=True)
        _prune(folder.parent, MAX_BYTES)
    except (OSError, UserError) as error:
        print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _machine() -> str:
    """A name for this kind of CPU: a program compiled for another one, in a shared home, may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.md5(f"{platform.machine()} {features}".encode(), usedforsecurity=False).hexdigest()[:12]


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
