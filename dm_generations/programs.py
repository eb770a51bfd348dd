"""Compiled programs kept whole between runs: a later start of the same version loads them, and traces nothing.

JAX's own cache asks for a program traced and lowered, which on a CPU is most of what a start of small networks takes.
"""

import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import flax
import jax
from jax.experimental import serialize_executable

from dm_generations import compile_cache
from dm_generations.resources import PACKAGE, core_count

_programs: dict[str, Callable] = {}  # of this process, by the names of their files
_DIGEST_BYTES = 32  # of SHA-256, before what is kept: bits that turned over in machine code would draw other pictures


class Kept:
    """A function of arrays that `jax.jit` has made: `Kept(function, *static)(*arrays)` is `function(*static, *arrays)`.

    static: its first arguments, which are static   closed_over: what else decides what it computes, such as the values
    that a closure reads. A program is found again by the representations of these, which have to say everything.

    Programs are kept in `compile_cache.folder`; if there is none, that function is all there is to it.
    """

    def __init__(self, function: Callable, *static: Hashable, closed_over: tuple = ()):
        self.function = function
        self._static = static
        self._what = (function.__module__, function.__qualname__, static, closed_over)
        self._of_shapes: dict[Hashable, Callable] = {}

    def __call__(self, *arrays: Any) -> Any:
        folder = compile_cache.folder()
        if folder is None:
            return self.function(*self._static, *arrays)
        shapes = _shapes(arrays)
        if shapes not in self._of_shapes:
            path = folder / f"{_name(*self._what, shapes)}-program"
            if path.name not in _programs:
                _programs[path.name] = _loaded(path) or self._compiled(path, arrays)
            self._of_shapes[shapes] = _programs[path.name]
        return self._of_shapes[shapes](*arrays)

    def _compiled(self, path: Path, arrays: tuple) -> Callable:
        program = self.function.lower(*self._static, *arrays).compile()
        try:
            data = pickle.dumps(serialize_executable.serialize(program))
        except (ValueError, NotImplementedError) as error:  # how JAX refuses; the program can be run all the same
            compile_cache.warn(str(error))
            return program
        compile_cache.write(path, hashlib.sha256(data).digest() + data)
        return program


def remembered(find: Callable[[], int], *of: Any) -> int:
    """`find()`, or what it was in an earlier run: a number that depends on `of` alone and takes tracing to find."""
    folder = compile_cache.folder()
    if folder is None:
        return find()
    path = folder / f"{_name(*of)}-number"
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        number = find()
    compile_cache.write(path, str(number).encode("ascii"))
    return number


def _loaded(path: Path) -> Callable | None:
    """The program in a file; None if there is none, or not the bytes that were written.

    Unpickled, and run, as machine code of any kind from there would be: the folder is this user's alone, as
    `resources.cache_dir` sees to, and holds what was written here.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        return None
    return serialize_executable.deserialize_and_load(*pickle.loads(data))


def _shapes(arrays: tuple) -> Hashable:
    leaves, structure = jax.tree.flatten(arrays)
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


def _name(*of: Any) -> str:
    return hashlib.sha256(repr((of, _version(), _settings())).encode()).hexdigest()[:32]


@functools.cache
def _version() -> str:
    """Of everything that a program is made by."""
    versions = platform.python_version(), jax.__version__, jax.lib.__version__, flax.__version__
    digest = hashlib.sha256(repr(versions).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _settings() -> tuple:
    """Of this process, that change what JAX makes of a function; XLA divides it among the cores that it may use."""
    values = sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
    return os.environ.get("XLA_FLAGS"), jax.local_device_count(), core_count(), values
